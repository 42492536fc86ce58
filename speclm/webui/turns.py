"""A turn of a conversation: its settings, its counters and its comparison."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from speclm.bench.divergence import first_difference
from speclm.chat import Answer, Piece
from speclm.config import MAX_NODES, require_count, require_in_range
from speclm.stats import SpeculationStats
from speclm.tree.plan import TreePlan

_MAX_INT = 2**31 - 1
_MAX_DEPTH = 6  # of trees whose size the user chooses


@dataclass(frozen=True, slots=True)
class Settings:
    """How a question is answered.

    Args:
        method: Name of the method that drafts.
        system: System message; empty for none.
        temperature: 0 decodes greedily.
        top_p: Top-p of sampling.
        top_k: Top-k of sampling; 0 for no limit.
        max_new_tokens: Maximum tokens of the answer.
        tree: Maximum draft tokens per round, ``"auto"``, or None for the method's own trees.
        seed: Seed of the first answer; each later answer has the next one.
        compares: Whether the question is answered by regular generation too.

    Raises:
        OptionError: If a value is of another type or out of range.
    """

    method: str
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    tree: int | Literal["auto"] | None = None
    seed: int = 0
    compares: bool = False

    def __post_init__(self) -> None:
        require_in_range("temperature", self.temperature, low=0.0, high=100.0)
        require_in_range("top_p", self.top_p, low=0.0, high=1.0)
        require_count("top_k", self.top_k, low=0, high=_MAX_INT)
        require_count("max_new_tokens", self.max_new_tokens, low=1, high=_MAX_INT)
        require_count("seed", self.seed, low=0, high=_MAX_INT)
        if self.tree not in (None, "auto"):
            require_count("tree", self.tree, low=1, high=MAX_NODES - 1)

    def arguments(self) -> dict[str, Any]:
        """Return what ``generate()`` takes."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature > 0:
            found["do_sample"] = True
            found |= {"temperature": float(self.temperature), "top_p": float(self.top_p)}
            found["top_k"] = self.top_k
        if isinstance(self.tree, int):
            depth = min(self.tree, _MAX_DEPTH)
            found["tree"] = TreePlan(depth=depth, num_draft_tokens=self.tree)
        elif self.tree is not None:
            found["tree"] = self.tree
        return found


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of an answer, up to some moment.

    Args:
        num_tokens: New tokens.
        seconds: Time since the answer began, prompt included.
        num_rounds: Target forwards after the prompt's own.
        tau: Tokens per target forward: 1 + mean accepted length, prefill excluded.
        acceptance_by_depth: Share of drafts reaching depth 1, 2, ... whose token was kept.
    """

    num_tokens: int = 0
    seconds: float = 0.0
    num_rounds: int = 0
    tau: float = 1.0
    acceptance_by_depth: tuple[float, ...] = ()

    @classmethod
    def of(cls, stats: SpeculationStats, *, num_tokens: int, seconds: float) -> "Progress":
        """Summarise the counters of a call."""
        shares = tuple(stats.acceptance_by_depth)
        return cls(num_tokens, seconds, stats.rounds, stats.tau, shares)

    @classmethod
    def of_answer(cls, answer: Answer) -> "Progress":
        """Summarise a complete answer."""
        return cls.of(answer.speculation, num_tokens=len(answer.tokens), seconds=answer.seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the time; 0.0 before the first."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """An answer compared with that of regular generation.

    Args:
        num_equal: Tokens before the first that differs.
        is_identical: Whether all tokens are equal.
        speed_up: Tokens per second over those of regular generation; None if that had to read more
            of the conversation.
    """

    num_equal: int
    is_identical: bool
    speed_up: float | None

    @classmethod
    def of(cls, answer: Answer, regular: Answer) -> "Comparison":
        """Compare two answers to one question."""
        first = first_difference(regular.tokens, answer.tokens)
        speed_up = None
        if answer.num_reused_tokens == regular.num_reused_tokens and regular.tokens:
            rates = [len(one.tokens) / one.seconds for one in (answer, regular)]
            speed_up = rates[0] / rates[1]
        return cls(len(answer.tokens) if first is None else first, first is None, speed_up)


@dataclass(slots=True)
class Turn:
    """A question and its answers, which grow while they are generated.

    Args:
        question: The user's message.
        settings: How it is answered.
        seed: Seed of this answer.
        state: What is done at present.
        pieces: Text of the answer so far.
        progress: Counters of the answer.
        answer: The answer, once it is complete.
        regular_pieces: Text of regular generation so far.
        regular_progress: Counters of regular generation.
        regular: Its answer, once it is complete.
        comparison: Both compared; None if either was stopped.
    """

    question: str
    settings: Settings
    seed: int
    state: Literal["waiting", "answering", "comparing", "done"] = "waiting"
    pieces: list[Piece] = field(default_factory=list)
    progress: Progress = Progress()
    answer: Answer | None = None
    regular_pieces: list[Piece] = field(default_factory=list)
    regular_progress: Progress = Progress()
    regular: Answer | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return question, answers and counters, ready for JSON."""
        assert self.answer is not None, "only complete turns are kept"
        regular = None
        if self.regular is not None:
            regular = {**_summary(self.regular), "comparison": None}
            if self.comparison is not None:
                regular["comparison"] = asdict(self.comparison)
        return {
            "question": self.question,
            "settings": {**asdict(self.settings), "seed": self.seed},
            **_summary(self.answer),
            "pieces": [
                {"text": piece.text, "origin": piece.origin, "round": piece.round}
                | ({"depth": piece.depth} if piece.depth else {})
                for piece in self.pieces
            ],
            "statistics": self.answer.speculation.to_dict(),
            "regular": regular,
        }


def _summary(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "token_ids": answer.tokens,
        "finish": answer.finish,
        "seconds": answer.seconds,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_reused_tokens": answer.num_reused_tokens,
    }
