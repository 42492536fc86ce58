"""`Session`: a conversation whose answers are watched while they are generated."""

from collections.abc import Callable, Iterator, Mapping
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from speclm._version import __version__
from speclm.chat import Answer, Chat, Piece
from speclm.config import require_unicode
from speclm.errors import BusyError, OptionError, PromptError, UnknownNameError
from speclm.model import SpecModel
from speclm.stats import SpeculationStats
from speclm.webui.turns import Comparison, Progress, Settings, Turn

UPDATE_SECONDS = 0.05
"""Time between two updates of an answer."""

_POLL_SECONDS = 0.1


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
        """Generate the answers of a turn; after an error, the conversation is as before it."""
        chat, settings = self._chat, turn.settings
        system = chat.system
        chat.spec = self._methods.load(settings.method)
        chat.system = settings.system or None
        try:
            answer = self._speculate(turn)
            if settings.compares and answer.finish != "stopped":
                self._compare(turn, answer)
        except BaseException:
            chat.system = system
            if turn.answer is not None:  # regular generation has failed
                self.turns.pop()
                chat.undo()
            raise
        turn.state = "done"

    def _speculate(self, turn: Turn) -> Answer:
        turn.state = "answering"
        watch = self._watch(turn.pieces, lambda progress: setattr(turn, "progress", progress))
        torch.manual_seed(turn.seed)
        answer = self._chat.ask(
            turn.question, on_piece=watch, marks_drafted=True, options=turn.settings.arguments()
        )
        turn.answer, turn.progress = answer, Progress.of_answer(answer)
        self.turns.append(turn)
        return answer

    def _compare(self, turn: Turn, answer: Answer) -> None:
        turn.state = "comparing"
        watch = self._watch(
            turn.regular_pieces, lambda progress: setattr(turn, "regular_progress", progress)
        )
        torch.manual_seed(turn.seed)
        regular = self._chat.answer_regularly(on_piece=watch)
        turn.regular, turn.regular_progress = regular, Progress.of_answer(regular)
        if regular.finish != "stopped":
            turn.comparison = Comparison.of(answer, regular)

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
