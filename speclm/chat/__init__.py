"""Chats with a `SpecModel`, streamed by whole characters and read once."""

from speclm.chat.chat import Answer, Chat
from speclm.chat.text_stream import Piece, RoundStreamer, TextDecoder

__all__ = ["Answer", "Chat", "Piece", "RoundStreamer", "TextDecoder"]
