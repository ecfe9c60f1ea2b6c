"""Language models that think ahead in parallel and still say exactly what they would have said."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Conversion, convert, push, to_ar
    from .modeling_recurrent import RecurrentDepthConfig, RecurrentDepthForCausalLM
    from .modeling_tidar import DraftObjective, TiDARConfig, TiDARForCausalLM, TiDAROutput

__version__ = "0.1.0"
__all__ = [
    "Conversion",
    "DraftObjective",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "TiDARConfig",
    "TiDARForCausalLM",
    "TiDAROutput",
    "__version__",
    "convert",
    "push",
    "to_ar",
]
_PUBLIC_NAMES = {
    "conversion": ("Conversion", "convert", "push", "to_ar"),
    "generation": (),
    "hub": (),
    "modeling_recurrent": ("RecurrentDepthConfig", "RecurrentDepthForCausalLM"),
    "modeling_tidar": ("DraftObjective", "TiDARConfig", "TiDARForCausalLM", "TiDAROutput"),
    "training": (),
}  # by the package of ours that has them


def __getattr__(name: str) -> Any:
    """A public name, or one of our packages, imported when it is first asked for (PEP 562)."""
    for package, names in _PUBLIC_NAMES.items():
        if name == package:
            return import_module(f".{package}", __name__)
        if name in names:
            value = globals()[name] = getattr(import_module(f".{package}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PUBLIC_NAMES})


if "wavedraft_command" not in sys.modules:  # the command line answers --help without torch, and does this later
    from . import auto_classes as auto_classes
