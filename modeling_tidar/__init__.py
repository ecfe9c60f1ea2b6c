"""A TiDAR model: its config, masks, forward and losses (arXiv 2511.08923)."""

from .auto_tidar import TiDARForCausalLM
from .configuration_tidar import TiDARConfig
from .objective_tidar import DraftObjective, TiDAROutput

__all__ = ["DraftObjective", "TiDARConfig", "TiDARForCausalLM", "TiDAROutput"]
