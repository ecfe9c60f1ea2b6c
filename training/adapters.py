"""Adds the trained parts to a model, and saves them: a LoRA, a gated LoRA, a draft head, or every weight."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from ..generation.drafting.draft_head import HEAD_FILE, draft_head_of, new_draft_head
from ..generation.execution.stateful_layers import stateful_layers
from ..modeling_recurrent import LORA_CORE_AND_ADAPTER, RecurrentDepthForCausalLM
from ..modeling_tidar import TiDARForCausalLM
from ..modeling_tidar.modeling_tidar import acceptance_of, write_adapter_code
from .training_arguments import FinetuneArguments

logger = logging.get_logger(__name__)
ON_TEXT = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters")  # of a `LoraConfig`
OF_EXPERTS = {
    "gate",
    "router",
    "shared_expert_gate",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "w1",
    "w2",
    "w3",
}


def gated_adapter_config(
    model: Any, rank: int = 32, alpha: int | None = None, target_modules: str | list[str] = "all-linear", **kwargs: Any
) -> LoraConfig:
    """A PEFT config of an adapter that leaves the autoregressive side unchanged, bit for bit.

    The adapter is an aLoRA (arXiv 2504.12397), which PEFT applies from the invocation token on. This token is the mask.
    Text contains no masks, so the adapter acts only in drafting. Merging is refused, since a merged adapter would
    always act.

    Args:
        model: a TiDAR model; its `tidar_config.mask_token_id` is the invocation token.
        rank: rank of every adapted matrix, 1 or more.
        alpha: the adapter is scaled by alpha / rank; default 2 * rank.
        target_modules: as in `LoraConfig`; default: every linear layer but the lm_head. Of a mixture of experts, only
            layers that PEFT can gate: those of the attention, and those that keep a state.
        kwargs: of `LoraConfig`.

    Raises:
        ValueError: `rank` is below 1, or a part of the adapter would act on text, or PEFT cannot gate it.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, but is {rank}.")
    refuse_layers_without_gate(model)
    acting = [name for name in ON_TEXT if kwargs.get(name) not in (None, "none")]
    if acting:
        raise ValueError(
            f"`{acting[0]}` must be left out of a gated adapter, but is {kwargs[acting[0]]!r}: such parts act on text "
            "too, and the adapter must leave the text alone. Train a LoRA of your own instead: `--mode joint`."
        )
    convolutions = {module.weight for module in model.modules() if isinstance(module, nn.Conv1d)}
    if any(parameter.ndim == 3 and parameter not in convolutions for parameter in model.parameters()):  # fused experts
        target_modules = layers_beside_experts(model, target_modules)
    elif target_modules == "all-linear" and is_mamba(model):
        layers = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
        target_modules = sorted({name.rsplit(".", 1)[-1] for name in layers} - {"out_proj"})
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=target_modules,
        alora_invocation_tokens=[model.config.tidar_config["mask_token_id"]],
        **kwargs,
    )


def refuse_layers_without_gate(model: Any) -> None:
    """Raises ValueError where a package (GPTQ, AWQ, HQQ) has replaced the linear layers: PEFT teaches no gate there."""
    layers = [module for module in model.base_model.modules() if hasattr(module, "in_features")]
    if layers and not any(isinstance(module, nn.Linear) or "lora_A" in dir(module) for module in layers):
        raise ValueError(
            f"A gated adapter cannot be taught on this {type(model).__name__}: PEFT has no gate for its "
            f"{type(layers[0]).__name__} layers. Teach it on the base without quantization, or quantized by "
            "bitsandbytes or torchao."
        )


def is_mamba(model: Any) -> bool:
    """Whether PEFT refuses `out_proj`, whose weight Mamba's kernels read."""
    return any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules())


