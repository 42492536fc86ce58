import pytest
import torch

from speclm.errors import OptionError
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads, block_masks
from tests.methods.block.block_heads import MARKOV, NUMBERS, draft_by_loop, make_heads

EXACT = 1e-12  # float64, another order of sums
CLOSE = 1e-6  # the frequencies of the rotation are float32
SETTINGS = {
    "causal": {},
    "both ways": {"is_causal": (False, False), "predicts_next": False},
    "mixed windows": {"windows": (3, None), "is_causal": (True, False)},
    "narrow both ways": {"windows": (2, 2), "is_causal": (False, False)},
    "biases": {"has_attention_bias": True},
    "one head": {"num_heads": 1, "num_kv_heads": 1},
}


def inputs(*, num_context=6, num_positions=4, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, num_context, 16, generator=generator, dtype=torch.float64)
    embeds = torch.randn(batch, num_positions, 8, generator=generator, dtype=torch.float64)
    return features, embeds


def run(heads, features, embeds, *, anchor=None, has_room=False):
    """Draft one block after all of the context."""
    kv_len, num_positions = features.shape[1], embeds.shape[1]
    anchor = kv_len if anchor is None else anchor
    positions = torch.arange(kv_len)[None]
    keys, values = heads.context(features, heads.rotation(positions))
    masks = block_masks(
        heads.config,
        (positions < anchor).expand(len(features), -1)[:, None],
        context_positions=positions,
        anchors=torch.full((len(features), 1), anchor),
        num_positions=num_positions,
    )
    block = anchor + torch.arange(num_positions)[None]
    if has_room:
        shape = (*keys.shape[:3], num_positions, keys.shape[4])
        keys, values = (torch.cat((part, part.new_zeros(shape)), dim=3) for part in (keys, values))
    return heads(embeds, heads.rotation(block), keys, values, masks, has_room=has_room)


@pytest.mark.parametrize("setting", SETTINGS)
def test_states_are_those_of_a_loop_over_positions_heads_and_keys(setting):
    heads = make_heads(**SETTINGS[setting])
    features, embeds = inputs()
    expected = draft_by_loop(heads, features[0], embeds[0], anchor=6)
    found = run(heads, features, embeds)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=CLOSE)
    for has_room in (False, True):
        joined = run(heads.fuse_(), features, embeds, has_room=has_room)
        torch.testing.assert_close(joined[0], expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_of_one_row_give_what_each_gives_by_itself(setting):
    heads = make_heads(**SETTINGS[setting])
    features, embeds = inputs(num_context=9, num_positions=12, batch=2)
    anchors = torch.tensor([[2, 9, 5], [4, 1, 7]])
    positions = torch.arange(9)[None]
    masks = block_masks(
        heads.config,
        positions[:, None] < anchors[:, :, None],
        context_positions=positions,
        anchors=anchors,
        num_positions=4,
    )
    at = (anchors[:, :, None] + torch.arange(4)).flatten(1)
    context = heads.context(features, heads.rotation(positions))
    found = heads(embeds, heads.rotation(at), *context, masks, num_blocks=3)
    num_drafts = heads.config.num_drafts
    for row in range(2):
        for block, anchor in enumerate(anchors[row].tolist()):
            expected = draft_by_loop(
                heads, features[row, :anchor], embeds[row, 4 * block : 4 * block + 4], anchor
            )
            own = found[row, num_drafts * block : num_drafts * (block + 1)]
            torch.testing.assert_close(own, expected, rtol=0, atol=CLOSE)


def test_context_in_pieces_is_the_context_of_the_whole():
    heads = make_heads()
    features, _ = inputs(num_context=7, batch=2)
    positions = torch.arange(7)[None]
    whole = heads.context(features, heads.rotation(positions))
    pieces = [
        heads.context(features[:, i:j], heads.rotation(positions[:, i:j]))
        for i, j in ((0, 3), (3, 4), (4, 7))
    ]
    for part, wanted in zip(zip(*pieces, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=3), wanted, rtol=0, atol=EXACT)


def test_shorter_causal_block_is_a_prefix_of_the_longer_one():
    heads = make_heads()
    features, embeds = inputs()
    whole, part = run(heads, features, embeds), run(heads, features, embeds[:, :2])
    torch.testing.assert_close(part, whole[:, :2], rtol=0, atol=EXACT)


def test_weights_that_are_trained_are_not_the_joined_copies():
    heads = make_heads().eval().fuse_()
    features, embeds = inputs()
    before = run(heads, features, embeds)
    with torch.no_grad():
        for layer in heads.layers:
            layer.self_attn.k_proj.weight.mul_(2)
            layer.mlp.gate_proj.weight.mul_(2)
            layer.self_attn.v_proj.weight.mul_(2)
    torch.testing.assert_close(run(heads, features, embeds), before, rtol=0, atol=EXACT)
    changed = run(heads.train(), features, embeds)
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(run(heads.fuse_(), features, embeds), changed, rtol=0, atol=EXACT)


def test_casting_renews_joined_weights_and_keeps_the_frequencies():
    heads = make_heads().eval().fuse_()
    features, embeds = inputs()
    expected = run(heads, features, embeds)
    frequencies = heads.rotary.inv_freq.clone()
    heads.bfloat16()
    assert heads.dtype == torch.bfloat16
    assert torch.equal(heads.rotary.inv_freq, frequencies)
    found = run(heads, features, embeds)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.3)


