"""Products of bfloat16 for a CPU that has none of its own: a weight is read once for several rows, not once for each.

PyTorch's own take 8 rows there one after another. These sum up in the same order, so that on a CPU with AVX2 they are
PyTorch's to the bit (of D channels, a multiple of 64; other D are filled up with zeros, and may round otherwise).
"""

import torch
from torch import nn

from .bfloat16_kernel import Kernel, bfloat16_kernel

NUM_PARTS = 64  # sums that are kept apart for each output: channel d goes to part d % 64


def known_kernel() -> Kernel:
    """The compiled functions, where it is known that there are some."""
    found = bfloat16_kernel()
    assert not isinstance(found, str), found
    return found


def packed(matrix: torch.Tensor, num_parts: int) -> torch.Tensor:
    """A matrix [E, D] in bfloat16 as sums of P parts read it: [E / 16, P, D / P, 8, 2], filled up with zeros.

    The parts stand in the order of the tournament: the bits of a part's number are those of its place, reversed.
    """
    num_bits = num_parts.bit_length() - 1
    order = [int(f"{place:0{num_bits}b}"[::-1], 2) for place in range(num_parts)]
    rows, columns = matrix.shape
    filled = nn.functional.pad(matrix.detach().to(torch.bfloat16), (0, -columns % num_parts, 0, -rows % 16))
    parts = filled.view(-1, 2, 8, filled.shape[1] // num_parts, num_parts)[..., order]
    return parts.permute(0, 4, 3, 2, 1).contiguous()


class LowRank:
    """An adapter's matrices [D, r] and [r, E], as the product reads them; `addresses` are what it is handed."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor):
        self.rank = down.shape[1] + -down.shape[1] % 16
        self.down = packed(down.t(), NUM_PARTS)
        self.up = packed(nn.functional.pad(up, (0, 0, 0, self.rank - up.shape[0])).t(), 1)
        self.addresses = self.down.data_ptr(), self.up.data_ptr()

    def make_known(self, down: torch.Tensor) -> None:
        """Tells compiled layers that these are the copies of an adapter, by its first matrix."""
        known_kernel().remember_packed(down.data_ptr(), *self.addresses, self.rank, None)


class WidenedWeight:
    """A copy of a bfloat16 weight [E, D] in the order the product reads it in."""

    def __init__(self, weight: torch.Tensor):
        self.num_outputs, self.num_channels = weight.shape
        self.packed = packed(weight, NUM_PARTS)
        self.address = self.packed.data_ptr()
        self.product = known_kernel().bfloat16_product

    def make_known(self, weight: torch.Tensor) -> None:
        """Tells compiled layers that this is the copy of a weight."""
        known_kernel().remember_packed(weight.data_ptr(), self.address, None, self.num_outputs, None)

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., D] -> [..., E]; a row's result does not depend on the others."""
        return self._times(x, bias, 1, x.numel() // self.num_channels, (None, None), 0, 0)

    def adapted_times(
        self, x: torch.Tensor, bias: torch.Tensor | None, adapter: LowRank, num_masks: int
    ) -> torch.Tensor:
        """x [B, Q, D] -> [B, Q, E]; the adapter acts on the last `num_masks` of each Q rows."""
        batch_size, num_rows, _ = x.shape
        return self._times(x, bias, batch_size, num_rows, adapter.addresses, num_masks, adapter.rank)

    def _times(self, x, bias, batch_size, num_rows, adapter, num_masks, rank):  # type: ignore[no-untyped-def]
        result = torch.empty(*x.shape[:-1], self.num_outputs, dtype=torch.bfloat16)
        x = x.contiguous()
        addend = None if bias is None else bias.data_ptr()
        sizes = batch_size, num_rows, self.num_channels, self.num_outputs
        self.product(x.data_ptr(), self.address, addend, result.data_ptr(), *sizes, *adapter, num_masks, rank)
        return result
