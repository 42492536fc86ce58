"""Masks against brute force, masks for kernels, and masks that are computed only when read."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speclm.attention import TreeMask, TreeStep, active_step, tree_step
from speclm.cache import TreeCache
from speclm.kernels.inputs import MAX_SLOTS
from speclm.tree.enclosing import enclosing_tree
from speclm.tree.topology import chain, from_parents
from speclm.tree.words import unpack_words
from tests.attention.tree_models import CPU, cache_of


def brute_force(
    lengths: Sequence[int],
    padding: Sequence[int],
    parents: Sequence[Sequence[int]],
    window: int | None,
) -> list[list[list[bool]]]:
    """Return for each row, node and slot whether the node sees it, by following parents."""
    start, mask = max(lengths), []
    for row, length in enumerate(lengths):
        shape = parents[row if len(parents) > 1 else 0]
        rows = []
        for node in range(len(shape)):
            path = [node]
            while path[-1] and shape[path[-1]] != path[-1]:
                path.append(shape[path[-1]])
            position = length + len(path) - 1
            seen = {slot: slot for slot in range(padding[row], length)}
            seen |= {start + above: position - up for up, above in enumerate(path)}
            rows.append(
                [
                    slot in seen and (window is None or position - seen[slot] < window)
                    for slot in range(start + len(shape))
                ]
            )
        mask.append(rows)
    return mask


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]]]:
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    padding = [draw(st.integers(0, length - 1)) for length in lengths]
    parents = []
    for _ in range(draw(st.sampled_from([1, batch]))):
        row = [0]
        for node in range(1, nodes):
            row.append(draw(st.sampled_from([p for p in range(node) if row[p] != p or not p])))
        parents.append(row)
    return lengths, padding, parents


@given(case=steps(), window=st.one_of(st.none(), st.integers(1, 12)))
def test_mask_equals_brute_force(case, window):
    lengths, padding, parents = case
    topology = from_parents(parents, device=CPU)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of(lengths, padding))
    mask, expected = step.mask(window), brute_force(lengths, padding, parents, window)
    if mask is None:  # regular generation's own mask is by slot, which here is the position
        assert step.is_regular
        assert topology.num_nodes == len(set(lengths)) == 1
        assert not any(padding)
        return
    mask = mask.expand(len(lengths), -1, -1, -1)
    assert mask[:, 0].tolist() == expected
    bias = step.bias(window, torch.float32)
    assert bias.shape == mask.shape
    assert torch.equal(bias == 0, mask)
    assert torch.equal(bias == torch.finfo(torch.float32).min, ~mask)


def test_window_counts_positions_and_not_slots():
    # Nodes 1 and 2 are siblings: the second is two slots behind the root, but one position.
    topology = from_parents([[0, 0, 0]], device=CPU)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([4], [0]))
    assert step.mask(2)[0, 0].int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 0, 1],
    ]


def test_one_node_that_sees_everything_needs_no_mask():
    topology = chain(0)
    regular = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5], [0]))
    assert regular.mask(None) is None
    assert regular.bias(None, torch.float32) is None
    assert regular.mask(4) is None
    assert TreeStep(None, torch.arange(3)[None], cache_of([5], [0], pending=2)).is_regular
    ragged = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5, 3], [0, 0]))
    assert ragged.mask(None)[1, 0].int().tolist() == [[1, 1, 1, 0, 0, 1]]
    padded = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5, 5], [0, 2]))
    assert padded.mask(None)[1, 0].int().tolist() == [[0, 0, 1, 1, 1, 1]]


def test_mask_of_a_window_is_built_once_a_step():
    topology = chain(2)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5], [0]))
    assert step.mask(3) is step.mask(3)
    assert step.bias(3, torch.float32) is step.bias(3, torch.float32)
    assert step.bias(3, torch.bfloat16).dtype == torch.bfloat16


def test_mask_of_a_step_is_repeated_once_and_a_models_own_every_time():
    cache = TreeCache(num_layers=1, num_padding=torch.tensor([0, 1]))
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    step = TreeStep(visible, torch.arange(3)[None], cache)
    bias = step.bias(None, torch.float32)
    first = step.repeated(bias, 2)
    assert step.repeated(bias, 2) is first
    assert torch.equal(first, torch.cat([bias, bias], dim=2))
    other = bias.clone()
    assert step.repeated(other, 2) is not step.repeated(other, 2)
    assert torch.equal(step.repeated(other, 3), torch.cat([bias] * 3, dim=2))


@given(case=steps())
def test_masks_for_kernels_show_the_same_slots(case):
    lengths, padding, parents = case
    topology = from_parents(parents, device=CPU)
    cache = cache_of(lengths, padding)
    mask, packed = topology.ancestor_mask, topology.ancestor_words
    for visible, words in ((mask, None), (mask, packed), (None, packed)):
        step = TreeStep(visible, topology.depths, cache, words=words)
        from_mask = TreeStep(mask, topology.depths, cache)
        assert step.is_regular == from_mask.is_regular
        if not step.is_regular:
            assert torch.equal(step.mask(3), from_mask.mask(3))
        kernel_mask = step.kernel_mask(CPU)
        assert step.kernel_mask(CPU) is kernel_mask
        assert torch.equal(kernel_mask.ancestor_words, topology.ancestor_words)
        assert torch.equal(kernel_mask.depths, topology.depths)
        assert kernel_mask.prefix_lengths.tolist() == lengths
        assert (kernel_mask.prefix_starts is None) == (not any(padding))
        if kernel_mask.prefix_starts is not None:
            assert kernel_mask.prefix_starts.tolist() == padding
        begins = kernel_mask.tree_starts
        begins = kernel_mask.prefix_lengths if begins is None else begins
        assert begins.tolist() == [max(lengths)] * len(lengths)


def test_single_node_sees_every_pending_slot():
    step = TreeStep(None, torch.arange(4)[None], cache_of([5, 3], [0, 0], pending=3))
    words = step.kernel_mask(CPU).ancestor_words
    assert unpack_words(words, num_bits=64)[0, 0].int().tolist() == [1] * 4 + [0] * 60


def test_kernels_are_given_contiguous_words_and_depths_of_any_topology():
    rows = from_parents([[0, 0, 1], [0, 0, 0]], device=CPU)  # parts of what was sent
    tree = enclosing_tree(depth=2, width=1, num_ranks=2, is_chained=False, device=CPU)
    chosen = tree.choose(torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.long), num_nodes=3)
    for topology in (rows, chosen.topology()):
        step = TreeStep(
            None, topology.depths, cache_of([5, 3], [0, 0]), words=topology.ancestor_words
        )
        mask = step.kernel_mask(CPU)
        assert mask.ancestor_words.is_contiguous()
        assert mask.depths.is_contiguous()


def test_mask_stays_uncomputed_where_kernels_do_not_need_it(monkeypatch):
    topology = from_parents([[0, 0, 0]], device=CPU)
    cache = cache_of([5, 3], [0, 0])
    step = TreeStep(topology.ancestor_mask, topology.depths, cache)
    assert not isinstance(step.lazy_bias(None, torch.float32), TreeMask)  # on a CPU
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    step = TreeStep(topology.ancestor_mask, topology.depths, cache)
    mask = step.lazy_bias(4, torch.bfloat16)
    assert isinstance(mask, TreeMask)
    assert (mask.window, mask.dtype, mask.shape) == (4, torch.bfloat16, (2, 1, 3, 8))
    assert not step._masks
    assert torch.equal(mask.dense(), step.bias(4, torch.bfloat16))
    regular = TreeStep(None, torch.zeros(1, 1, dtype=torch.long), cache_of([5], [0]))
    assert regular.lazy_bias(None, torch.float32) is None


def test_masks_of_large_trees_are_computed(monkeypatch):
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    num_slots = MAX_SLOTS + 1
    visible = torch.eye(num_slots, dtype=torch.bool)[None]
    step = TreeStep(visible, torch.zeros(1, num_slots, dtype=torch.long), cache_of([2], [0]))
    assert not isinstance(step.lazy_bias(None, torch.float32), TreeMask)


def test_step_is_active_only_inside():
    step = TreeStep(None, torch.zeros(1, 1, dtype=torch.long), cache_of([5], [0]))
    seen = []

    def fail() -> None:
        seen.append(active_step())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tree_step(step):
        fail()
    assert seen == [step]
    assert active_step() is None


DENSE = torch.tensor([[[[0.0, -1.0, -1.0], [0.0, 0.0, -1.0]]]])


class Counted:
    """A mask and how often it was computed."""

    def __init__(self, device: str = "cpu") -> None:
        self.calls = 0
        self.mask = TreeMask.of(
            self._compute,
            7,
            shape=tuple(DENSE.shape),
            dtype=DENSE.dtype,
            device=torch.device(device),
        )

    def _compute(self) -> Tensor:
        self.calls += 1
        return DENSE


def test_shape_type_and_device_are_known_without_the_numbers():
    counted = Counted()
    mask = counted.mask
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.ndim, mask.dtype) == (DENSE.shape, 4, torch.float32)
    assert mask.device == torch.device("cpu")
    assert mask.is_floating_point()
    assert not mask.requires_grad
    assert mask.to(torch.float32) is mask
    assert mask.to("cpu") is mask
    assert counted.calls == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask + 1,
        lambda mask: mask[:, :, :1],
        lambda mask: mask[:, :, :, :2],
        lambda mask: mask.to(torch.bfloat16),
        lambda mask: mask.bool(),
        lambda mask: torch.where(mask < 0, mask, 5.0),
        lambda mask: torch.cat([mask, mask], dim=1),
        lambda mask: mask.expand(3, -1, -1, -1),
        lambda mask: mask.repeat_interleave(2, dim=1),
        Tensor.clone,
        lambda mask: mask.contiguous().view(2, 3),
        torch.ones_like,
    ],
)
def test_operations_run_on_the_computed_mask(change):
    changed = change(Counted().mask)
    assert not isinstance(changed, TreeMask)
    assert torch.equal(changed, change(DENSE.clone()))


def test_moves_to_another_device_do_not_compute_it():
    counted = Counted()
    moved = counted.mask.to("meta")
    assert isinstance(moved, TreeMask)
    assert moved.device.type == "meta"
    assert moved.window == 7
    assert counted.calls == 0
    assert moved.dense().device.type == "meta"


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.add_(1.0),
        lambda mask: mask.masked_fill_(mask < 0, -2.0),
        lambda mask: mask[..., 0].fill_(-5.0),
        lambda mask: mask.__setitem__((slice(None), 0, 0), -5.0),
    ],
)
def test_a_write_changes_the_mask_for_good(write):
    own, expected = DENSE.clone(), DENSE.clone()
    mask = TreeMask.of(
        lambda: own, None, shape=tuple(own.shape), dtype=own.dtype, device=own.device
    )
    moved = mask.to("meta")
    assert not mask.is_touched
    write(mask)
    write(expected)
    assert mask.is_touched
    assert moved.is_touched
    assert torch.equal(mask.dense(), expected)


def test_copies_are_ordinary_tensors():
    for other in (copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))):
        found = other(Counted().mask)
        assert not isinstance(found, TreeMask)
        assert torch.equal(found, DENSE)


def test_comparisons_are_those_of_the_mask():
    mask = Counted().mask
    assert bool((mask == DENSE).all())
