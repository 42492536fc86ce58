"""`Session`: a conversation whose answers are watched while they are generated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from speclm._version import __version__
from speclm.bench.divergence import first_difference
from speclm.chat import Answer, Chat, Piece
from speclm.config import MAX_NODES, require_count, require_in_range, require_unicode
from speclm.errors import BusyError, OptionError, PromptError, UnknownNameError
from speclm.model import SpecModel
from speclm.stats import SpeculationStats
from speclm.tree.plan import TreePlan

UPDATE_SECONDS = 0.05
"""Time between two updates of an answer."""

_MAX_INT = 2**31 - 1
_MAX_DEPTH = 6  # of trees whose size the user chooses
_POLL_SECONDS = 0.1


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
            sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            found |= {"do_sample": True, **sampling}
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


class Methods:
    """The methods that conversations on one base may choose from; one answer at a time."""

    def __init__(
        self,
        loaders: Mapping[str, Callable[[], SpecModel]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Offer methods.

        Args:
            loaders: What loads each method with the base, by name; called when it is first used.
            tokenizer: The base's, with a chat template.

        Raises:
            OptionError: If there is no method, or the tokenizer has no chat template.
        """
        if not loaders:
            raise OptionError("found no method, expected at least one; pass a loader")
        self._loaders = dict(loaders)
        self._tokenizer = tokenizer
        self._loaded: dict[str, SpecModel] = {}
        self.lock = Lock()  # held during an answer: there is one generator of random numbers
        self.new_chat()

    @property
    def names(self) -> list[str]:
        """Names of the methods, the default first."""
        return list(self._loaders)

    def load(self, name: str) -> SpecModel:
        """Return the model with a method.

        Raises:
            UnknownNameError: If there is no such method.
        """
        if name not in self._loaders:
            raise UnknownNameError(
                f"method is {name!r}, expected one of {self.names!r}; choose one of them"
            )
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]

    def new_chat(self) -> Chat:
        """Begin a conversation with the default method.

        Raises:
            OptionError: If the tokenizer has no chat template.
        """
        return Chat(self.load(self.names[0]), self._tokenizer)

    def warm_up(self, name: str) -> None:
        """Decode a few tokens with a method and without, as the first call of each is slow."""
        spec = self.load(name)
        chat = Chat(spec, self._tokenizer, options={"max_new_tokens": 8, "do_sample": False})
        chat.ask("a")
        chat.answer_regularly()


class Session:
    """A conversation whose answers are watched while they are generated.

    Only one answer of all sessions of a base is generated at a time; others wait.

    Example:
        ```python
        session = Session(methods)
        for turn in session.ask("How many singers are there?", Settings(methods.names[0])):
            print(turn.progress.tokens_per_second)
        ```
    """

    def __init__(self, methods: Methods) -> None:
        """Begin a conversation."""
        self.turns: list[Turn] = []
        self._methods = methods
        self._chat = methods.new_chat()
        self._stopping = Event()
        self._thread: Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being generated."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, question: str, settings: Settings) -> Iterator[Turn]:
        """Answer a question, and yield its turn about every `UPDATE_SECONDS` until it is complete.

        A caller that does not wait for the end stops the answer, which remains as far as it is.
        After an error, the conversation is as before the question.

        Raises:
            PromptError: If the question is empty, or the conversation too long for the model.
            OptionError: If a message is not Unicode text.
            UnknownNameError: If there is no such method.
            BusyError: If an answer is being generated.
        """
        if not question.strip():
            raise PromptError("the question is empty, expected some text; write one")
        require_unicode("the question", question)
        if self.is_busy:
            raise BusyError("an answer is being generated; stop it, or wait for its end")
        turn = Turn(question, settings, settings.seed + len(self.turns))
        errors: list[BaseException] = []
        self._stopping.clear()
        thread = Thread(target=self._run, args=(turn, errors), daemon=True, name="speclm-answer")
        self._thread = thread
        thread.start()
        try:
            while thread.is_alive():
                yield turn
                thread.join(UPDATE_SECONDS)
        finally:
            if thread.is_alive():
                self.stop()
        if errors:
            raise errors[0]
        yield turn

    def stop(self) -> None:
        """End the answer that is being generated; its text so far stays in the conversation."""
        self._stopping.set()
        self._chat.stop()

    def reset(self) -> None:
        """Begin a new conversation.

        Raises:
            BusyError: If an answer is being generated.
        """
        if self.is_busy:
            raise BusyError("an answer is being generated; stop it first")
        self.turns.clear()
        self._chat.reset()

    def export(self) -> dict[str, Any]:
        """Return the conversation with all counters, ready for JSON.

        ``messages`` is a row of training data.

        Raises:
            OptionError: If there is no answer yet.
        """
        if not self.turns:
            raise OptionError("there is no answer to export yet; ask something first")
        chat = self._chat
        return {
            "speclm": __version__,
            "base": str(chat.spec.config.name_or_path) or chat.spec.config.model_type,
            "messages": chat.messages,
            "statistics": chat.speculation.to_dict(),
            "turns": [turn.to_dict() for turn in self.turns],
        }

    def _run(self, turn: Turn, errors: list[BaseException]) -> None:
        """Generate the answers of a turn; what is raised is left to the caller's thread."""
        lock = self._methods.lock
        while not lock.acquire(timeout=_POLL_SECONDS):
            if self._stopping.is_set():
                errors.append(BusyError("stopped before the model was free; ask again"))
                return
        try:
            self._answer(turn)
        except BaseException as error:  # noqa: BLE001 - raised again where the turn is read
            errors.append(error)
        finally:
            lock.release()

    def _answer(self, turn: Turn) -> None:
        chat, settings = self._chat, turn.settings
        chat.spec = self._methods.load(settings.method)
        chat.system = settings.system or None
        turn.state = "answering"
        watch = self._watch(turn.pieces, lambda progress: setattr(turn, "progress", progress))
        torch.manual_seed(turn.seed)
        answer = chat.ask(
            turn.question, on_piece=watch, marks_drafted=True, options=settings.arguments()
        )
        turn.answer, turn.progress = answer, _final(answer)
        self.turns.append(turn)
        if settings.compares and answer.finish != "stopped":
            turn.state = "comparing"
            watch = self._watch(
                turn.regular_pieces, lambda progress: setattr(turn, "regular_progress", progress)
            )
            torch.manual_seed(turn.seed)
            regular = chat.answer_regularly(on_piece=watch)
            turn.regular, turn.regular_progress = regular, _final(regular)
            if regular.finish != "stopped":
                turn.comparison = Comparison.of(answer, regular)
        turn.state = "done"

    def _watch(
        self, pieces: list[Piece], report: Callable[[Progress], object]
    ) -> Callable[[Piece], None]:
        """Return what takes the pieces of an answer that begins now."""
        start = perf_counter()
        last = start

        def take(piece: Piece) -> None:
            nonlocal last
            pieces.append(piece)
            if self._stopping.is_set():
                self._chat.stop()
            now = perf_counter()
            if now - last >= UPDATE_SECONDS:
                last = now
                stats = self._chat.spec.last_speculation if piece.round else None
                report(
                    Progress.of(
                        stats or SpeculationStats(),
                        num_tokens=stats.total.num_tokens if stats else len(pieces),
                        seconds=now - start,
                    )
                )

        return take


def _final(answer: Answer) -> Progress:
    return Progress.of(answer.speculation, num_tokens=len(answer.tokens), seconds=answer.seconds)
