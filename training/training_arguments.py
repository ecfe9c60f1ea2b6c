"""The options of a training run: those of `wavedraft train`, in addition to those of transformers' Trainer."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from ..generation.stock_model import has_states
from ..modeling_recurrent.checkpoint_recurrent import is_recurrent_config
from ..modeling_tidar import DraftObjective, TiDARConfig
from .position_table import position_table_of
from .row_forms import check_columns
from .run_folder import last_whole_checkpoint

TIDAR_MODES = ("gated", "joint", "full", "head")  # the first of each is the default
RECURRENT_MODES = ("lora", "full")
# Options without effect on a recurrent-depth model, which does not draft.
OF_DRAFTS = ("draft_loss", "alpha", "slot_decay", "pack", "attn_implementation", "torch_compile")


@dataclass(kw_only=True)
class FinetuneArguments(TrainingArguments):
    """The options of a run, all checked before anything is loaded.

    Fields of transformers' `TrainingArguments` are also accepted, except those that these options set.

    Args:
        model_path: a TiDAR checkpoint (`wavedraft convert`), or a recurrent-depth one.
        data: rows from a file, a folder or the Hub, as in `row_sources.open_rows`. A row is `messages` or
            `conversations`; `prompt`, `question` or `instruction` (with `input`) and `answer`, `completion`, `response`
            or `output`; or `text`. The chat template reads a row's `tools` and `chat_template_kwargs`. The best rows
            are those written by the model itself.
        output_dir: the folder of checkpoints and the result. The result is a PEFT adapter in gated and lora mode, and
            in joint mode unless `rank` is 0; otherwise it is a whole checkpoint. A draft head is an additional file.
        split: the split to read, if the dataset has several.
        columns: the column of each part of a row, as `{"prompt": "question", "answer": "reply"}`, for `data` and for
            `eval_prompts_path`. Words are then read from no other column.
        streaming: reads rows during training, and shuffles within the next thousand.
        eval_prompts_path: a file of rows with prompts, never used for training, that are decoded before and after.
            For a recurrent-depth model, the perplexity of their answers is also measured. Its rows may be `text`, whose
            first 32 tokens are the prompt.
        num_eval_prompts: the number of these prompts to decode.
        mode: for TiDAR "gated" (base frozen, text unchanged), "joint" (the paper's loss), "full" (joint, on every
            weight) or "head": a draft head for a model that already drafts, everything else frozen. For a
            recurrent-depth model "lora", on core and adapter, or "full". The first of each is the default.
        draft_loss, alpha, slot_decay: see `DraftObjective`.
        from_adapter: an adapter of the same mode to continue training, with its rank. In head mode, the adapter whose
            drafts the head improves. It is saved with the head. If it has a head, training continues that head.
        rank: rank of the LoRA adapter, default 32; 0, in joint mode only, trains every weight. In head mode, the inner
            channels of the head, default 512.
        batch_size: rows per forward of one process.
        learning_rate: default 1e-3 for an adapter, 2e-3 for a head, 1e-5 for every weight.
        max_length: maximum tokens of a row; longer rows are cut. At most the rows of a learned position table.
        pack: puts several rows into one sequence of `max_length` to reduce padding. No row sees another.
        eval_steps: steps between evaluations, which decode the prompts and save. The run ends with the checkpoint of
            the most tokens per forward.
        patience: ends the run after this number of evaluations in a row without more tokens per forward.
        load_in_4bit, load_in_8bit: loads the base quantized by bitsandbytes, to train an adapter on it.
        attn_implementation: as in `from_pretrained`. Default: "eager" on a CPU with rows of at most 1024 tokens, which
            takes half the time of sdpa; otherwise the checkpoint's own.
        torch_compile: compiles the decoder; the first steps then take minutes.
        report_to: further loggers of Trainer: "tensorboard", "wandb", ...
        resume: continues from the last complete checkpoint in `output_dir`, with the same model, data and arguments.

    Attributes:
        is_recurrent: whether the model is a recurrent-depth one, which does not draft.
        has_states: whether layers of the model keep a state, as those with linear attention.
        lora_rank, head_rank: ranks of the trained parts; 0 if a part is not trained.
        objective: the training objective of a TiDAR checkpoint; None for a recurrent-depth one.
        draft_length: K; 1 for a model that does not draft.
        last_checkpoint: the checkpoint to resume from, or None.
        trainer_options: non-default fields of `TrainingArguments` that are not arguments above.

    Raises:
        ValueError: an option is out of range or contradicts another, a file or folder is missing, or `output_dir` is
            in use without `resume`.
    """

    model_path: str
    data: str
    output_dir: str
    split: str = "train"
    columns: dict[str, str] | None = None
    streaming: bool = False
    eval_prompts_path: str | None = None
    num_eval_prompts: int = 10
    mode: str | None = None
    draft_loss: str = "cross_entropy"
    alpha: float = 1.0
    slot_decay: float = 1.0
    from_adapter: str | None = None
    rank: int | None = None
    max_steps: int = 300
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    max_length: int = 320
    pack: bool = False
    eval_steps: int | None = None
    patience: int | None = None
    save_steps: int = 100
    report_to: str = "none"
    bf16: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None
    activation_checkpointing: bool = False
    torch_compile: bool = False
    resume: bool = False
    seed: int = 0

    # Defaults that differ from Trainer's.
    lr_scheduler_type: str = "cosine"
    warmup_steps: float | None = None  # a twentieth of the steps
    logging_steps: float | None = None  # a tenth of the steps, at most 10
    save_total_limit: int = 2
    use_cpu: bool = field(default_factory=lambda: not torch.accelerator.is_available())

    # Fields of Trainer that the options above set.
    per_device_train_batch_size: int = field(init=False)
    gradient_checkpointing: bool = field(init=False)
    eval_strategy: str = field(init=False)
    load_best_model_at_end: bool = field(init=False)
    metric_for_best_model: str | None = field(init=False)
    greater_is_better: bool = field(init=False, default=True)
    accelerator_config: Any = field(init=False)
    remove_unused_columns: bool = field(init=False, default=False)

    is_recurrent: bool = field(init=False)
    has_states: bool = field(init=False)
    lora_rank: int = field(init=False)
    head_rank: int = field(init=False)
    objective: DraftObjective | None = field(init=False)
    draft_length: int = field(init=False)
    last_checkpoint: Path | None = field(init=False)
    compiles_decoder: bool = field(init=False)
    trainer_options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("model_path", "data", "output_dir", "eval_prompts_path", "from_adapter"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, str(path))
        self.trainer_options = self._trainer_options()
        self._read_config()
        self._choose_what_is_trained()
        self._check_what_is_trained()
        self._check_states()
        self._check_steps()
        self._check_folders()
        self._check_quantization()
        self._decide_for_trainer()
        super().__post_init__()

    @property
    def trains_every_weight(self) -> bool:
        return not (self.lora_rank or self.head_rank)

    def _trainer_options(self) -> dict[str, Any]:
        own_names = type(self).__annotations__.keys() - {"lr_scheduler_type", "warmup_steps"}
        options = {}
        for option in fields(self):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if option.name not in own_names and getattr(self, option.name) != default:
                options[option.name] = getattr(self, option.name)
        return options

    def _read_config(self) -> None:
        if not Path(self.model_path).is_dir() and len(Path(self.model_path).parts) != 2:
            raise ValueError(
                f"There is no folder {self.model_path}. Make one: `wavedraft convert SOURCE {self.model_path}`."
            )
        config = AutoConfig.from_pretrained(self.model_path)
        self.is_recurrent, self.has_states = is_recurrent_config(config), has_states(config)
        self.draft_length = 1 if self.is_recurrent else TiDARConfig.from_model_config(config).draft_length
        limit = position_table_of(config)
        if limit is not None and self.max_length > limit:
            raise ValueError(
                f"`max_length` must be at most {limit}, the rows of this model's position table "
                f"(`config.max_position_embeddings`), but is {self.max_length}."
            )

    def _choose_what_is_trained(self) -> None:
        modes, kind = (
            (RECURRENT_MODES, "recurrent-depth model") if self.is_recurrent else (TIDAR_MODES, "TiDAR checkpoint")
        )
        if self.mode is not None and self.mode not in modes:
            named = ", ".join(map(repr, modes[:-1]))
            raise ValueError(f"`mode` must be {named} or {modes[-1]!r} for a {kind}, but is {self.mode!r}.")
        used = [name for name in OF_DRAFTS if getattr(self, name) != getattr(type(self), name)]
        if self.is_recurrent and used:
            raise ValueError(
                f"`{used[0]}` is for TiDAR checkpoints, but this is a recurrent-depth model. Leave it out."
            )
        self.mode = self.mode or modes[0]
        self.head_rank = self.lora_rank = 0
        if self.mode == "head":
            self.head_rank = 512 if self.rank is None else self.rank
        elif self.mode != "full":
            self.lora_rank = 32 if self.rank is None else self.rank

    def _check_what_is_trained(self) -> None:
        mode, adapter = self.mode, self.from_adapter
        if adapter is not None and not Path(adapter).is_dir() and len(Path(adapter).parts) != 2:
            raise ValueError(
                f"There is no folder {adapter}. Train an adapter first: `wavedraft train ... --mode gated`."
            )
        if mode == "head" and self.head_rank < 1:
            raise ValueError(f"`rank` must be at least 1 in head mode, but is {self.head_rank}.")
        if mode == "head" and self.torch_compile:
            raise ValueError("`torch_compile` compiles the decoder, but head mode trains only the head. Leave it out.")
        if mode == "lora" and self.lora_rank < 1:
            raise ValueError(
                f"`rank` must be at least 1 in lora mode, but is {self.lora_rank}. `mode='full'` trains every weight."
            )
        if mode == "gated" and self.lora_rank < 1:
            raise ValueError(f"`rank` must be at least 1 in gated mode, whose base is frozen, but is {self.lora_rank}.")
        if mode in ("gated", "head") and self.alpha != 1.0:
            raise ValueError(
                f"`alpha` weighs the autoregressive loss, which {mode} mode does not have, but is {self.alpha}."
            )
        if mode == "full" and adapter is not None:
            raise ValueError(f"`from_adapter` is {adapter}, but full mode trains no adapter. Leave one of them out.")

    def _check_states(self) -> None:
        """Raises for what layers that keep a state cannot be taught by."""
        if not self.has_states:
            return
        why = "layers of this model keep a state, which"
        if self.mode not in ("gated", "head"):
            raise ValueError(
                f"`mode` must be 'gated' or 'head', but is {self.mode!r}: {why} one forward of text and masks cannot "
                "fork."
            )
        if self.pack:
            raise ValueError(
                f"`pack` must be left out: {why} would pass from one row to the next in a sequence. Rows of like "
                "length need little padding."
            )

    def _check_steps(self) -> None:
        if self.columns is not None:
            self.columns = check_columns(self.columns)
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, but is {self.max_steps}.")
        if self.eval_steps and not self.eval_prompts_path:
            raise ValueError(
                f"`eval_steps` is {self.eval_steps}, but there are no prompts to decode. Give `eval_prompts_path`."
            )
        if self.patience is not None and (self.patience < 1 or not self.eval_steps):
            raise ValueError(
                f"`patience` counts evaluations, so it must be at least 1 and needs `eval_steps`, but is "
                f"{self.patience} with `eval_steps` {self.eval_steps}."
            )

    def _check_folders(self) -> None:
        folder = Path(self.output_dir)
        self.last_checkpoint = last_whole_checkpoint(folder) if self.resume else None
        if self.resume and self.last_checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in {folder}. Start without `--resume`.")
        if not self.resume and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty. Continue with `--resume`, or choose another folder.")
        if self.eval_prompts_path and not Path(self.eval_prompts_path).is_file():
            raise ValueError(f"There is no file {self.eval_prompts_path}.")
        if self.pack and self.streaming:
            raise ValueError(
                "`pack` places the longest rows first, so it must know all rows, and `streaming` reads them one by "
                "one. Leave out `pack` or `streaming`."
            )

    def _check_quantization(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other. Choose one.")
        if not (self.load_in_4bit or self.load_in_8bit):
            return
        name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        if self.trains_every_weight:
            raise ValueError(
                f"`{name}` loads weights that cannot be trained. Train an adapter: give a `rank` above 0, not "
                f"{self.lora_rank}."
            )
        if not is_bitsandbytes_available():
            raise ValueError(f"`{name}` needs bitsandbytes: pip install bitsandbytes. Or train without `{name}`.")

    def _decide_for_trainer(self) -> None:
        mode = "joint" if self.mode == "full" else self.mode
        self.objective = (
            None if self.is_recurrent else DraftObjective(mode, self.draft_loss, self.alpha, self.slot_decay)
        )
        if self.learning_rate is None:
            self.learning_rate = 2e-3 if self.head_rank else 1e-3 if self.lora_rank else 1e-5
        if self.attn_implementation is None and self.use_cpu and self.max_length <= 1024 and not self.is_recurrent:
            self.attn_implementation = "eager"
        if self.warmup_steps is None:
            self.warmup_steps = max(1, self.max_steps // 20)
        if self.logging_steps is None:
            self.logging_steps = max(1, min(10, self.max_steps // 10))
        self.per_device_train_batch_size = self.batch_size
        self.gradient_checkpointing = self.activation_checkpointing  # its name before transformers 5.23
        self.eval_strategy = "steps" if self.eval_steps else "no"
        self.load_best_model_at_end = bool(self.eval_steps)
        self.metric_for_best_model = "tokens_per_forward" if self.eval_steps else None
        self.save_steps = self.eval_steps or self.save_steps
        self.accelerator_config = {"dispatch_batches": False} if self.streaming else None
        # Trainer would compile the whole model, but only the decoder is the same in every step.
        self.compiles_decoder, self.torch_compile = self.torch_compile, False
