"""What vLLM asks of a model's config before it builds an engine: ours is checked here, and turns drafting on."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import check_vllm_version
from .settings import DraftSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.wavedraft")  # vLLM shows what its own names log
SCHEDULER = "wavedraft_vllm.scheduler.DraftScheduler"


class DraftingModelConfig(VerifyAndUpdateConfig):
    """The hook of our architectures."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Reads `hf_config.wavedraft`, refuses what cannot work, and reserves a request's further query tokens.

        Raises:
            ValueError: one thing that the user can mend.
        """
        check_vllm_version()
        from vllm.config.diffusion import DiffusionConfig

        model_config = vllm_config.model_config
        config = model_config.hf_config
        given = getattr(config, "wavedraft", None) or {}
        settings = DraftSettings.of(given, model_config.hf_text_config, model_config.model)
        refuse_what_cannot_draft(vllm_config)
        config.wavedraft_settings = settings.to_dict()
        # vLLM's name for query tokens that a request brings along without a speculator.
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=settings.num_extra)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        say_how_it_drafts(settings)


def refuse_what_cannot_draft(vllm_config: "VllmConfig") -> None:
    """
    Raises:
        ValueError: vLLM was asked for something that drafts do not go with.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    reasons = {
        "--speculative-config: vLLM drafts by one way at a time": vllm_config.speculative_config is not None,
        "--diffusion-config: the plugin sets it itself": vllm_config.diffusion_config is not None,
        "--scheduler-cls: the plugin has a scheduler of its own": scheduler.scheduler_cls not in (None, SCHEDULER),
        "--pipeline-parallel-size above 1, which is untried": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1, which is untried": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1, which is untried": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "batch-sharded sampling, which shows the sampler only a part of the states": bool(
            getattr(parallel, "enable_batch_sharded_sampling", False)
        ),
        "--enable-dbo or --ubatch-size above 1: half a step would read the gate of the other": parallel.use_ubatching,
        "--enable-prompt-embeds: masks are tokens": vllm_config.model_config.enable_prompt_embeds,
        "--enable-trace-replay: a text that is given needs no drafts": vllm_config.model_config.enable_trace_replay,
        "--enable-lora: adapters of your own beside the drafting one are untried on GPUs": (
            vllm_config.lora_config is not None
        ),
        "a runner other than generate": vllm_config.model_config.runner_type != "generate",
    }
    if refused := [reason for reason, is_given in reasons.items() if is_given]:
        raise ValueError(f"wavedraft-vllm does not go with {'; nor with '.join(refused)}. Leave it out.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "wavedraft-vllm needs vLLM's Model Runner V2, but this engine would use V1. Leave VLLM_USE_V2_MODEL_RUNNER "
            "out, or set it to 1; on a machine without Triton, V2 does not run."
        )


def say_how_it_drafts(settings: DraftSettings) -> None:
    """Logs the settings, and what a checkpoint loses here."""
    logger.info(
        "wavedraft: drafting at most %d tokens a step, keeping those above a confidence of %.2f, in steps of at most "
        "%d requests.",
        settings.longest_draft,
        settings.keep,
        settings.max_batch,
    )
    if settings.block_attention != "causal":
        logger.info(
            "wavedraft: this checkpoint was taught with masks that see each other in both directions. Here each sees "
            "those before it, and drafts are a little worse (some 2% fewer tokens a step with the shipped adapter)."
        )
