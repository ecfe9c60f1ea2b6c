"""vLLM's own model classes, each with what drafts."""

from typing import Any

from torch import Tensor
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from . import check_vllm_version

check_vllm_version()


class Drafting:
    """Mixed into a model of vLLM, which is otherwise as it is.

    Attributes:
        sampled_states: [n, D] the last states whose logits were computed last.
    """

    sampled_states: Tensor | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        from .draft_state import DraftModelState

        return DraftModelState

    def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        self.sampled_states = hidden_states
        logits = super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]
        excluded_id = self.config.wavedraft_settings["excluded_id"]  # type: ignore[attr-defined]
        if logits is not None and excluded_id is not None:
            logits[:, excluded_id] = float("-inf")
        return logits


class WavedraftLlamaForCausalLM(Drafting, LlamaForCausalLM): ...


class WavedraftMistralForCausalLM(Drafting, MistralForCausalLM): ...


class WavedraftQwen2ForCausalLM(Drafting, Qwen2ForCausalLM): ...


class WavedraftQwen3ForCausalLM(Drafting, Qwen3ForCausalLM): ...


class WavedraftGemma3ForCausalLM(Drafting, Gemma3ForCausalLM): ...


class WavedraftQwen3MoeForCausalLM(Drafting, Qwen3MoeForCausalLM): ...
