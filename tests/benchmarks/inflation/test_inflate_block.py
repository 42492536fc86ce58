import pytest
import torch
from torch.nn import functional

from benchmarks.inflation.inflate import EXTRA_LOGIT, inflate_llama
from benchmarks.inflation.inflate_block import inflate_block
from benchmarks.inflation.shapes import InflatedShape
from speclm.errors import OptionError
from speclm.methods.block.proposer import BlockProposer
from speclm.model import SpecModel
from speclm.target import TargetView
from tests.methods.block.target_heads import heads_for
from tests.models import build_model, prompts

# Sums over more, scaled terms round otherwise; relative to the largest logit.
TOLERANCE = 2e-6
NUM_LAYERS, HIDDEN = 7, 40
SHAPE = InflatedShape(
    hidden_size=96,
    intermediate_size=112,
    num_layers=10,
    num_heads=12,
    num_kv_heads=4,
    head_dim=20,
    vocab_size=240,
    is_tied=False,
)
HEADS = {
    "vanilla": {"kind": "vanilla"},
    "rnn": {"kind": "rnn"},
    "gated in place": {"kind": "gated in place"},
    "both ways": {"kind": "both ways"},
    "biases": {"kind": "window", "has_attention_bias": True, "has_own_embeddings": True},
}


@pytest.fixture(scope="module")
def base():
    return build_model("llama", num_hidden_layers=NUM_LAYERS, head_dim=10)


def outputs(heads, base, features):
    """Return logits and confidences of one block after a text."""
    view, positions = TargetView(base), torch.arange(features.shape[1])[None]
    size = heads.config.block_size
    keys, values = heads.context(features, heads.rotation(positions))
    embeds = heads.embed_blocks(
        torch.tensor([[7]]), num_positions=size, embedding=view.stored_embeddings
    )
    block = features.shape[1] + torch.arange(size)[None]
    hidden = heads(embeds, heads.rotation(block), keys, values, [None] * len(heads.layers))[0]
    logits = heads.logits(hidden, lm_head=view.head_logits)
    tokens = torch.arange(3, 3 + len(hidden))
    if heads.markov_head is not None:
        code, _ = heads.markov_head.code(tokens, hidden)
        logits = logits + heads.markov_head.markov_w2(code)
    confidence = None if heads.confidence_head is None else heads.confidence(hidden, tokens)
    return logits, confidence


@pytest.mark.parametrize("numbers", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_logits_are_those_of_the_small_heads(base, numbers):
    heads = heads_for(base, layers=(2, 4), **numbers)
    wide = inflate_llama(base, SHAPE)
    inflated = inflate_block(heads, SHAPE, base=InflatedShape.of(base))
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(2, 1, 9, HIDDEN, generator=generator)
    padded = functional.pad(parts, (0, SHAPE.hidden_size - HIDDEN))
    expected, sure = outputs(heads, base, torch.cat([*parts], dim=-1))
    logits, surely = outputs(inflated, wide, torch.cat([*padded], dim=-1))
    found, extra = logits[:, : expected.shape[1]], logits[:, expected.shape[1] :]
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (extra < EXTRA_LOGIT / 2).all()
    if sure is not None:
        assert torch.allclose(sure, surely, atol=1e-5)
    config = inflated.config
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (96, 20, 240)
    assert config.windows == heads.config.windows
    assert not inflated.training


def test_inflated_heads_keep_tokens_and_tau(base):
    heads = heads_for(base, "vanilla", layers=(2, NUM_LAYERS))
    wide = inflate_llama(base, SHAPE)
    wide_heads = inflate_block(heads, SHAPE, base=InflatedShape.of(base))
    assert wide_heads.config.feature_layers == (2, SHAPE.num_layers)
    inputs, results = prompts(7, 12), []
    for target, guesser in ((base, heads), (wide, wide_heads)):
        options = {"width": 12, "branches": 12, "num_draft_tokens": 40, "min_probability": 0.0}
        spec = SpecModel(target, BlockProposer(guesser, target=target, depth=2, **options))
        tokens = spec.generate(**inputs, max_new_tokens=16, do_sample=False)
        results.append((tokens.tolist(), spec.last_speculation.tau))
    assert results[0] == results[1]
    assert results[0][1] > 1


def test_added_weights_depend_on_the_seed_and_other_bases_are_refused(base):
    heads, small = heads_for(base, "both ways"), InflatedShape.of(base)
    first, again, other = (inflate_block(heads, SHAPE, base=small, seed=s) for s in (0, 0, 1))
    weights = [made.layers[0].mlp.gate_proj.weight for made in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(OptionError, match="heads are 40 wide for 160 tokens, expected 96 and 240"):
        inflate_block(heads, SHAPE, base=SHAPE)
