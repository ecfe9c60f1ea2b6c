"""A loaded model and the races that run with it, without the page around them."""

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from ..bench.prompts import encode_prompt
from ..commands.cli_checks import check_adapter, device_for
from ..commands.loading import load
from ..commands.timed_runs import why_different
from ..conversion.quiet_transformers import quiet_transformers
from ..generation.execution.packed_linear import check_packable
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..training.position_table import check_fit
from ..training.row_forms import prompt_row
from .drawing import TITLES, empty_lane, failed, lanes, outcome, told, trace_frame
from .race import Frame, Race
from .settings import options_of, race_keywords

Shown = tuple[str, ...]  # what is told, ours, plain decoding, the trace: HTML


@dataclass
class Racer:
    """
    Args:
        fixed: the options of `wavedraft generate` that the page does not change, by their names: `model`, `adapter`,
            `dtype`, `device`, `packed_weights`, `compile`.

    Attributes:
        warm: the settings that were raced before.
        races: those that run, by the session of the browser.
    """

    model: Any
    tokenizer: Any
    fixed: dict[str, Any]
    warm: set[str] = field(default_factory=set)
    races: dict[str, Race] = field(default_factory=dict)

    @classmethod
    def load(cls, **fixed: Any) -> "Racer":
        """Loads the model that the options name.

        Raises:
            ValueError: an option does not fit the checkpoint or the machine.
        """
        with quiet_transformers():
            device = device_for(fixed["device"])
            check_adapter(fixed["adapter"], fixed["model"])
            tokenizer = AutoTokenizer.from_pretrained(fixed["model"])
            model = load(fixed["model"], fixed["dtype"], device, fixed["adapter"])
            if fixed["packed_weights"]:
                check_packable(model)
        return cls(model, tokenizer, fixed)

    @property
    def is_recurrent(self) -> bool:
        return is_recurrent_config(self.model.config)

    def race(self, session: str, prompt: str, is_raw: bool, values: dict[str, str]) -> Iterator[Shown]:
        """Runs a race, and yields what the page shows. What fails is told on the page.

        Args:
            session: names the browser that waits for it.
            is_raw: whether the prompt is continued as it is, without the chat template.
            values: of the settings, by their names.
        """
        frame = None
        try:
            with quiet_transformers():
                options = options_of(values, self.fixed)
                race = self.races[session] = self._prepared(prompt, is_raw, options)
                for frame in race.frames():
                    yield told(frame.told), *self._lanes(frame), ""
                yield *self._end(race, options, frame), self._trace(race, prompt)
        except Exception as error:
            is_refused = isinstance(error, ValueError | OSError)
            if not is_refused:
                traceback.print_exc(file=sys.stderr)
            message = str(error) if is_refused else f"Decoding failed with {type(error).__name__}: {error}"
            yield failed(message), *self._lanes(frame), ""
        finally:
            self.races.pop(session, None)

    def stop(self, session: str) -> None:
        """Stops the race of a session, if one runs."""
        if race := self.races.get(session):
            race.stop()

    def stop_all(self) -> None:
        """Stops every race."""
        for session in list(self.races):
            self.stop(session)

    def _prepared(self, prompt: str, is_raw: bool, options: dict[str, Any]) -> Race:
        """A race that nothing forbids.

        Raises:
            ValueError: the prompt or the settings do.
        """
        if not prompt.strip():
            raise ValueError("There is no prompt. Type one above.")
        race_keywords(options)
        row = prompt_row(prompt)
        inputs = encode_prompt(self.tokenizer, row, is_raw)
        check_fit(self.model.config, [(row, inputs["input_ids"].shape[1])], options["max_new_tokens"])
        inputs = inputs.to(self.model.device)
        return Race(self.model, self.tokenizer, inputs, lambda: race_keywords(options), steps_of(options) in self.warm)

    def _lanes(self, frame: Frame | None) -> list[str]:
        if frame is None:
            return list(map(empty_lane, TITLES))
        return lanes(frame, counts_forwards=not self.is_recurrent)

    def _end(self, race: Race, options: dict[str, Any], frame: Frame | None) -> list[str]:
        if None not in race.runs:
            self.warm.add(steps_of(options))
        return [outcome(race, bool(options["temperature"]), why_different(self.model)), *self._lanes(frame)]

    def _trace(self, race: Race, prompt: str) -> str:
        return trace_frame(race.trace(prompt), self.tokenizer) if race.recorder.forwards else ""


def steps_of(options: dict[str, Any]) -> str:
    """The settings by which decode steps differ."""
    return repr({name: value for name, value in options.items() if name not in ("seed", "max_new_tokens")})
