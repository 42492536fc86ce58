import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speclm.errors import OptionError
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig

CLOSE = 1e-5  # float32, products of 12 terms


def random_heads(**numbers: object) -> MedusaHeads:
    config = MedusaHeadsConfig(hidden_size=12, vocab_size=30, **numbers)
    heads = MedusaHeads(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return heads


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_own_lm_head", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_stacked_heads_equal_layers_computed_one_by_one(num_layers, has_own_lm_head, has_bias):
    heads = random_heads(
        num_heads=4, num_layers=num_layers, has_own_lm_head=has_own_lm_head, has_bias=has_bias
    )
    hidden = torch.randn(7, 12)
    shared = nn.Linear(12, 30, bias=False)
    found = heads(hidden, lm_head=shared)
    assert found.shape == (7, 4, 30)
    for head in range(4):
        states = hidden
        for layer in range(num_layers):
            bias = heads.bias[layer, head] if heads.bias is not None else None
            states = states + F.silu(F.linear(states, heads.weight[layer, head], bias))
        own = heads.lm_weight[head] if heads.lm_weight is not None else shared.weight
        assert torch.allclose(found[:, head], F.linear(states, own), atol=CLOSE)


def test_only_the_heads_asked_for_are_computed():
    heads = random_heads(num_heads=4)
    hidden = torch.randn(2, 12)
    shared = nn.Linear(12, 30, bias=False)
    whole = heads(hidden, lm_head=shared)
    found = heads(hidden, lm_head=shared, num_heads=2)
    assert found.shape[1] == 2
    assert torch.allclose(found, whole[:, :2], atol=CLOSE)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("has_own_lm_head", [True, False])
def test_fresh_heads_are_near_the_targets_own_opinion(num_layers, has_own_lm_head):
    config = MedusaHeadsConfig(
        hidden_size=12, vocab_size=30, num_layers=num_layers, has_own_lm_head=has_own_lm_head
    )
    heads = MedusaHeads(config)
    shared = nn.Linear(12, 30, bias=False)
    heads.init_weights_(shared.weight, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(5, 12)
    found = heads(hidden, lm_head=shared)
    if num_layers == 1:
        assert torch.allclose(found, shared(hidden)[:, None].expand_as(found), atol=CLOSE)
    else:
        assert not torch.equal(heads.weight[0, 0], heads.weight[0, 1])
        assert (heads.weight[-1] == 0).all()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 65}, "num_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_impossible_numbers_are_named(numbers, words):
    with pytest.raises(OptionError, match=words):
        MedusaHeadsConfig(**{"hidden_size": 8, "vocab_size": 30, **numbers})


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_layers", "num_heads"])
@pytest.mark.parametrize("value", [2.5, float("nan"), "a", None, True])
def test_what_is_no_whole_number_is_named_with_its_type(name, value):
    config = MedusaHeadsConfig(8, 30)
    object.__setattr__(config, name, value)  # the type checks of tests would find it first
    with pytest.raises(OptionError, match=f"{name} is {value!r}, a {type(value).__name__}, exp"):
        config.__post_init__()
