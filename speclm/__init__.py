"""Exact speculative decoding for Hugging Face models: the tokens of `generate`, faster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from speclm._version import __version__
from speclm.errors import SpeclmError

if TYPE_CHECKING:
    from speclm.model import SpecModel, SpeculativeOutput, patch
    from speclm.stats import SpeculationStats

__all__ = [
    "SpecModel",
    "SpeclmError",
    "SpeculationStats",
    "SpeculativeOutput",
    "__version__",
    "patch",
]

# Imported at first use: importing PyTorch and Transformers takes seconds, which `speclm --help` and
# a look at the version do not need.
_MODULES = {
    "SpecModel": "speclm.model",
    "SpeculationStats": "speclm.stats",
    "SpeculativeOutput": "speclm.model",
    "patch": "speclm.model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
