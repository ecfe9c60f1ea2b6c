"""A gated adapter: a stock PEFT LoRA that acts at mask positions only."""

from typing import Any

from peft import LoraConfig, TaskType


def gated_adapter_config(
    model: Any, rank: int = 32, alpha: int | None = None, target_modules: str | list[str] = "all-linear", **kwargs: Any
) -> LoraConfig:
    """A PEFT config whose adapter leaves the autoregressive side bit for bit alone.

    It is an aLoRA (arXiv 2504.12397): PEFT applies it from the invocation token on, and that token is the mask.
    Text holds no masks, so outside of drafting it is never on. It refuses to merge: merged, it would act everywhere.

    Args:
        model: a TiDAR model; its `tidar_config.mask_token_id` is the invocation token.
        rank: of every adapted matrix; 1 or more.
        alpha: the adapter is scaled by alpha / rank; by default 2 * rank.
        target_modules: as in `LoraConfig`; by default every linear layer but the lm_head.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, but is {rank}.")
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=target_modules,
        alora_invocation_tokens=[model.config.tidar_config["mask_token_id"]],
        **kwargs,
    )
