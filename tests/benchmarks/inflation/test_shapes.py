from dataclasses import replace

import pytest

from benchmarks.inflation.shapes import InflatedShape, draft_shape
from speclm.errors import OptionError
from tests.models import build_model

OLD = InflatedShape(
    hidden_size=40,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    vocab_size=160,
    is_tied=False,
)


@pytest.mark.parametrize("scale", [2, 3, 6])
def test_draft_model_keeps_its_share_of_the_weights(scale):
    base, draft = build_model("llama"), build_model("llama", hidden_size=32, num_hidden_layers=1)
    old, small = InflatedShape.of(draft), InflatedShape.of(base)
    shape = InflatedShape(
        hidden_size=320 * scale,
        intermediate_size=800 * scale,
        num_layers=4,
        num_heads=8 * scale,
        num_kv_heads=4 * scale,
        head_dim=40,
        vocab_size=2000,
        is_tied=False,
    )
    wide = draft_shape(draft, base, shape)
    share = old.num_weights_read / small.num_weights_read
    assert wide.num_weights_read / shape.num_weights_read == pytest.approx(share, rel=0.05)
    assert (wide.num_layers, wide.head_dim, wide.vocab_size) == (2, 40, 2000)


def test_draft_model_is_never_made_smaller():
    draft = build_model("llama", tie_word_embeddings=True)
    base = build_model("llama", num_hidden_layers=8)
    wide = draft_shape(draft, base, replace(InflatedShape.of(base), vocab_size=170))
    assert wide == replace(InflatedShape.of(draft), vocab_size=170)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "num_layers is 0, expected at least 1"),
        ({"num_heads": 5}, "num_heads 5, num_kv_heads 2"),
        ({"head_dim": 5}, "even head_dim"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(OptionError, match=words):
        replace(OLD, **change)
