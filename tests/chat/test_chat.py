import json
from contextlib import contextmanager
from threading import Thread

import pytest
import torch

from speclm import SpecModel, SpeculationStats
from speclm.chat import Chat
from speclm.errors import OptionError, PromptError
from speclm.stats import Pause, RowStats
from tests.byte_tokenizer import (
    CHANGING_TEMPLATE,
    END,
    STRICT_TEMPLATE,
    VOCAB_SIZE,
    byte_tokenizer,
)
from tests.grids import turns
from tests.models import build_model
from tests.outcomes import reading

# Without and with a window that drops what it no longer sees, and with states that take none back.
FAMILIES = ("llama", "mistral", "qwen3_next")
GREEDY = {"do_sample": False, "max_new_tokens": 5}
# A random model says broken characters, whose text has other tokens than were generated.
LETTERS = set(byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
IN_LETTERS = {**GREEDY, "suppress_tokens": sorted(set(range(VOCAB_SIZE)) - LETTERS)}


def new_chat(*, family="llama", template=None, heads=None, options=GREEDY, **settings):
    base = build_model(
        family, vocab_size=VOCAB_SIZE, **{"eos_token_id": END, "bos_token_id": None, **settings}
    )
    tokenizer = byte_tokenizer(template) if template else byte_tokenizer()
    return Chat(SpecModel.from_pretrained(base, heads), tokenizer, options=options)


@contextmanager
def fed_tokens(chat):
    """Yield a list to which every forward adds the number of tokens that it reads."""
    fed = []
    hook = chat.spec.base.get_input_embeddings().register_forward_hook(
        reading(lambda _, inputs, __: fed.append(inputs[0].shape[1]))
    )
    yield fed
    hook.remove()


def rendered(chat, text):
    messages = [*chat.messages, {"role": "user", "content": text}]
    tokenizer = byte_tokenizer(chat._tokenizer.chat_template)
    rendering = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return rendering["input_ids"]


def plain_answer(chat, text):
    """Return the tokens that the base says when it reads the whole conversation anew."""
    prompt = rendered(chat, text)
    output = chat.spec.base.generate(
        prompt, attention_mask=torch.ones_like(prompt), eos_token_id=END, **GREEDY
    )
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "template", "heads"),
    turns(FAMILIES, [None, CHANGING_TEMPLATE], [None, "ngram"]),
)
def test_answers_are_those_of_reading_everything_anew(family, template, heads):
    chat = new_chat(family=family, template=template, heads=heads)
    for text in ("abcabc", "你好", "x"):
        expected = plain_answer(chat, text)
        assert chat.ask(text).tokens == expected


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_second_turn_reads_only_what_is_new(family):
    chat = new_chat(family=family, options=IN_LETTERS)
    with fed_tokens(chat) as fed:
        first = chat.ask("a long first question")
        assert fed[0] == first.num_prompt_tokens
        fed.clear()
        second = chat.ask("b")
    assert second.num_reused_tokens == first.num_prompt_tokens + len(first.tokens) - 1
    # The last token of the answer, which nobody has read, its end, and the new turn.
    assert fed[0] == 1 + len(["<|end|>", "<|user|>", "b", "<|end|>", "<|assistant|>"])
    assert sum(fed) == fed[0] + len(second.tokens) - 1


def test_a_template_that_changes_earlier_turns_has_them_read_from_there():
    chat = new_chat(template=CHANGING_TEMPLATE)
    first = chat.ask("a long first question")
    with fed_tokens(chat) as fed:
        second = chat.ask("b")
    assert second.num_reused_tokens == first.num_prompt_tokens  # the bracket is different
    assert fed[0] == second.num_prompt_tokens - first.num_prompt_tokens


def test_recurrent_states_are_read_anew_where_earlier_turns_change():
    chat = new_chat(family="qwen3_next", template=CHANGING_TEMPLATE)
    chat.ask("a long first question")
    assert chat.ask("b").num_reused_tokens == 0


