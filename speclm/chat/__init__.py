"""Chat with a `SpecModel`: whole characters are streamed, and only new tokens are read."""

from speclm.chat.chat import Answer, Chat
from speclm.chat.text_stream import Piece, RoundStreamer, TextDecoder

__all__ = ["Answer", "Chat", "Piece", "RoundStreamer", "TextDecoder"]
