import io
import json
import signal
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from speclm import SpecModel
from speclm.chat import Chat, RoundStreamer
from speclm.cli import app
from speclm.cli.chat import COMMANDS, ChatLoop, read_typed
from speclm.errors import OptionError, UnknownNameError
from speclm.stats import Pause, RowStats, SpeculationStats
from speclm.testing import ScriptedProposer
from tests.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.models import build_model

GREEN = "\x1b[1;32m"


def piped(text, *arguments):
    """Run the command on the bundled models with lines from a pipe."""
    return CliRunner().invoke(
        app, ["chat", "--max-new-tokens", "4", *arguments], input=text, catch_exceptions=False
    )


def tiny_chat(**settings):
    settings = {"vocab_size": VOCAB_SIZE, "eos_token_id": None, **settings}
    base = build_model("llama", **settings)
    options = {"do_sample": False, "max_new_tokens": 4}
    return Chat(SpecModel.from_pretrained(base, None), byte_tokenizer(), options=options)


class Terminal:
    """A chat on a terminal that is only text, with lines typed in advance."""

    def __init__(self, *lines, chat=None, shows_accepted=False, **console):
        self.chat = chat or tiny_chat()
        self._out, self._err = io.StringIO(), io.StringIO()
        settings = {"force_terminal": True, "width": 100, "color_system": "standard", **console}
        rest = iter(lines)
        self.has_failed = ChatLoop(
            self.chat,
            Console(file=self._out, highlight=False, **settings),
            Console(file=self._err, highlight=False, **settings),
            lambda: next(rest, None),
            shows_accepted=shows_accepted,
        ).run()

    @property
    def output(self):
        return self._out.getvalue()

    @property
    def errors(self):
        return self._err.getvalue()


class ScriptedModel:
    """Stands where a `SpecModel` does, says a text in rounds, and reports them."""

    def __init__(self, chat, rounds):
        self._spec, self._rounds = chat.spec, rounds
        self.last_speculation = None
        chat.spec = self

    def __getattr__(self, name):
        return getattr(self._spec, name)

    def generate(self, *, streamer, **arguments):
        output = self._spec.generate(**arguments)  # for its form
        stats = SpeculationStats(rows=[RowStats()], rounds=len(self._rounds))
        self.last_speculation = stats
        assert isinstance(streamer, RoundStreamer)
        streamer.put(arguments["input_ids"])
        for text, accepted_length in self._rounds:
            for token in byte_tokenizer()(text)["input_ids"]:
                streamer.put(arguments["input_ids"].new_tensor([token]))
            streamer.on_round(accepted_length)
            stats.rows[0].add_round(accepted_length=accepted_length, depth=3, num_draft_tokens=3)
        streamer.end()
        return output


def test_piped_lines_are_answered_one_by_one_without_colours():
    result = piped("2 + 2?\n\nSELECT\n/stats\n", "--show-accepted")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "last answer: 4 tokens" in result.output
    assert "2 answers: 8 tokens" in result.output


def test_piped_answers_do_not_depend_on_the_proposer_and_take_a_system_message():
    options = ("--system", "Answer in SQL.", "--temperature", "0.9", "--top-k", "20", "--seed", "4")
    first = piped("How many singers?\n", *options)
    assert first.exit_code == 0
    assert first.output.strip()
    assert first.output == piped("How many singers?\n", *options, "--heads", "none").output


def test_unknown_base_is_named():
    with pytest.raises(UnknownNameError, match="'/no/such/model' is not a folder"):
        piped("a\n", "--base", "/no/such/model")


def test_a_failed_line_of_a_pipe_is_named_and_sets_the_exit_code():
    result = piped("/save\n/nope\n2 + 2?\n")
    assert result.exit_code == 2
    assert "error: /save expected a file name" in result.stderr
    assert "error: '/nope' is not a command; /help" in result.stderr
    assert result.stdout.strip()