def test_block_begins_with_its_anchor_and_goes_on_with_masks():
    heads, table = make_heads(), torch.arange(40.0).view(20, 2)
    found = heads.embed_blocks(
        torch.tensor([[5, 7]]), num_positions=3, embedding=lambda tokens: table[tokens]
    )
    assert found[0, :, 0].div(2).tolist() == [5, 3, 3, 7, 3, 3]
    own = make_heads(has_own_embeddings=True)
    found = own.embed_blocks(torch.tensor([[5]]), num_positions=2, embedding=torch.abs)
    assert torch.equal(found[0], own.embed_tokens.weight[[5, 3]])


def test_masks_show_the_text_before_the_anchor_and_the_block():
    config = make_heads(windows=(None, 3), is_causal=(True, False)).config
    causal, narrow = block_masks(
        config,
        torch.tensor([[[True, True, False]], [[False, True, True]]]),
        context_positions=torch.tensor([[0, 1, 2], [-1, 0, 1]]),
        anchors=torch.tensor([[2], [2]]),
        num_positions=2,
    )
    assert causal[:, 0].long().tolist() == [
        [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
    ]
    assert narrow[:, 0].long().tolist() == [
        [[1, 1, 0, 1, 1], [0, 1, 0, 1, 1]],
        [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    ]


def test_draft_vocabulary_maps_columns_to_tokens():
    heads = make_heads(draft_vocab_size=3, has_own_lm_head=True)
    assert heads.target_ids(torch.tensor([2, 0])).tolist() == [2, 0]
    heads.set_draft_columns_(torch.tensor([1, 4, 19]))
    assert heads.target_ids(torch.tensor([2, 0])).tolist() == [19, 1]
    hidden = torch.randn(1, 8, dtype=torch.float64)
    assert torch.equal(heads.logits(hidden, lm_head=torch.abs), hidden @ heads.lm_head.weight.T)
    assert make_heads().target_ids(torch.tensor([2, 0])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([1, 2], r"columns are 2, expected draft_vocab_size, 3, below vocab_size, 20"),
        ([1, 2, 20], r"columns run from 1 to 20, expected increasing ids below 20"),
        ([2, 1, 3], r"columns run from 1 to 3, expected increasing ids.*sort them"),
    ],
)
def test_draft_vocabularies_that_do_not_fit_are_refused(columns, words):
    heads = make_heads(draft_vocab_size=3, has_own_lm_head=True)
    with pytest.raises(OptionError, match=words):
        heads.set_draft_columns_(torch.tensor(columns))


def test_new_heads_begin_without_a_term_of_the_previous_token():
    heads = BlockHeads(BlockConfig(**{**NUMBERS, **MARKOV, "has_own_lm_head": True}))
    matrix = torch.randn(20, 8)
    heads.init_weights_(lm_weight=matrix, generator=torch.Generator().manual_seed(0))
    assert not heads.markov_head.markov_w2.weight.any()
    assert heads.markov_head.markov_w1.weight.std() > 0
    assert torch.equal(heads.lm_head.weight, matrix)
    assert heads.norm.weight.unique().tolist() == [1.0]
    assert heads.confidence_head.proj.bias.tolist() == [0.0]
