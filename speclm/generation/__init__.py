"""The decode loop."""

from speclm.generation.delegation import NeedsPlainDecoding
from speclm.generation.loop import Generated, generate_tokens
from speclm.generation.pace import PaceMemory
from speclm.generation.tuning import TreeMemory

__all__ = ["Generated", "NeedsPlainDecoding", "PaceMemory", "TreeMemory", "generate_tokens"]
