"""When masks ride along, and how drafts are counted."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from .settings import DraftSettings


class DraftScheduler(AsyncScheduler):
    """vLLM's scheduler; each decoding request brings its drafts and masks, while the batch is small.

    The worker knows which tokens these are. Here they are placeholders, in synchronous scheduling too.
    """

    def __init__(self, vllm_config, *args, **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self.settings = DraftSettings.from_dict(vllm_config.model_config.hf_config.wavedraft_settings)
        num_sizes = self.scheduler_config.max_num_seqs + 1
        drafting = self.settings.max_batch
        # vLLM's table for drafts that depend on the batch: extra tokens by the number of requests in a step.
        self.dynamic_sd_lookup = [self.num_spec_tokens if size <= drafting else 0 for size in range(num_sizes)]

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            if request.use_structured_output:  # its grammar would have to see the drafts, which are in the worker
                request.spec_token_ids = []

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Counts the places of the longest draft: a mask is no rejected one."""
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            min(num_draft_tokens, self.settings.longest_draft),
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
