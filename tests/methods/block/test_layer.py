import pytest
import torch

from speclm.methods.block import layer
from speclm.methods.block.layer import BlockAttention, BlockLayer, MarkovTerms
from tests.methods.block.block_heads import MARKOV, make_heads
from tests.methods.block.loss_reference import markov_terms

EXACT = 1e-12  # float64, another order of sums


def run(block_layer: BlockLayer, *, num_blocks=1, mask=None):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ones = torch.ones(1, 1, 6, 4, dtype=torch.float64)
    rotation = ones, torch.zeros_like(ones)
    context = draw(2, 2, 5, 4), draw(2, 2, 5, 4)
    return block_layer(
        draw(12, 8),
        rotation=rotation,
        context=context,
        room=None,
        mask=mask,
        num_blocks=num_blocks,
    )


def test_block_does_not_see_the_others():
    layer = make_heads().layers[0]
    mask = torch.zeros(1, 1, 6, 5 + 2, dtype=torch.bool)
    mask[..., :5] = True  # the context only
    mask[:, :, torch.arange(6), 5 + torch.arange(6) % 2] = True  # and itself
    found = run(layer, num_blocks=3, mask=mask)
    own = torch.eye(6, dtype=torch.bool)
    whole = torch.cat((torch.ones(6, 5, dtype=torch.bool), own), dim=1)[None, None]
    torch.testing.assert_close(found, run(layer, mask=whole), rtol=0, atol=EXACT)


def test_context_comes_from_the_projections_of_keys_and_values():
    attention = make_heads().layers[1].self_attn
    assert isinstance(attention, BlockAttention)
    assert attention.context_parts == (attention.k_proj, attention.v_proj)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_terms_are_those_of_a_loop_over_positions(kind):
    heads = make_heads(**{**MARKOV, "markov": kind})
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    previous = torch.tensor([4, 0, 19, 7, 7])
    expected = markov_terms(heads, previous.tolist(), hidden)
    state, found = None, []
    for token, vector in zip(previous, hidden, strict=True):
        code, state = heads.markov_head.code(token[None], vector[None], state)
        found.append(heads.markov_head.markov_w2(code)[0])
    assert (state is not None) == (kind == "rnn")
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=EXACT)


def test_term_of_the_vanilla_head_is_a_product_of_low_rank():
    heads = make_heads(**MARKOV)
    head = heads.markov_head
    table = head.markov_w1.weight @ head.markov_w2.weight.T  # [previous, next]
    tokens = torch.tensor([[2, 5], [0, 2]])
    code, _ = head.code(tokens, torch.zeros(2, 2, 8, dtype=torch.float64))
    for batch in (1, 2):
        logits = torch.randn(batch, 1, len(table), dtype=torch.float64)
        found = head.added(logits, code[:batch], head.matrix(batch))
        torch.testing.assert_close(found, logits + table[tokens[:batch]], rtol=0, atol=EXACT)
    found = head.added(
        logits.float(), code, head.matrix(2)
    )  # logits of a target in another precision
    torch.testing.assert_close(found, logits.float() + table[tokens], rtol=0, atol=EXACT)


@pytest.mark.parametrize("markov", [MARKOV, {"has_confidence": True}])
def test_confidence_reads_the_state_and_the_embedding_of_the_token_before(markov):
    heads = make_heads(**markov)
    hidden = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    previous = torch.tensor([3, 9])
    read = hidden
    if heads.markov_head is not None:
        read = torch.cat((hidden, heads.markov_head.markov_w1.weight[previous]), dim=1)
    proj = heads.confidence_head.proj
    expected = 1 / (1 + torch.exp(-(read @ proj.weight[0] + proj.bias)))
    found = heads.confidence(hidden, previous)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_kept_terms_are_those_of_the_markov_head(monkeypatch):
    markov = make_heads(**MARKOV).markov_head
    monkeypatch.setattr(layer, "_TERM_BYTES", 3 * 20 * 8)  # three rows
    terms, counted = MarkovTerms(markov), []
    embed = markov.embed
    monkeypatch.setattr(markov, "embed", lambda ids: counted.append(ids.numel()) or embed(ids))
    for tokens in ([[4], [7]], [[7], [4]], [[4, 9], [9, 7]], [[5, 4]], [[1, 2, 3, 4]], [[4, 4]]):
        found = terms.of(torch.tensor(tokens))
        torch.testing.assert_close(found, markov.markov_w2(embed(torch.tensor(tokens))))
    assert counted == [2, 1, 2, 4, 1]


def test_terms_are_current_until_a_weight_changes():
    markov = make_heads(**MARKOV).markov_head
    terms = MarkovTerms(markov)
    assert terms.is_current
    with torch.no_grad():
        markov.markov_w2.weight.mul_(2)
    assert not terms.is_current
    terms = MarkovTerms(markov)
    markov.to(torch.float32)
    assert not terms.is_current