def test_a_new_system_message_has_everything_read_again():
    chat = new_chat()
    chat.ask("a")
    chat.system = "b"
    assert plain_answer(chat, "c") == chat.ask("c").tokens
    assert chat.answers[-1].num_reused_tokens == 0


def test_undo_and_reset_keep_what_is_still_common():
    chat = new_chat()
    first = chat.ask("a question")
    chat.ask("another")
    assert chat.undo()
    assert len(chat.messages) == 2
    assert chat.ask("other words").num_reused_tokens >= first.num_prompt_tokens
    chat.reset()
    assert chat.messages == []
    assert not chat.undo()
    expected = plain_answer(chat, "a question")
    again = chat.ask("a question")
    assert again.tokens == expected == first.tokens
    assert again.num_reused_tokens == again.num_prompt_tokens - 1  # something has to be read


def test_text_is_streamed_and_is_what_the_messages_hold():
    chat = new_chat()
    pieces = []
    answer = chat.ask("a", on_piece=pieces.append, marks_drafted=True)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert chat.messages[-1] == {"role": "assistant", "content": answer.text}


def test_the_system_message_comes_first():
    chat = new_chat()
    chat.system = "be brief"
    chat.ask("a")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


def test_an_answer_says_how_it_ended():
    chat = new_chat()
    answer = chat.ask("a")
    assert answer.finish == ("end" if answer.tokens[-1] == END else "length")
    ended = new_chat(options={**GREEDY, "eos_token_id": answer.tokens[0]}).ask("a")
    assert (ended.finish, ended.tokens, ended.text) == ("end", answer.tokens[:1], "")


def test_stop_keeps_what_was_said_and_the_cache():
    chat = new_chat(options={"do_sample": False, "max_new_tokens": 400}, eos_token_id=None)
    answer = chat.ask("a", on_piece=lambda _: chat.stop())
    assert answer.finish == "stopped"
    assert len(answer.tokens) < 100
    assert chat.messages[-1]["content"] == answer.text
    second = chat.ask("b", on_piece=lambda _: chat.stop())
    assert second.num_reused_tokens >= answer.num_prompt_tokens


def test_stop_works_from_another_thread():
    chat = new_chat(options={"do_sample": False, "max_new_tokens": 400}, eos_token_id=None)
    threads = []

    def stop_elsewhere(_):
        threads.append(Thread(target=chat.stop))
        threads[-1].start()
        threads[-1].join()

    assert chat.ask("a", on_piece=stop_elsewhere).finish == "stopped"


def test_an_error_during_an_answer_leaves_the_turns_as_they_were():
    chat = new_chat()
    chat.ask("a")
    before = chat.messages

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("b", on_piece=fail)
    assert chat.messages == before
    expected = plain_answer(chat, "b")
    answer = chat.ask("b")
    assert answer.tokens == expected
    assert answer.num_reused_tokens == 0  # the cache may hold anything by then


def test_a_conversation_longer_than_the_model_is_refused_and_can_begin_anew():
    chat = new_chat(max_position_embeddings=40)
    first = chat.ask("a")
    with pytest.raises(
        PromptError, match=r"has \d+ tokens, and the model has 40 positions.*/reset"
    ):
        chat.ask("b" * 40)
    assert len(chat.messages) == 2
    chat.reset()
    assert chat.ask("a").tokens == first.tokens


def test_an_answer_ends_at_the_last_position():
    chat = new_chat(options={"do_sample": False}, max_position_embeddings=30, eos_token_id=None)
    answer = chat.ask("a")
    assert answer.finish == "length"
    assert answer.num_prompt_tokens + len(answer.tokens) == 30


def test_a_template_that_refuses_the_messages_is_named():
    chat = new_chat(template=STRICT_TEMPLATE)
    chat.system = "be brief"
    with pytest.raises(PromptError, match=r"refuses.*system, user.*no system role.*drop it"):
        chat.ask("a")


