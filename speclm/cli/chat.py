"""``speclm chat``: a conversation in the terminal."""

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import typer
from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from speclm.chat import Answer, Chat, Piece
from speclm.cli._console import printable
from speclm.cli._display import ACCEPTED_STYLE
from speclm.cli._models import load_with_heads
from speclm.cli._options import ChatOptions
from speclm.errors import OptionError, SpeclmError
from speclm.stats import SpeculationStats

COMMANDS = {
    "/accepted": "switch colours for tokens that were drafted and accepted",
    "/stats": "tau, accepted lengths, times and speed of the last answer and of all",
    "/system TEXT": "set the system message; without TEXT drop it",
    "/undo": "drop the last question and its answer",
    "/reset": "drop all turns",
    "/save FILE": "add the conversation to a file of JSON lines",
    "/help": "list the commands",
    "/quit": "end",
}
_FINISHES = {
    "length": "stopped at the bound of --max-new-tokens or of the model",
    "stopped": "stopped",
}


def chat(options: ChatOptions) -> None:
    """Hold a conversation; piped input is answered line by line."""
    if sys.stdin is None:
        raise OptionError("standard input is closed; open it, or use: speclm generate")
    is_terminal = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a wrong byte is no reason to end
    loaded = load_with_heads(options)
    conversation = Chat(
        loaded.spec, loaded.tokenizer, system=options.system, options=options.arguments()
    )
    torch.manual_seed(options.seed)
    # With None, rich decides, and respects NO_COLOR too.
    console = Console(force_terminal=None if is_terminal else False, highlight=False)
    loop = ChatLoop(
        conversation,
        console,
        Console(stderr=True, force_terminal=None if is_terminal else False, highlight=False),
        read_typed if is_terminal else read_piped,
        shows_accepted=options.show_accepted,
    )
    if is_terminal:
        proposer = type(loaded.spec.proposer).__name__ if loaded.spec.proposer else "no proposer"
        console.print(
            f"{loaded.base.config.model_type}, {proposer}. /help lists the commands, Ctrl-C stops "
            "an answer, Ctrl-D ends.",
            style="dim",
        )
    has_failed = loop.run()
    if has_failed and not is_terminal:
        raise typer.Exit(2)


def read_typed() -> str | None:
    """Return a line from the terminal, None at the end of input."""
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # drops the line, as shells do


def read_piped() -> str | None:
    """Return a line from standard input, None at its end."""
    return sys.stdin.readline() or None


