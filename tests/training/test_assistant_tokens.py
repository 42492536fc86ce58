import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import DataError, OptionError
from speclm.training.assistant_tokens import tokenize_conversation
from tests.training.talks import TAGGED, UNTAGGED, WORDS, conversation, word_tokenizer

SHIFTING = "{{ messages | length }}" + UNTAGGED  # what comes later changes what comes first
REFUSING = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = {"tagged": TAGGED, "untagged": UNTAGGED}


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request):
    return word_tokenizer(request.param)


def words(row):
    return [WORDS[token] for token in row.tokens]


def test_mask_covers_answers_and_the_ends_of_their_turns(tokenizer):
    row = tokenize_conversation(conversation("ab", "cd", "e", "f"), tokenizer)
    expected = "<user> a b <end> <assistant> c d <end> <user> e <end> <assistant> f <end>"
    assert words(row) == expected.split()
    assert row.loss_mask == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=6))
def test_render_boundaries_say_what_tags_say(turns):
    row = conversation(*turns)
    results = [tokenize_conversation(row, word_tokenizer(t)) for t in TEMPLATES.values()]
    assert results[0] == results[1]


def test_max_length_cuts_the_end_off(tokenizer):
    row = tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=6)
    assert (len(row.tokens), sum(row.loss_mask)) == (6, 1)


def test_row_that_max_length_leaves_without_answer_is_named(tokenizer):
    with pytest.raises(DataError, match=r"row 1: max_length 5 cuts off .* number 6 of 8; raise"):
        tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=5)


def test_all_zero_mask_is_an_error_that_names_the_row():
    untouched = UNTAGGED + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="row 1: the loss mask of 8 tokens is all zero"):
        tokenize_conversation(conversation("ab", "cd"), word_tokenizer(untouched))


def test_unstable_render_is_an_error_that_names_the_row_and_the_remedy():
    with pytest.raises(DataError, match=r"row 1: the render up to assistant turn 1.*generation"):
        tokenize_conversation(conversation("a", "b", "c", "d"), word_tokenizer(SHIFTING))


def test_assistant_turn_without_prompt_needs_tags():
    row = conversation("", "abc")
    row.messages.pop(0)
    assert sum(tokenize_conversation(row, word_tokenizer(TAGGED)).loss_mask) == 4
    with pytest.raises(DataError, match="row 1: the first turn is the assistant's"):
        tokenize_conversation(row, word_tokenizer(UNTAGGED))


def test_template_that_refuses_a_row_names_it():
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*roles must alternate"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(REFUSING))


def test_tokenizer_without_template_is_refused():
    with pytest.raises(OptionError, match=r"has no chat template; set tokenizer\.chat_template"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(None))


def test_slow_tokenizer_is_refused(monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(OptionError, match="does not say which characters"):
        tokenize_conversation(conversation("a", "b"), tokenizer)