def test_a_tokenizer_without_template_is_refused():
    tokenizer = byte_tokenizer(None)
    with pytest.raises(OptionError, match="no chat template"):
        Chat(SpecModel(build_model("llama"), None), tokenizer)


def test_sampled_answers_depend_on_the_seed_alone():
    def answer():
        torch.manual_seed(3)
        options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 5}
        return new_chat(heads="ngram", options=options).ask("a").tokens

    assert answer() == answer()


def test_counters_of_all_answers_are_added_up():
    chat = new_chat()
    for lengths in ([0, 2], [1]):
        answer = chat.ask("a")
        stats = answer.speculation
        stats.rows, stats.rounds = [RowStats(accepted_lengths=lengths)], len(lengths)
        stats.seconds["verify"], stats.fallbacks = 0.5, ["because"]
        stats.num_plain_rounds, stats.pauses = 1, [Pause(1, "slow")]
    total = chat.speculation
    assert isinstance(total, SpeculationStats)
    assert total.accepted_length_histogram == [1, 1, 1]
    assert (total.rounds, total.tau, total.seconds["verify"]) == (3, 2.0, 1.0)
    assert total.fallbacks == ["because"]
    assert total.num_plain_rounds == 2
    assert total.pauses == [Pause(1, "slow"), Pause(3, "slow")]  # rounds of all answers count on


def test_save_adds_a_row_and_keeps_the_others(tmp_path):
    chat = new_chat()
    path = tmp_path / "talks.jsonl"
    path.write_text('{"messages": []}')  # without a last line break
    path.chmod(0o600)
    chat.ask("你好")
    chat.save(path)
    old, row = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(old) == {"messages": []}
    assert json.loads(row) == {"messages": chat.messages}
    assert "你好" in row
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    chat = new_chat()
    path = tmp_path / "talks.jsonl"
    path.write_text("old\n")
    chat.ask("a")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("speclm.files.atomic.os.fsync", fail)
    with pytest.raises(OptionError, match=r"cannot be written.*disk full"):
        chat.save(path)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_nothing_or_nowhere_is_refused(tmp_path):
    chat = new_chat()
    with pytest.raises(OptionError, match="no turn to save"):
        chat.save(tmp_path / "a.jsonl")
    chat.ask("a")
    with pytest.raises(OptionError, match=r"cannot be written.*folder that exists"):
        chat.save(tmp_path / "missing" / "a.jsonl")


@pytest.mark.parametrize("options", [IN_LETTERS, {**IN_LETTERS, "do_sample": True}])
def test_regular_answers_are_the_same_and_leave_the_conversation_as_it_is(options):
    chat = new_chat(heads="ngram", options={**options, "tree": "auto"})
    for text in ("abcabcabc", "bc"):
        torch.manual_seed(4)
        answer = chat.ask(text, options={"max_new_tokens": 7})
        messages, pieces = chat.messages, []
        torch.manual_seed(4)
        with fed_tokens(chat) as fed:
            regular = chat.answer_regularly(on_piece=pieces.append)
        assert (regular.tokens, regular.text) == (answer.tokens, answer.text)
        assert len(answer.tokens) == 7
        assert {piece.origin for piece in pieces} == {"regular"}
        # It reads what the answer has read, and no more.
        assert regular.num_reused_tokens == answer.num_reused_tokens
        assert fed == [answer.num_prompt_tokens - answer.num_reused_tokens] + [1] * 6
        assert chat.messages == messages
    assert chat.answers[1].num_reused_tokens > 0


def test_a_regular_answer_reads_everything_where_the_cache_cannot_be_cropped():
    chat = new_chat(family="qwen3_next", options=IN_LETTERS)
    for _ in range(2):
        answer = chat.ask("a")
    assert answer.num_reused_tokens > 0
    regular = chat.answer_regularly()
    assert (regular.tokens, regular.num_reused_tokens) == (answer.tokens, 0)


def test_without_an_answer_there_is_nothing_to_compare_with():
    with pytest.raises(OptionError, match="no answer to compare with; ask something first"):
        new_chat().answer_regularly()
