"""The decode loop."""

from speclm.generation.delegation import NeedsPlainDecoding
from speclm.generation.loop import Generated, generate_tokens
from speclm.generation.pausing import PauseMemory
from speclm.generation.tuning import TreeMemory

__all__ = ["Generated", "NeedsPlainDecoding", "PauseMemory", "TreeMemory", "generate_tokens"]
