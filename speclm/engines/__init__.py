"""Engines, which run the stages of a round: compiled, or as graphs."""

from speclm.engines.compiled import CompileEngine
from speclm.engines.engine import Engine, Stage
from speclm.engines.graph import Capture, Captured, GraphEngine
from speclm.engines.runner import StageRunner, agree

__all__ = [
    "Capture",
    "Captured",
    "CompileEngine",
    "Engine",
    "GraphEngine",
    "Stage",
    "StageRunner",
    "agree",
]
