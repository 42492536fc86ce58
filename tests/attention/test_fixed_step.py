"""A step whose lengths the host does not know."""

import torch

from speclm.attention import FixedStep, TreeMask
from speclm.kernels.backends import VARIABLE
from speclm.tree import from_parents


def build():
    topology = from_parents([[0, 0, 1], [0, 0, 0]], device=torch.device("cpu"))
    asked = []

    def bias(window, dtype):
        asked.append(window)
        return torch.zeros(2, 1, 3, 16, dtype=dtype)

    lengths, padding = torch.tensor([7, 5]), torch.tensor([0, 2])
    step = FixedStep(
        topology.depths, topology.ancestor_mask, lengths, padding, capacity=16, bias=bias
    )
    return step, topology, asked


def test_kernels_are_given_lengths_padding_and_where_the_nodes_begin():
    step, topology, _ = build()
    mask = step.kernel_mask(torch.device("cpu"))
    assert mask.prefix_lengths.tolist() == [7, 5]
    assert mask.prefix_starts.tolist() == [0, 2]
    assert mask.tree_starts.tolist() == [7, 7]
    assert torch.equal(mask.ancestor_words, topology.ancestor_words)
    assert torch.equal(mask.depths, topology.depths)


def test_a_mask_is_computed_only_if_kernels_do_not_replace_it(monkeypatch):
    step, _, asked = build()
    monkeypatch.setenv(VARIABLE, "reference")
    lazy = step.lazy_bias(4, torch.float32)
    assert isinstance(lazy, TreeMask)
    assert tuple(lazy.shape) == (2, 1, 3, 16)
    assert asked == []
    assert step.repeated(lazy, 2).shape == (2, 1, 6, 16)
    monkeypatch.setenv(VARIABLE, "sdpa")
    assert type(step.lazy_bias(None, torch.float32)) is torch.Tensor
    assert asked == [4, None]
