"""How one decodes with TiDAR: the keywords `generate` and `generation_config.json` take beside the stock ones."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TiDAROptions:
    """
    Args:
        draft_length: K, tokens drafted at a time, from 1 to the length the checkpoint was taught; 0 decodes without
            drafts, as the stock model does. By default the length the checkpoint was taught.
        seed: for sampling: one integer for each row, so that a row's text does not depend on the batch it is in;
            a single integer s gives row b the seed s + b. By default the device's global generator draws.
    """

    draft_length: int
    seed: int | list[int] | None = None

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, generation_config: Any, config: Any) -> "TiDAROptions":
        """Reads and checks the options of one call: keyword, then generation config, then the checkpoint's default.

        Raises:
            ValueError: an option is out of range, or the call asks for beams.
        """
        taught = config.tidar_config["draft_length"]
        draft_length = getattr(generation_config, "draft_length", None)
        draft_length = taught if draft_length is None else draft_length
        if not isinstance(draft_length, int) or isinstance(draft_length, bool) or not 0 <= draft_length <= taught:
            raise ValueError(
                f"`draft_length` must be an integer between 1 and {taught}, the length this checkpoint was taught to "
                "draft (`config.tidar_config.draft_length`), or 0 to decode without drafts, "
                f"but is {draft_length!r}."
            )
        if draft_length and (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"`num_beams` must be 1 while drafting, but is {generation_config.num_beams}: a draft continues one "
                "text, not several. Pass `draft_length=0` to search with beams and without drafts."
            )
        seed = getattr(generation_config, "seed", None)
        seeds = seed if isinstance(seed, list | tuple) else [0 if seed is None else seed]
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**63 for one in seeds):
            raise ValueError(f"`seed` must be an integer from 0 to 2^63 - 1, or one for each row, but is {seed!r}.")
        return cls(draft_length=draft_length, seed=list(seed) if isinstance(seed, tuple) else seed)

    def seeds(self, batch_size: int) -> list[int] | None:
        """One seed a row, or None."""
        if self.seed is None:
            return None
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(batch_size)]
        if len(self.seed) != batch_size:
            raise ValueError(
                f"`seed` must be one integer or one for each of the {batch_size} rows of the batch (prompts times "
                f"`num_return_sequences`), but has {len(self.seed)} of them."
            )
        return self.seed