class ChatLoop:
    """A conversation and the console that it is shown on."""

    def __init__(
        self,
        chat: Chat,
        console: Console,
        errors: Console,
        read: Callable[[], str | None],
        *,
        shows_accepted: bool = False,
    ) -> None:
        self._chat = chat
        self._console = console
        self._errors = errors
        self._read = read
        self._shows_accepted = shows_accepted

    def run(self) -> bool:
        """Process lines until input ends or the user quits; return whether any has failed."""
        has_failed = False
        while (line := self._read()) is not None:
            line = line.strip()
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.split()[0] == "/quit":
                        return has_failed
                    self._obey(line)
                elif line:
                    self._answer(line.removeprefix("/"))
            except SpeclmError as error:
                has_failed = True
                line = printable(f"error: {error}")
                self._errors.print(Text(line, style="red"), soft_wrap=True)
        if self._console.is_terminal:
            self._console.print()
        return has_failed

    def _answer(self, text: str) -> None:
        marks_drafted = self._shows_accepted and self._console.is_terminal
        try:
            with _interrupt_stops(self._chat):
                answer = self._chat.ask(text, on_piece=self._show, marks_drafted=marks_drafted)
        except KeyboardInterrupt:
            self._console.print()
            self._note("interrupted; the question and the partial answer are dropped")
            return
        self._console.print()
        if answer.finish in _FINISHES and self._console.is_terminal:
            self._note(_FINISHES[answer.finish])
        if marks_drafted and answer.num_marked_rounds == 0:
            self._note(_why_uncoloured(answer))

    def _show(self, piece: Piece) -> None:
        style = self._console.get_style(ACCEPTED_STYLE) if piece.is_drafted else None
        segment = Segment(printable(piece.text), style)
        # Segments are printed unchanged; text would have its tabs expanded.
        self._console.print(Segments([segment]), end="", soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def _obey(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        obey = {
            "/accepted": self._switch_accepted,
            "/stats": self._print_stats,
            "/system": lambda: self._set_system(value),
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": lambda: self._save(value),
            "/help": self._print_help,
        }.get(name)
        if obey is None:
            raise OptionError(
                f"{name!r} is not a command; /help lists them, and a text that begins with a "
                "slash is written with two"
            )
        obey()

    def _switch_accepted(self) -> None:
        self._shows_accepted = not self._shows_accepted
        if not self._shows_accepted:
            self._note("accepted tokens are no longer coloured")
        elif not self._console.is_terminal:
            self._note("accepted tokens are coloured in a terminal only, and this is not one")
        else:
            self._note("accepted tokens are coloured from the next answer on")
            answers = self._chat.answers
            if answers and answers[-1].speculation.fallbacks:
                self._note(_why_uncoloured(answers[-1]))

    def _print_stats(self) -> None:
        for line in describe(self._chat):
            self._console.print(line, markup=False, soft_wrap=True)

    def _set_system(self, text: str) -> None:
        self._chat.system = text or None
        self._note("system message set" if text else "system message dropped")

    def _undo(self) -> None:
        done = self._chat.undo()
        self._note("last turn dropped" if done else "there is no turn to drop")

    def _reset(self) -> None:
        self._chat.reset()
        self._note("all turns dropped")

    def _save(self, path: str) -> None:
        if not path:
            raise OptionError("/save expected a file name, found none; write /save FILE")
        try:
            file = Path(path).expanduser()
        except RuntimeError as error:
            raise OptionError(f"{path!r} names no home folder ({error}); write it out") from error
        self._chat.save(file)
        self._note(f"added to {path}")

    def _print_help(self) -> None:
        width = max(map(len, COMMANDS))
        for name, meaning in COMMANDS.items():
            self._console.print(f"{name:{width}}  {meaning}", markup=False, soft_wrap=True)


def _why_uncoloured(answer: Answer) -> str:
    if answer.speculation.fallbacks:
        reason = "; ".join(answer.speculation.fallbacks)
        return f"nothing to colour: the last answer was by regular generation ({reason})"
    return "nothing to colour: rounds were not reported while the last answer was generated"


@contextmanager
def _interrupt_stops(chat: Chat) -> Iterator[None]:
    """Let Ctrl-C stop the answer; a second one interrupts at once, as it does by default."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        chat.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(chat: Chat) -> Iterator[str]:
    """Yield lines about the last answer and the whole conversation."""
    answers = chat.answers
    if not answers:
        yield "nothing has been answered yet"
        return
    yield _speed("last answer", answers[-1:])
    yield from _speculation(answers[-1].speculation)
    if len(answers) > 1:
        yield _speed(f"{len(answers)} answers", answers)
        yield from _speculation(chat.speculation)


def _speed(name: str, answers: list[Answer]) -> str:
    num_tokens = sum(len(answer.tokens) for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    num_prompt = sum(answer.num_prompt_tokens for answer in answers)
    num_read = num_prompt - sum(answer.num_reused_tokens for answer in answers)
    return (
        f"{name}: {num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s; "
        f"{num_read} of {num_prompt} prompt tokens had to be read"
    )


def _speculation(stats: SpeculationStats) -> Iterator[str]:
    if stats.fallbacks:
        yield f"  regular generation: {'; '.join(stats.fallbacks)}"
    if not stats.rounds:
        return
    histogram = enumerate(stats.accepted_length_histogram)
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in stats.milliseconds_per_round.items())
    yield f"  tau {stats.tau:.2f} over {stats.rounds} rounds"
    yield f"  rounds by accepted length: {', '.join(f'{n}: {rounds}' for n, rounds in histogram)}"
    yield f"  ms per round: {phases}; prefill {1e3 * stats.seconds['prefill']:.2f} in total"
    if stats.pause_summary is not None:
        yield f"  {stats.pause_summary}"
