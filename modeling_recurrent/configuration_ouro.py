"""The config of an Ouro checkpoint: the fields of the released config.json (arXiv 2510.25741)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class OuroConfig(PreTrainedConfig):
    """A stack of layers and a norm, run `total_ut_steps` times. There are no other layers.

    `early_exit_step` and `early_exit_threshold` say which step's states a token is predicted from (`exit_of`).
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map = {  # noqa: RUF012 (transformers reads a plain dict)
        "n_embd": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers_in_recurrent_block": "num_hidden_layers",
        "block_size": "max_position_embeddings",
        "mean_recurrence": "total_ut_steps",
        "mean_backprop_depth": "total_ut_steps",
    }

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    total_ut_steps: int = 4
    early_exit_threshold: float | int = 1.0
    early_exit_step: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        """Fill in absent fields, then check that this package can run the model."""
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_act != "silu":
            raise ValueError(
                f"`hidden_act` must be 'silu', as in the released Ouro checkpoints, but config.json says "
                f"{self.hidden_act!r}. Load such a checkpoint with the code that trained it."
            )
        if "sliding_attention" in (self.layer_types or []):
            raise ValueError(
                "`layer_types` must be 'full_attention' throughout, as in the released Ouro checkpoints, but "
                "config.json has a 'sliding_attention'. Load such a checkpoint with the code that trained it."
            )
        if self.total_ut_steps < 1:
            raise ValueError(f"`total_ut_steps` must be at least 1, but config.json says {self.total_ut_steps}.")

    @property
    def n_layers_in_prelude(self) -> int:
        """0: the core starts from the embeddings."""
        return 0

    @property
    def n_layers_in_coda(self) -> int:
        """0: the head reads the core's normed states."""
        return 0
