import pytest
import torch

from speclm.methods.block.layer import BlockAttention, BlockLayer
from tests.methods.block.block_heads import make_heads

EXACT = 1e-12  # float64, another order of sums


def run(layer: BlockLayer, *, num_blocks=1, mask=None):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation = torch.ones(1, 6, 4, dtype=torch.float64), torch.zeros(1, 6, 4, dtype=torch.float64)
    context = draw(2, 2, 5, 4), draw(2, 2, 5, 4)
    return layer(
        draw(2, 6, 8), rotation=rotation, context=context, mask=mask, num_blocks=num_blocks
    )


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_weights_change_nothing_and_can_be_separated(num_blocks, bias):
    layer = make_heads(has_attention_bias=bias).layers[0]
    before = run(layer, num_blocks=num_blocks)
    names = set(layer.state_dict())
    layer.fuse_()
    torch.testing.assert_close(run(layer, num_blocks=num_blocks), before, rtol=0, atol=EXACT)
    assert set(layer.state_dict()) == names
    with torch.no_grad():
        layer.self_attn.q_proj.weight.zero_()
        layer.mlp.up_proj.weight.zero_()
    torch.testing.assert_close(run(layer, num_blocks=num_blocks), before, rtol=0, atol=EXACT)
    layer.separate_()
    assert (run(layer, num_blocks=num_blocks) - before).abs().max() > 0.01


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
