"""The decode loop."""

from speclm.generation.delegation import NeedsPlainDecoding
from speclm.generation.loop import generate_tokens

__all__ = ["NeedsPlainDecoding", "generate_tokens"]
