"""The adapter's arithmetic in a layer of vLLM, against a loop over parts and rows; and compiled."""

import torch
from torch import nn
from torch.nn import functional

from wavedraft_vllm.gated_layers import GatedMethod, _stacked


class Plain:
    """vLLM's own method of a layer without quantization."""

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)


class Layer(nn.Module):
    """A fused layer of parts of 6, 4 and 5 channels. The second has no adapter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("weight", torch.randn(15, 8))
        self.parts = [(torch.randn(2, 8), torch.randn(6, 2)), None, (torch.randn(2, 8), torch.randn(5, 2))]
        ups = [4 if part is None else part[1] for part in self.parts]
        self.register_buffer("draft_gate", torch.zeros(10))
        self.register_buffer("draft_down", torch.cat([part[0] for part in self.parts if part]))
        self.register_buffer("draft_up", _stacked(ups, 4))
        self.quant_method = GatedMethod(Plain())

    def forward(self, x):
        return self.quant_method.apply(self, x)

    def slowly(self, x):
        rows = []
        for place, row in enumerate(x):
            result = self.weight @ row
            parts = [torch.zeros(4) if part is None else part[1] @ (part[0] @ row) for part in self.parts]
            rows.append(result + torch.cat(parts) * self.draft_gate[place])
        return torch.stack(rows)


def test_a_fused_layer_adds_each_parts_own_correction_at_masks():
    layer, x = Layer(), torch.randn(7, 8)
    assert torch.equal(layer(x), functional.linear(x, layer.weight)), "with a closed gate the layer is the base layer"
    layer.draft_gate[:7] = torch.tensor([0.0, 1, 1, 0, 0, 1, 0])
    torch.testing.assert_close(layer(x), layer.slowly(x))
    assert torch.equal(layer(x)[0], functional.linear(x, layer.weight)[0])


def test_a_compiled_layer_reads_the_gate_of_each_step():
    """vLLM compiles whole models and drops guards: a gate that became a constant would open no more."""
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows, is_open in ((7, True), (5, False), (6, True)):
        x = torch.randn(num_rows, 8)
        layer.draft_gate.fill_(float(is_open))
        torch.testing.assert_close(compiled(x), layer.slowly(x))
