"""Methods on a tiny random model that says letters."""

from functools import cache

from speclm import SpecModel
from speclm.webui import Methods, Settings
from tests.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.models import build_model

LETTERS = set(byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz<>&")))


@cache
def tiny_methods():
    """Return the methods ngram, recycling and none, which share a base."""
    base = build_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=400)
    base.generation_config.suppress_tokens = sorted(set(range(VOCAB_SIZE)) - LETTERS)
    heads = {"ngram": "ngram", "recycling": "recycling", "none": None}
    loaders = {
        name: lambda part=part: SpecModel.from_pretrained(base, part)
        for name, part in heads.items()
    }
    return Methods(loaders, byte_tokenizer())


def settings(**options):
    return Settings(**{"method": "ngram", "max_new_tokens": 24, **options})