def test_save_writes_the_messages(tmp_path):
    path = tmp_path / "talk.jsonl"
    result = piped(f"2 + 2?\n/save {path}\n/quit\nnever read\n")
    assert result.exit_code == 0
    (row,) = path.read_text().splitlines()
    messages = json.loads(row)["messages"]
    assert messages[0] == {"role": "user", "content": "2 + 2?"}
    assert messages[1]["content"] in result.output


def test_accepted_tokens_are_coloured_on_request():
    chat = tiny_chat()
    ScriptedModel(chat, [("ab好", 2), ("c", 0)])
    output = Terminal("x", "/accepted", "x", "/accepted", "x", chat=chat).output
    plain, coloured, again = (line for line in output.split("\n") if line.endswith("好c"))
    assert plain == again == "ab好c"
    assert coloured == f"{GREEN}a\x1b[0m{GREEN}b\x1b[0m好c"


def test_tokens_that_the_loop_accepts_are_coloured():
    chat = tiny_chat()
    letters = byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    others = sorted(set(range(VOCAB_SIZE)) - set(letters))
    chat._options |= {"max_new_tokens": 24, "suppress_tokens": others}
    plain = chat.ask("x")
    chat.reset()
    chat.spec.proposer = ScriptedProposer([plain.tokens], wrong_at=(2, 3, 9))
    output = Terminal("x", chat=chat, shows_accepted=True).output
    (answer,) = chat.answers
    (row,) = answer.speculation.rows
    assert answer.text == plain.text
    assert "nothing to colour" not in output
    # The bonus token of a round was not drafted.
    accepted = [row.prefill_tokens - 1, *row.accepted_lengths]
    is_drafted = [index < length for length in accepted for index in range(length + 1)]
    assert 0 < sum(accepted) < len(answer.text) == len(is_drafted)
    letters_seen = [
        f"{GREEN}{letter}\x1b[0m" if drafted else letter
        for letter, drafted in zip(answer.text, is_drafted, strict=True)
    ]
    assert output.startswith("".join(letters_seen) + "\n")


def test_stats_show_pauses():
    chat = tiny_chat()
    ScriptedModel(chat, [("ab", 1), ("c", 0)])
    chat.ask("x")
    stats = chat.answers[0].speculation
    stats.num_plain_rounds, stats.pauses = 1, [Pause(1, "round of 9.0 ms")]
    output = Terminal("/stats", chat=chat).output
    assert "1 of 2 rounds without a draft; paused, after round 1: round of 9.0 ms" in output


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    chat = tiny_chat()
    ScriptedModel(chat, [("ab", 1)])
    output = Terminal("x", chat=chat, shows_accepted=True).output
    assert "32m" not in output
    assert "b" in output


