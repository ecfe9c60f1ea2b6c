"""Runs the steps of a decode: as they are, or as CUDA graphs of the same functions.

A unfinished rows of B.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..step_graph import Step, StepGraphs
from .choice import Greedy, Sampled
from .draft_network import DraftNetwork
from .draft_step import Decided, DraftInputs, Plan, StepState, step
from .mask_predictions import MaskPredictions


class StepRunner:
    """
    Args:
        graphs: where steps are captured. If their tokens are chosen on the host, the forward alone is captured.
    """

    def __init__(self, network: DraftNetwork, choice: Greedy | Sampled, graphs: StepGraphs | None = None):
        self.network = network
        self.choice = choice
        self.graphs = graphs

    def __call__(self, plan: Plan, state: StepState) -> tuple[StepState, Decided]:
        self.network.check_positions(state.next_positions)
        if self.graphs is None:
            return step(self.network, self.choice, plan, state)
        if not self.choice.is_pure:
            return step(CapturedNetwork(self.network, self.graphs), self.choice, plan, state)
        return self._captured(self.graphs, plan, state)

    def _captured(self, graphs: StepGraphs, plan: Plan, state: StepState) -> tuple[StepState, Decided]:
        choice = self.choice
        assert isinstance(choice, Greedy)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            after, decided = step(self.network, choice, plan, StepState(*tensors))
            return *after, decided.ids, decided.num_accepted

        about = plan, choice.scores.excluded_id, id(self.network.head), choice.trust
        *after, ids, num_accepted = captured(self.network, graphs, about, run, state)
        return StepState(*after), Decided(ids, num_accepted)


class CapturedNetwork:
    """The network, its step forwards captured."""

    def __init__(self, network: DraftNetwork, graphs: StepGraphs):
        self.network, self.graphs = network, graphs
        self.masks = network.masks

    def __call__(self, inputs: DraftInputs) -> tuple[Tensor, MaskPredictions]:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            left = iter(given)
            return self.network.read(inputs.mapped(lambda _: next(left)))

        about = "forward", inputs.num_clean, inputs.draft_length, inputs.num_read
        tensors = (x for x in inputs if isinstance(x, Tensor))
        return self.network.split(inputs, *captured(self.network, self.graphs, about, run, tensors))


def captured(
    network: DraftNetwork, graphs: StepGraphs, about: Any, run: Step, of_unfinished: Iterable[Tensor]
) -> Iterator[Tensor]:
    """What `run` makes of tensors of the unfinished rows. Its graph depends on their shapes, on whether the batch is
    padded, and on `about`."""
    cache = network.rows.cache
    inputs = tuple(cache.spread(tensor) for tensor in of_unfinished)
    key = tuple(tuple(tensor.shape) for tensor in inputs), network.rows.is_real_slot is not None, about
    return map(cache.gather, graphs.run(key, run, inputs, network.form))