def layers_beside_experts(model: Any, target_modules: str | list[str]) -> str | list[str]:
    """The target modules in a mixture of experts. PEFT takes most of `OF_EXPERTS` for the experts' fused weights, which
    it cannot gate."""
    if target_modules == "all-linear":
        layers = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
        names_of = {module: name for name, module in model.base_model.named_modules()}
        states = [f"{names_of[module]}." for module in stateful_layers(model)]
        # Other layers may read all tokens of a batch as one row, where no gate tells masks from text.
        kinds = ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", *states)
        names = {name.rsplit(".", 1)[-1] for name in layers if any(kind in name for kind in kinds)}
        return sorted(names - {"out_proj"} if is_mamba(model) else names)
    targets = [target_modules] if isinstance(target_modules, str) else [*target_modules]
    if refused := sorted(name for name in targets if name.rsplit(".", 1)[-1] in OF_EXPERTS):
        raise ValueError(
            f"`target_modules` must not name {', '.join(refused)} of {type(model).__name__}, experts or their router: "
            "PEFT cannot gate them. Leave `target_modules` out, or name layers of the attention."
        )
    return target_modules


def load_model(arguments: FinetuneArguments) -> Any:
    """The checkpoint to train, in bfloat16 if its weights stay frozen and the run uses bfloat16."""
    model_class: Any = RecurrentDepthForCausalLM if arguments.is_recurrent else TiDARForCausalLM
    options = {
        "attn_implementation": arguments.attn_implementation,
        "quantization_config": quantization_config(arguments),
    }
    return model_class.from_pretrained(
        arguments.model_path,
        dtype=torch.bfloat16 if arguments.bf16 and not arguments.trains_every_weight else torch.float32,
        **{name: value for name, value in options.items() if value},
    )


def quantization_config(arguments: FinetuneArguments) -> BitsAndBytesConfig | None:
    """The bitsandbytes config of the base, or None without quantization."""
    if arguments.load_in_8bit:
        # With a threshold, the tokens of a forward choose outliers together: masks would change the text.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if arguments.load_in_4bit:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return None


def with_adapter(model: Any, arguments: FinetuneArguments) -> Any:
    """The model to train: a PEFT model around the base, or the base itself."""
    if arguments.head_rank:
        add_trainable_head(model, arguments.from_adapter, arguments.head_rank)
        return model
    if arguments.from_adapter is not None:
        if Path(arguments.from_adapter, HEAD_FILE).is_file():
            logger.warning(
                f"The draft head of {arguments.from_adapter} is not loaded: it was trained for the drafts of that "
                "adapter. Train a new head for the result: `--mode head`."
            )
        return PeftModel.from_pretrained(model, arguments.from_adapter, is_trainable=True)
    if not arguments.lora_rank:
        return model
    if arguments.mode == "gated":
        return get_peft_model(model, gated_adapter_config(model, arguments.lora_rank))
    rank, targets = arguments.lora_rank, LORA_CORE_AND_ADAPTER if arguments.is_recurrent else "all-linear"
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=targets)
    return get_peft_model(model, config)


def add_trainable_head(model: Any, adapter: str | None, rank: int) -> None:
    """Loads the adapter whose drafts the head improves, and makes only the head trainable, in float32."""
    if adapter is not None:
        model.load_adapter(adapter)
    model.requires_grad_(False)
    head = draft_head_of(model) or new_draft_head(model, rank)
    head.float().requires_grad_(True)


def save_trained(trained: Any, trainer: Any, tokenizer: Any, arguments: FinetuneArguments) -> None:
    """Writes the result with its tokenizer. A gated adapter also gets the code for drafting.

    Every process must call this function, since sharded weights are gathered from all processes.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    folder = Path(arguments.output_dir)
    is_quantized = arguments.load_in_4bit or arguments.load_in_8bit
    if arguments.bf16 and not arguments.trains_every_weight and not is_quantized:
        trained.to(torch.bfloat16)
    trained.save_pretrained(folder, **({"state_dict": weights} if weights else {}))
    tokenizer.save_pretrained(folder)
    if arguments.mode == "gated":
        model = trained.get_base_model()
        write_adapter_code(folder, model.tidar_config, record=acceptance_of(model))
