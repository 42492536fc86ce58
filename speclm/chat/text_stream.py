"""Stream an answer as whole characters, and mark those that were drafted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from speclm.config import MAX_DEPTH
from speclm.errors import OptionError

Origin = Literal["drafted", "bonus", "regular"]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters that a token completed.

    Args:
        text: One or more characters.
        is_drafted: Whether the token is known to be a draft token.
        round: Number of its round, from 1; 0 if rounds are not reported.
        depth: Depth of a draft token in the draft tree, from 1; 0 for other tokens.
    """

    text: str
    is_drafted: bool
    round: int = 0
    depth: int = 0

    @property
    def origin(self) -> Origin:
        """Which part of a round the token is, or that it comes from regular generation."""
        if self.is_drafted:
            return "drafted"
        return "bonus" if self.round else "regular"


class TextDecoder:
    """Turns tokens, one by one, into the characters that they complete.

    A character may be spread over several tokens and is returned with the last one. Special tokens
    have no text. The cost of a token does not grow with the text.

    Example:
        ```python
        decoder = TextDecoder(tokenizer)
        text = "".join(decoder.push(token) for token in tokens)
        ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin a text."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # from the last returned piece on
        self._num_returned = 0

    def push(self, token: int) -> str:
        """Return the characters that `token` completes; "" if there are none."""
        self._tokens.append(token)
        # The last piece's tokens are decoded again: some tokenizers drop the space of a first word.
        before = self._decode(self._tokens[: self._num_returned])
        text = self._decode(self._tokens)
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._tokens = self._tokens[self._num_returned :]
        self._num_returned = len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        # Cleaned-up spaces would change text that was returned already.
        text: Any = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class RoundStreamer(BaseStreamer):
    """Passes on the text of one row as it is accepted, and marks drafted text.

    This is a Transformers streamer; it ignores the prompt, which comes first. A decoding loop with
    rounds calls `on_round` after the tokens of each round. To mark drafted text, tokens are held
    back until that call; without such calls the text is passed on unmarked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_piece: Callable[[Piece], object],
        *,
        marks_drafted: Callable[[], bool] = lambda: False,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: Decodes the tokens.
            on_piece: Receives the text.
            marks_drafted: Called at every token; returns whether to mark drafted text.
            skipped: Tokens without text, in addition to special ones.
        """
        self.num_rounds = 0
        self._decoder = TextDecoder(tokenizer)
        self._on_piece = on_piece
        self._marks_drafted = marks_drafted
        self._skipped = skipped
        self._is_prompt = True
        self._is_silent = False  # more tokens than a round can have came without a call
        self._held: list[int] = []

    @override
    def put(self, value: Int[Tensor, "..."]) -> None:
        if self._is_prompt:
            self._is_prompt = False
            if value.dim() == 2 and value.shape[0] != 1:
                raise OptionError(
                    f"a streamer shows one row, found a prompt of {value.shape[0]}; pass one row"
                )
            return
        self._held += value.reshape(-1).tolist()
        if len(self._held) > MAX_DEPTH + 1:
            self._is_silent = True
        if self._is_silent or not self._marks_drafted():
            self._flush()

    def on_round(self, accepted_length: int) -> None:
        """Pass on the tokens since the last call, which form a round.

        Args:
            accepted_length: Number of drafted tokens among them; these come first.
        """
        self.num_rounds += 1
        self._is_silent = False
        self._flush(num_drafted=accepted_length, round_number=self.num_rounds)

    @override
    def end(self) -> None:
        self._flush()

    def _flush(self, *, num_drafted: int = 0, round_number: int = 0) -> None:
        tokens, self._held = self._held, []
        for depth, token in enumerate(tokens, 1):
            if token not in self._skipped and (text := self._decoder.push(token)):
                is_drafted = depth <= num_drafted
                piece = Piece(text, is_drafted, round_number, depth if is_drafted else 0)
                self._on_piece(piece)
