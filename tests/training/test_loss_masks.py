import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from speclm.demo.bundle import assets
from speclm.errors import DataError, OptionError
from speclm.training.conversations import Conversation
from speclm.training.loss_masks import (
    ALL_ZERO,
    CUT_OFF,
    NO_PROMPT,
    OTHER_PROMPT,
    mark_turns,
    marked_excerpts,
    tokenize_conversation,
)
from tests.training.alphabet import TAGGED, TURN, UNTAGGED, conversation, word_tokenizer

SHIFTING = "{{ messages | length }}" + UNTAGGED  # what comes later changes what comes first
REFUSING = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = {"tagged": TAGGED, "untagged": UNTAGGED}
EXTRA = ("<think>", "<answer>", "<call>", "<tool>", "<next>", " ")
# As those of reasoning models: reasoning is rendered only after the last question.
ANSWER = "{{ m['content'] }}{% for call in m['tool_calls'] %}<call>{{ call }}{% endfor %}<end>"
REASONED = "{% if loop.index0 > last.user %}<think>{{ m['reasoning_content'] }}<answer>{% endif %}"
THINKING = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}" + REASONED + ANSWER + "{% endgeneration %}"
    "{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BARE_THINKING = THINKING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
OPENING = BARE_THINKING.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request):
    return word_tokenizer(request.param)


def texts(examples, tokenizer):
    """Return each example as text, with brackets around what is marked."""
    shown = []
    for example in examples:
        text, before = "", 0
        words = tokenizer.convert_ids_to_tokens(example["input_ids"])
        for word, mark in zip([*words, ""], [*example["loss_mask"], 0], strict=True):
            text += {1: "[", -1: "]", 0: ""}[mark - before] + word
            before = mark
        shown.append(text)
    return shown


def test_mask_covers_answers_and_the_ends_of_their_turns(tokenizer):
    rows = tokenize_conversation(conversation("ab", "cd", "e", "f"), tokenizer)
    expected = "<user>ab<end><assistant>[cd<end>]<user>e<end><assistant>[f<end>]"
    assert texts(rows, tokenizer) == [expected]
    assert marked_excerpts(rows[0], tokenizer) == ("c d <end>", "f <end>")


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=6))
def test_render_boundaries_say_what_tags_say(turns):
    row = conversation(*turns)
    results = [tokenize_conversation(row, word_tokenizer(t)) for t in TEMPLATES.values()]
    assert results[0] == results[1]


def test_max_length_cuts_the_end_off(tokenizer):
    (row,) = tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=6)
    assert (len(row["input_ids"]), sum(row["loss_mask"])) == (6, 1)


def test_row_that_max_length_leaves_without_answer_is_named(tokenizer):
    with pytest.raises(
        DataError, match=r"row 1: max_length 5 cuts off .* number 6 of 8; raise"
    ) as e:
        tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=5)
    assert e.value.reason == CUT_OFF


def test_all_zero_mask_is_an_error_that_names_the_row():
    untouched = UNTAGGED + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="row 1: the loss mask of 8 tokens is all zero") as caught:
        tokenize_conversation(conversation("ab", "cd"), word_tokenizer(untouched))
    assert caught.value.reason == ALL_ZERO


def test_turn_whose_prompt_is_rendered_differently_is_an_error_that_names_the_row():
    words = r"row 1: assistant turn 1 is generated after '1<user>a.*has '2<user>a.*at character 0"
    with pytest.raises(DataError, match=words):
        tokenize_conversation(conversation("a", "b", "c", "d"), word_tokenizer(SHIFTING))


def thinking(*, reasoning=("xy", "z")):
    row = conversation("a", "b", "c", "d")
    for index, text in zip((1, 3), reasoning, strict=True):
        row.messages[index]["reasoning_content"] = text
    return row


