"""What vLLM's Model Runner V2 asks of a drafting model besides its forward: inputs, requests, and a sampler.

The query of a decoding request, at consecutive positions and attended causally by any backend:

    t0 | d_1 .. d_b | m_1 .. m_n | fillers        t0 is decided, in all 2K tokens

t0 and the drafts are verified. The masks predict what follows d_b; where all drafts stand, they are the next draft.
Of other outcomes nothing is left, and the next step has masks only. n is as much as there is room for, and at most the
length of a block that was taught. A long draft leaves room for few masks, hence a short draft after it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .draft_head import DraftHead, lm_head_of
from .draft_sampler import DraftSampler
from .gated_layers import gate_layers
from .settings import DraftSettings

FILLER, MASK = -1, -2  # in vLLM's draft tokens; negative ones are never accepted


class DraftModelState(DefaultModelState):
    """
    Attributes:
        gate: [n] 1 at the masks of the coming forward.
        num_drafts: [slots] of each request, how many drafts its next step verifies. Masks stand right after them.
        only_masks: [2K - 1] the extra tokens of a request without drafts.
        draft_tokens: [slots, 2K - 1] vLLM's own table of extra tokens; None where nothing is sampled.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = DraftSettings.from_dict(vllm_config.model_config.hf_config.wavedraft_settings)
        self.settings = settings
        self.gate = torch.zeros(self.max_num_tokens, device=device)
        self.num_drafts = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.only_masks = torch.full((settings.num_extra,), FILLER, device=device)
        self.only_masks[: settings.num_masks] = MASK
        self.draft_tokens: Tensor | None = None
        self.head = None
        if settings.adapter:
            gate_layers(model, Path(settings.adapter), self.gate)
        if settings.draft_head:
            self.head = DraftHead(settings.draft_head, device, self.dtype)
            lm_head_of(model)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.num_drafts[req_index] = 0
        if self.draft_tokens is not None:
            self.draft_tokens[req_index] = self.only_masks

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Opens the gate at masks, and lets them read their row of the embedding table."""
        ids = input_batch.input_ids  # the buffer that the forward reads
        is_mask = ids == MASK
        self.gate[: len(ids)] = is_mask
        ids.masked_fill_(is_mask, self.settings.mask_embedding_id).clamp_(min=0)
        return super().prepare_inputs(input_batch, req_states)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        self.draft_tokens = sampler.req_states.draft_tokens
        return DraftSampler(sampler, self), None
