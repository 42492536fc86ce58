"""A word-level tokenizer with a chat template, and conversations that two heads can learn."""

import json

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from speclm.training.conversations import Conversation
from tests.models import build_model

TURN = "{{ '<' + m['role'] + '>' }}"
TAGGED = (
    "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNTAGGED = (
    "{% for m in messages %}" + TURN + "{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = ["<end>", "<user>", "<assistant>", "<system>"]
WORDS = [*MARKS, *"abcdefghijklmnopqrstuvwxyz"]


def word_tokenizer(template, *, extra=()):
    """Return a tokenizer of one token a letter and a mark; the padding is the end of a turn."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, *extra])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    inner.pre_tokenizer = Split(Regex("<[a-z]+>|[a-z]"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns, where="row 1"):
    """Return turns that alternate between user and assistant."""
    roles = ("user", "assistant")
    return Conversation(
        [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], where
    )


def write_alphabet(path, *, num_rows=12):
    """Write conversations whose answers run through the alphabet, and return the path."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [conversation(letters[i], letters[i + 1 : i + 11]).messages for i in range(num_rows)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def tiny_base():
    """Return a random model with the vocabulary of `word_tokenizer`."""
    return build_model("llama", vocab_size=len(WORDS))