@pytest.mark.parametrize("template", [THINKING, BARE_THINKING], ids=["tagged", "untagged"])
def test_turns_are_those_that_were_generated_where_a_template_drops_earlier_reasoning(template):
    tokenizer = word_tokenizer(template, extra=EXTRA)
    assert texts(tokenize_conversation(thinking(), tokenizer), tokenizer) == [
        "<user>a<end><assistant>[<think>xy<answer>b<end>]",
        "<user>a<end><assistant>b<end><user>c<end><assistant>[<think>z<answer>d<end>]",
    ]


@pytest.mark.parametrize("template", [THINKING, BARE_THINKING], ids=["tagged", "untagged"])
def test_calls_of_tools_are_marked_and_their_results_are_not(template):
    tokenizer = word_tokenizer(template, extra=EXTRA)
    call = {"role": "assistant", "content": None, "tool_calls": ["x"], "reasoning_content": "p"}
    turns = [call, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "d"}]
    row = Conversation([{"role": "user", "content": "a"}, *turns], "row 1")
    assert texts(tokenize_conversation(row, tokenizer), tokenizer) == [
        (
            "<user>a<end><assistant>[<think>p<answer><call>x<end>]"
            "<tool>r<end><assistant>[<think><answer>d<end>]"
        )
    ]


def test_tools_of_a_row_are_rendered():
    tokenizer = word_tokenizer("{{ tools[0]['name'] }}" + UNTAGGED)
    row = Conversation(conversation("a", "b").messages, "row 1", [{"name": "f"}])
    assert texts(tokenize_conversation(row, tokenizer), tokenizer)[0].startswith("f<user>")


def test_options_of_a_row_reach_the_template():
    closed = "{% if thinks is false %}<think><answer>{% endif %}"
    template = UNTAGGED.replace("<assistant>{% endif %}", "<assistant>" + closed + "{% endif %}")
    template = template.replace(
        TURN, TURN + "{% if m['role'] == 'assistant' %}" + closed + "{% endif %}"
    )
    tokenizer = word_tokenizer(template, extra=EXTRA)
    messages = conversation("a", "b").messages
    for options, text in (
        (None, "<user>a<end><assistant>[b<end>]"),
        ({"thinks": False}, "<user>a<end><assistant><think><answer>[b<end>]"),
    ):
        row = Conversation(messages, "row 1", template_options=options)
        assert texts(tokenize_conversation(row, tokenizer), tokenizer) == [text]
    with pytest.raises(DataError, match=r"chat_template_kwargs has 'tokenize'"):
        tokenize_conversation(
            Conversation(messages, "row 1", template_options={"tokenize": True}), tokenizer
        )


def test_answer_that_lacks_what_the_generation_prompt_begins_is_refused():
    tokenizer = word_tokenizer(OPENING, extra=EXTRA)
    examples = tokenize_conversation(thinking(), tokenizer)
    assert texts(examples, tokenizer)[0] == "<user>a<end><assistant><think>[xy<answer>b<end>]"
    plain = word_tokenizer(OPENING.replace(REASONED, ""), extra=EXTRA)
    words = r"turn 1 is generated after '<think>', and its rendering has 'b<end>' there.*reasoning"
    with pytest.raises(DataError, match=words) as caught:
        tokenize_conversation(conversation("a", "b"), plain)
    assert caught.value.reason == OTHER_PROMPT


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_white_space_that_a_template_trims_is_what_generation_sees(template):
    spaced = template.replace("<assistant>{% endif %}", "<assistant> {% endif %}")
    assert spaced != template
    tokenizer = word_tokenizer(spaced, extra=EXTRA)
    examples = tokenize_conversation(conversation("a", "b", "c", "d"), tokenizer)
    assert texts(examples, tokenizer) == [
        "<user>a<end><assistant> [b<end>]",
        "<user>a<end><assistant>b<end><user>c<end><assistant> [d<end>]",
    ]


