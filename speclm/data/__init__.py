"""Training data for heads: convert what others publish, and let the base answer it itself.

Not imported by ``import speclm``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from speclm.data.conversion import convert
from speclm.data.dialogues import DistillSettings
from speclm.data.report import ConversionReport, Outcome
from speclm.data.row_plan import Shard
from speclm.data.server import ServerSource

if TYPE_CHECKING:
    from speclm.data.distillation import DistillReport, ModelSource, distill

__all__ = [
    "ConversionReport",
    "DistillReport",
    "DistillSettings",
    "ModelSource",
    "Outcome",
    "ServerSource",
    "Shard",
    "convert",
    "distill",
]

# Imported at first use: they import PyTorch and Transformers, which a conversion does not need.
_LAZY = ("DistillReport", "ModelSource", "distill")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("speclm.data.distillation")
    globals().update({lazy: getattr(module, lazy) for lazy in _LAZY})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
