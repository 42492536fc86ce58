"""The tiny base and its calls, as in the tests of `speclm.bench`."""

from tests.bench.conftest import calls_of, tiny_base, tokenizer

__all__ = ["calls_of", "tiny_base", "tokenizer"]
