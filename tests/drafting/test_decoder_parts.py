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
    states, angles = draw(2, 5, 3, 8), draw(2, 5, 4, seed=1).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(states, states, angles.cos(), angles.sin(), unsqueeze_dim=2)
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
    states = draw(2, 5, 8, seed=9)
    if not isinstance(part, Projections):
        return part(states)
    angles = draw(2, 5, 4, seed=8)
    queries, keys, values = part.project(states, signed(angles.cos(), angles.sin()))
    assert queries.shape == (2, 4, 5, 4)
    assert keys.shape == values.shape == (2, 2, 5, 4)
    mixed = queries + keys.repeat_interleave(2, 1) + values.repeat_interleave(2, 1)
    return part.output(mixed)


@pytest.mark.parametrize("name", PARTS)
def test_the_second_form_changes_nothing_keeps_the_state_and_can_be_dropped(name):
    part = with_drawn_weights(PARTS[name]())
    expected, names = run(part), set(part.state_dict())
    part.fuse_()
    torch.testing.assert_close(run(part), expected, rtol=0, atol=EXACT)
    assert set(part.state_dict()) == names
    part.separate_()
    torch.testing.assert_close(run(part), expected, rtol=0, atol=EXACT)


def test_one_map_is_not_copied():
    part = nn.Linear(4, 3)
    weight, bias = joined(part)
    assert weight.data_ptr() == part.weight.data_ptr()
    assert bias is not None
    assert bias.data_ptr() == part.bias.data_ptr()


def test_causal_masks_are_cut_from_one_that_grows():
    masks, device = CausalMasks(), torch.device("cpu")
    for num_new, num_cached in ((1, 0), (3, 5), (20, 2), (2, 700), (4, 0)):
        found = masks.cut(num_new, num_cached=num_cached, device=device)
        seen = torch.ones(num_new, num_cached + num_new, dtype=torch.bool).tril(num_cached)
        assert torch.equal(found[0, 0], seen)
    moved = masks.cut(2, num_cached=3, device=torch.device("meta"))
    assert (moved.shape, moved.device.type) == ((1, 1, 2, 5), "meta")