def test_prompt_that_ends_within_a_token_is_tokenized_as_generation_sees_it():
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    row = Conversation(conversation("a", "SELECT x").messages, "row 1")
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if messages | length > 1 %} : {% generation %}"
        "{{ messages[1]['content'] }}{% endgeneration %}{% endif %}"
        "{% if add_generation_prompt %} : {% endif %}"
    )
    tagged = tokenize_conversation(row, tokenizer)
    tokenizer.chat_template = (
        "{{ messages | map(attribute='content') | join(' : ') }}"
        "{% if add_generation_prompt %} : {% endif %}"
    )
    ((ids, mask),) = (example.values() for example in tokenize_conversation(row, tokenizer))
    assert tagged == [{"input_ids": ids, "loss_mask": mask}]
    prompt = tokenizer("a : ", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == "SELECT x"
    assert tokenizer("a : SELECT x", add_special_tokens=False)["input_ids"] != ids
    # A tokenizer that begins every text with a space cannot split there.
    inner = Tokenizer(WordLevel({"▁a": 0, "▁:": 1, "▁SELECT": 2, "▁x": 3, "▁": 4}, unk_token="▁"))
    inner.pre_tokenizer, inner.decoder = Metaspace(), decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="▁")
    spaced.chat_template = tokenizer.chat_template
    (example,) = tokenize_conversation(row, spaced)
    assert example == {"input_ids": [0, 1, 2, 3], "loss_mask": [0, 0, 1, 1]}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_nothing_is_marked_after_the_end_of_sequence_token(template):
    tokenizer = word_tokenizer(template.replace("<end>", "<end><next>"), extra=EXTRA)
    examples = tokenize_conversation(conversation("a", "b"), tokenizer)
    assert texts(examples, tokenizer) == ["<user>a<end><next><assistant>[b<end>]<next>"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_turns_end_where_the_base_stops_though_the_tokenizer_has_another_end(template):
    tokenizer = word_tokenizer(template.replace("<end>", "<stop><next>"), extra=(*EXTRA, "<stop>"))
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    row = conversation("a", "b")
    for ends, answer in (((), "[b<stop><next>]"), ({stop, 999}, "[b<stop>]<next>")):
        examples = tokenize_conversation(row, tokenizer, eos_token_ids=ends)
        assert texts(examples, tokenizer) == [f"<user>a<stop><next><assistant>{answer}"]


def test_turns_that_cannot_be_learned_do_not_take_the_others_with_them():
    tokenizer = word_tokenizer(BARE_THINKING, extra=EXTRA)
    examples, errors = mark_turns(thinking(), tokenizer, max_length=9)
    assert texts(examples, tokenizer) == ["<user>a<end><assistant>[<think>xy<answer>b]"]
    assert [error.reason for error in errors] == [CUT_OFF]


def test_assistant_turn_without_prompt_needs_tags():
    row = conversation("", "abc")
    row.messages.pop(0)
    assert sum(tokenize_conversation(row, word_tokenizer(TAGGED))[0]["loss_mask"]) == 4
    with pytest.raises(DataError, match="row 1: the first turn is the assistant's"):
        tokenize_conversation(row, word_tokenizer(UNTAGGED))
    row.messages.extend(conversation("a", "b").messages)
    examples, errors = mark_turns(row, word_tokenizer(UNTAGGED))
    marked = "<assistant>abc<end><user>a<end><assistant>[b<end>]"
    assert texts(examples, word_tokenizer(UNTAGGED)) == [marked]
    assert [error.reason for error in errors] == [NO_PROMPT]


def test_template_that_refuses_a_row_names_it():
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*roles must alternate"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(REFUSING))
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*TypeError: can only"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer("{{ messages + 1 }}"))


def test_tokenizer_without_template_is_refused():
    with pytest.raises(OptionError, match=r"has no chat template; set tokenizer\.chat_template"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(None))


def test_slow_tokenizer_is_refused(monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(OptionError, match="does not say which characters"):
        tokenize_conversation(conversation("a", "b"), tokenizer)
