"""The config of a recurrent-depth checkpoint: the fields of Huginn-0125's own config.json."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

BLOCK_FORMS = ("sandwich", "pre-norm", "post-norm")


@strict
class RecurrentDepthConfig(PreTrainedConfig):
    """A prelude, a core of shared weights run many times, and a coda (arXiv 2502.05171).

    The names are those of the released checkpoint, so its config.json loads as it is. `mean_recurrence` is the mean
    depth in training, and the default of every forward and decode. `mean_backprop_depth` is how many of a training
    step's recurrences carry a gradient. `init_values` may have `std` (of weights and initial states) and `embed_scale`,
    by default sqrt(2 / (5 n_embd)) and sqrt(n_embd). `block_form` is "sandwich" (Huginn's, the default), "pre-norm"
    (Llama's) or "post-norm" (OLMo-2's). The latter two are for retrofitted models. Their released configs lack
    the field, so loading reads it from the weights. They rotate by `rope_parameters`, Huginn by
    `rope_base`.
    """

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map = {  # noqa: RUF012 (transformers reads a plain dict)
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
        "padded_vocab_size": "vocab_size",
        "rms_norm_eps": "norm_eps",
    }

    n_embd: int = 5280
    n_heads: int = 55
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_layers: int | None = None
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    block_size: int = 4096
    vocab_size: int = 65536
    intermediate_size: int = 17920
    norm_eps: float = 1e-6
    rope_base: float | int = 50_000
    rope_parameters: dict | None = None
    block_form: str | None = None
    bias: bool = False
    qk_bias: bool = True
    tie_embeddings: bool = True
    injection_type: str = "linear"
    state_init: str = "like-init"
    mean_recurrence: int = 32
    mean_backprop_depth: int = 8
    init_values: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        """Fill in the derived fields that older configs lack, then check that this package can run the model."""
        kwargs.setdefault("rope_theta", self.rope_base)
        if kwargs.get("test_time_noise"):
            raise ValueError(
                f"`test_time_noise` must be 0 or absent, as in Huginn-0125 (forwards add no noise), but config.json "
                f"says {kwargs['test_time_noise']}. Set it to 0. For noise in diffusion forcing, pass `state_noise` to "
                f"`generate`."
            )
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_heads
        if self.n_layers is None:
            self.n_layers = self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
        self._check_supported()

    def _check_supported(self) -> None:
        assert self.head_dim is not None  # filled above
        if self.n_embd != self.n_heads * self.head_dim or self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even and `n_heads` * `head_dim` equal to `n_embd`, but `head_dim` is "
                f"{self.head_dim}, `n_heads` {self.n_heads} and `n_embd` {self.n_embd}. Correct config.json."
            )
        for name, value, required in (
            ("injection_type", self.injection_type, "linear"),
            ("state_init", self.state_init, "like-init"),
        ):
            if value != required:
                raise ValueError(
                    f"`{name}` must be {required!r}, Huginn-0125's and the only supported value, but "
                    f"config.json says {value!r}. Load such a checkpoint with the code that trained it."
                )
        if self.block_form not in (None, *BLOCK_FORMS):
            raise ValueError(f"`block_form` must be one of {BLOCK_FORMS}, or absent, but is {self.block_form!r}.")
        if self.mean_recurrence < 1 or self.mean_backprop_depth < 1:
            raise ValueError(
                f"`mean_recurrence` and `mean_backprop_depth` must be at least 1, but config.json says "
                f"{self.mean_recurrence} and {self.mean_backprop_depth}."
            )

    @property
    def init_std(self) -> float:
        """Standard deviation of weights and, before scaling by `embed_scale`, of initial states."""
        return (self.init_values or {}).get("std") or math.sqrt(2 / (5 * self.n_embd))

    @property
    def embed_scale(self) -> float:
        """Factor on token embeddings and on initial states."""
        return (self.init_values or {}).get("embed_scale") or math.sqrt(self.n_embd)

    @property
    def effective_depth(self) -> int:
        """Layers a token passes through at `mean_recurrence`; it scales the initialisation of output projections."""
        around = self.n_layers_in_prelude + self.n_layers_in_coda
        return around + self.n_layers_in_recurrent_block * self.mean_recurrence