def test_what_cannot_be_coloured_is_shown_plainly_and_said():
    def silent(self, accepted_length):
        """Stand for a loop that reports no rounds."""

    chat = tiny_chat()
    ScriptedModel(chat, [("ab", 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundStreamer, "on_round", silent)
        output = Terminal("x", "y", chat=chat, shows_accepted=True).output
    assert output.count("ab") == 2
    assert GREEN not in output
    assert output.count("rounds were not reported") == 2


def test_an_answer_that_was_decoded_plainly_says_why_nothing_is_coloured():
    chat = tiny_chat()
    chat.spec.base.train()  # the reason
    output = Terminal("x", "/accepted", "y", chat=chat).output
    assert output.count("by regular generation (the model is in training mode") == 2


def test_stats_show_tau_lengths_and_phases():
    chat = tiny_chat()
    ScriptedModel(chat, [("ab", 1), ("c", 0), ("de", 1)])
    output = Terminal("/stats", "x", "/stats", "x", "/stats", chat=chat).output
    assert "nothing has been answered yet" in output
    assert "tau 1.67 over 3 rounds" in output
    assert "tau 1.67 over 6 rounds" in output
    assert "rounds by accepted length: 0: 1, 1: 2" in output
    assert all(phase in output for phase in ("draft", "verify", "accept", "commit", "prefill"))
    assert "tokens/s" in output


def test_control_characters_of_the_model_do_not_reach_the_terminal():
    chat = tiny_chat()
    ScriptedModel(chat, [("a\x1b[31m\x07\tb", 0)])
    assert "a[31m\tb" in Terminal("x", chat=chat, shows_accepted=True).output


def test_interrupt_stops_the_answer_and_the_conversation_goes_on(monkeypatch):
    chat = tiny_chat()
    chat._options["max_new_tokens"] = 300
    show, before = ChatLoop._show, signal.getsignal(signal.SIGINT)

    def interrupted(self, piece):
        signal.raise_signal(signal.SIGINT)
        show(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(ChatLoop, "_show", interrupted)
        terminal = Terminal("x", chat=chat)
    assert "stopped" in terminal.output
    assert signal.getsignal(signal.SIGINT) is before
    assert [answer.finish for answer in chat.answers] == ["stopped"]
    chat._options["max_new_tokens"] = 2
    Terminal("y", chat=chat)
    assert len(chat.answers) == 2


def test_a_second_interrupt_drops_the_answer(monkeypatch):
    def interrupted(self, piece):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ChatLoop, "_show", interrupted)
    terminal = Terminal("x")
    assert "interrupted" in terminal.output
    assert terminal.chat.messages == []
    assert not terminal.has_failed


def test_a_conversation_that_grows_too_long_can_be_reset():
    terminal = Terminal("a", "b" * 60, "/reset", "c", chat=tiny_chat(max_position_embeddings=50))
    assert terminal.has_failed
    assert "the model has 50 positions; begin anew with /reset" in terminal.errors
    assert next(message["content"] for message in terminal.chat.messages) == "c"


def test_turns_and_system_message_are_changed_by_commands():
    terminal = Terminal("/undo", "/system be brief", "a", "b", "/undo", "//c")
    assert "there is no turn to drop" in terminal.output
    contents = [m["content"] for m in terminal.chat.messages if m["role"] != "assistant"]
    assert contents == ["be brief", "a", "/c"]
    dropped = Terminal("/system", chat=terminal.chat)
    assert "system message dropped" in dropped.output
    assert terminal.chat.system is None


def test_help_lists_the_commands_and_each_is_known():
    output = Terminal("/help").output
    assert all(name in output for name in COMMANDS)
    lines = [name.split()[0] for name in COMMANDS]
    assert "is not a command" not in Terminal(*lines).errors


def test_a_bound_that_ends_an_answer_is_said():
    assert "--max-new-tokens" in Terminal("a").output


def test_typed_lines_end_with_the_input_and_outlive_an_interrupt(monkeypatch, capsys):
    def typed(*answers):
        rest = iter(answers)

        def read(prompt):
            value = next(rest)
            if isinstance(value, type):
                raise value
            return value

        monkeypatch.setattr("builtins.input", read)
        return read_typed()

    assert typed("a") == "a"
    assert typed(KeyboardInterrupt, "b") == "b"
    assert capsys.readouterr().out == "\n"
    assert typed(EOFError) is None


def test_bad_names_of_files_are_named(tmp_path):
    terminal = Terminal("a", "/save a\0b", "/save ~nobody-of-that-name/x", f"/save {tmp_path}")
    assert terminal.errors.count("error:") == 3
    assert "cannot be written (embedded null byte)" in terminal.errors
    assert "names no home folder" in terminal.errors
    assert "found a folder or a device, expected a file" in terminal.errors


def test_text_that_cannot_be_encoded_is_named():
    terminal = Terminal("a\udcff", "/system b\udcff", "a")
    assert "a message of the user is no Unicode text" in terminal.errors
    assert "a message of the system is no Unicode text" in terminal.errors


def test_errors_do_not_steer_the_terminal():
    template = "{{ raise_exception('\x1b[31m\x9b') }}"
    chat = tiny_chat()
    chat._tokenizer.chat_template = template
    errors = Terminal("a", chat=chat, color_system=None).errors
    assert "refuses a conversation of user ([31m)" in errors
    assert not {"\x1b", "\x9b"} & set(errors)


def test_closed_input_is_named(run, monkeypatch):
    monkeypatch.setattr("speclm.cli.chat.sys", SimpleNamespace(stdin=None))
    with pytest.raises(OptionError, match="standard input is closed"):
        run("chat")
