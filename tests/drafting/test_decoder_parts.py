"""Parts of small decoders: both forms of their weights give the same."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from speclm.drafting.decoder_parts import (
    CausalMasks,
    FixedNorm,
    GatedMLP,
    Norm,
    Projections,
    joined,
    rotated,
    signed,
)

EXACT = 1e-12  # float64, another order of sums


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_drawn_weights(part):
    part = part.double()
    with torch.no_grad():
        for index, parameter in enumerate(part.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=index))
    return part


def test_rotation_is_that_of_llama():
    states, angles = draw(2, 3, 5, 8), draw(2, 5, 4, seed=1).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(states, states, angles.cos(), angles.sin())
    found = rotated(states, signed(angles.cos(), angles.sin()))
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fixed_norms_are_those_of_each_head(dtype):
    states, weight = draw(2, 5, 3, 8).to(dtype), draw(3, 8, seed=1).to(dtype)
    found = FixedNorm(weight, 1e-5)(states)
    expected = [
        torch.rms_norm(states[:, :, head], (8,), weight[head], eps=1e-5) for head in range(3)
    ]
    exact = {torch.float64: EXACT, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=0, atol=exact)


def test_norm_in_half_precision_is_that_of_pytorch_bit_by_bit():
    norm = Norm(8, eps=1e-5).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(draw(8))
    states = draw(2, 5, 8, seed=1).to(torch.bfloat16)
    expected = norm(states)
    norm.fuse_()
    assert torch.equal(norm(states), expected)


@pytest.mark.parametrize("states", [torch.zeros(1, 4), torch.full((1, 4), 1e-20)])
def test_norm_of_almost_nothing_is_finite(states):
    norm = Norm(4, eps=1e-6)
    expected = norm(states)
    norm.fuse_()
    torch.testing.assert_close(norm(states), expected)


PARTS = {
    "norm": lambda: Norm(8, eps=1e-5),
    "mlp": lambda: GatedMLP(hidden_size=8, inner_size=12, activation="silu"),
    "projections": lambda: attention(norm_eps=None, bias=False),
    "with biases": lambda: attention(norm_eps=None, bias=True),
    "with norms": lambda: attention(norm_eps=1e-5, bias=False),
}


def attention(*, norm_eps, bias):
    return Projections(
        input_size=8,
        hidden_size=8,
        head_dim=4,
        num_heads=4,
        num_kv_heads=2,
        biases=(bias, bias),
        norm_eps=norm_eps,
    )


def run(part):
    states = draw(10, 8, seed=9)
    if isinstance(part, GatedMLP):
        return part(draw(10, 8, seed=7), states)
    if not isinstance(part, Projections):
        return part(states)
    angles = draw(2, 5, 4, seed=8)
    queries, keys, values = part.project(states, signed(angles.cos(), angles.sin()), batch=2)
    assert queries.shape == (2, 4, 5, 4)
    assert keys.shape == values.shape == (2, 2, 5, 4)
    mixed = queries + keys.repeat_interleave(2, 1) + values.repeat_interleave(2, 1)
    return part.add_output(draw(10, 8, seed=7), mixed)


@pytest.mark.parametrize("name", PARTS)
def test_the_second_form_changes_nothing_keeps_the_state_and_can_be_dropped(name):
    part = with_drawn_weights(PARTS[name]())
    expected, names = run(part), set(part.state_dict())
    part.fuse_()
    torch.testing.assert_close(run(part), expected, rtol=0, atol=EXACT)
    assert set(part.state_dict()) == names
    part.separate_()
    torch.testing.assert_close(run(part), expected, rtol=0, atol=EXACT)


def test_products_are_those_of_the_maps_one_after_another_and_one_map_is_not_copied():
    first, second = with_drawn_weights(nn.Linear(4, 3)), with_drawn_weights(nn.Linear(4, 2))
    states, residual = draw(5, 4), draw(5, 5, seed=2)
    expected = torch.cat((first(states), second(states)), dim=-1)
    both = joined(first, second)
    torch.testing.assert_close(both(states), expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(
        both.added(residual, states), residual + expected, rtol=0, atol=EXACT
    )
    with torch.no_grad():
        changed = joined(first)
        first.weight.zero_()
        first.bias.fill_(1.0)
    assert changed(states).eq(1).all()


def test_causal_masks_are_cut_from_one_that_grows():
    masks, like = CausalMasks(), torch.zeros(1, dtype=torch.float64)
    for num_new, num_cached in ((1, 0), (3, 5), (20, 2), (2, 700), (4, 0)):
        found = masks.cut(num_new, num_cached=num_cached, like=like)
        seen = torch.ones(num_new, num_cached + num_new, dtype=torch.bool).tril(num_cached)
        expected = torch.zeros(seen.shape, dtype=torch.float64)
        assert torch.equal(found[0, 0], expected.masked_fill(~seen, -torch.inf))
    for moved in (torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.bfloat16)):
        cut = masks.cut(2, num_cached=3, like=moved)
        assert (cut.shape, cut.device, cut.dtype) == ((1, 1, 2, 5), moved.device, moved.dtype)
