"""A TiDAR model: what its checkpoint is, its masks, and its forward (arXiv 2511.08923)."""

from .auto_tidar import TiDARForCausalLM
from .configuration_tidar import TiDARConfig
from .objective_tidar import DraftObjective, TiDAROutput

__all__ = ["DraftObjective", "TiDARConfig", "TiDARForCausalLM", "TiDAROutput"]
