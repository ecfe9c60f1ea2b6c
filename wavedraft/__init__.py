"""Language models that think ahead in parallel and still say exactly what they would have said."""

from . import supported_versions as supported_versions  # first: it says what others would fail of
from .conversion import Conversion, convert, push, to_ar
from .modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM
from .modeling_tidar import DraftObjective, TiDARConfig, TiDARForCausalLM, TiDAROutput

__all__ = [
    "Conversion",
    "DraftObjective",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "TiDARConfig",
    "TiDARForCausalLM",
    "TiDAROutput",
    "convert",
    "push",
    "to_ar",
]
