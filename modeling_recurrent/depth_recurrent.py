"""How deep a training forward goes: drawn anew each time, so that any depth comes to decode (arXiv 2502.05171)."""

import math

import torch

# For PEFT's `LoraConfig(target_modules=...)`: every linear layer of the core, and the adapter that feeds it.
LORA_CORE_AND_ADAPTER = (
    r".*\.(adapter|core_block\.\d+\.(attn|mlp)\.\w+)"  # Huginn and the retrofitted models
    r"|.*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # Ouro, whose core is all its layers
)


def sample_depth(mean_recurrence: int, generator: torch.Generator, sigma: float = 0.5) -> int:
    """1 + Poisson(rate), the rate log-normal with mean `mean_recurrence`: mostly less, at times far more.

    The generator stands on the CPU, so that drawing waits for no device.
    """
    mean = math.log(mean_recurrence) - sigma**2 / 2
    rate = torch.empty(1).log_normal_(mean, sigma, generator=generator)
    return 1 + int(torch.poisson(rate, generator=generator))


class DepthSampler:
    """The depths of one training run: the same sequence wherever the seed is the same, so that all ranks keep step.

    The global generators are neither read nor moved. To resume a run where it stopped, keep
    `generator.get_state()` beside the checkpoint.
    """

    def __init__(self, mean_recurrence: int, seed: int = 0):
        self.mean_recurrence = mean_recurrence
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> int:
        """Core steps of the next training forward."""
        return sample_depth(self.mean_recurrence, self.generator)
