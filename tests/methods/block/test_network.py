import pytest
import torch

from speclm.methods.block.network import block_masks
from tests.methods.block.block_heads import draft_by_loop, make_heads

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


def run(heads, features, embeds, *, anchor=None):
    """Draft one block after all of the context."""
    kv_len, num_positions = features.shape[1], embeds.shape[1]
    anchor = kv_len if anchor is None else anchor
    positions = torch.arange(kv_len)[None]
    keys, values = heads.context(features, positions)
    masks = block_masks(
        heads.config,
        (positions < anchor).expand(len(features), -1)[:, None],
        context_positions=positions,
        anchors=torch.full((len(features), 1), anchor),
        num_positions=num_positions,
    )
    block = anchor + torch.arange(num_positions)[None]
    return heads(embeds, block, keys, values, masks)


@pytest.mark.parametrize("setting", SETTINGS)
def test_states_are_those_of_a_loop_over_positions_heads_and_keys(setting):
    heads = make_heads(**SETTINGS[setting])
    features, embeds = inputs()
    expected = draft_by_loop(heads, features[0], embeds[0], anchor=6)
    found = run(heads, features, embeds)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=CLOSE)
    joined = run(heads.fuse_(), features, embeds)
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
    found = heads(embeds, at, *heads.context(features, positions), masks, num_blocks=3)
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
    whole = heads.context(features, positions)
    pieces = [
        heads.context(features[:, i:j], positions[:, i:j]) for i, j in ((0, 3), (3, 4), (4, 7))
    ]
    for part, wanted in zip(zip(*pieces, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=3), wanted, rtol=0, atol=EXACT)


def test_shorter_causal_block_is_a_prefix_of_the_longer_one():
    heads = make_heads()
    features, embeds = inputs()
    whole, part = run(heads, features, embeds), run(heads, features, embeds[:, :2])
    torch.testing.assert_close(part, whole[:, :2], rtol=0, atol=EXACT)
