"""The public surface: `SpecModel`, `patch`, and `Chat` for chats with one."""

from speclm.model.call import SpeculativeOutput
from speclm.model.chat import Answer, Chat
from speclm.model.patching import patch
from speclm.model.spec_model import SpecModel
from speclm.model.text_stream import Piece, RoundStreamer, TextDecoder

__all__ = [
    "Answer",
    "Chat",
    "Piece",
    "RoundStreamer",
    "SpecModel",
    "SpeculativeOutput",
    "TextDecoder",
    "patch",
]
