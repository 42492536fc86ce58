"""The decode loop."""

from speclm.generation.delegation import NeedsPlainDecoding
from speclm.generation.loop import Generated, generate_tokens

__all__ = ["Generated", "NeedsPlainDecoding", "generate_tokens"]
