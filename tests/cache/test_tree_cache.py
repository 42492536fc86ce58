"""The cache against plain lists of the values that each row should hold."""

import os
from itertools import count
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speclm.cache import TreeCache
from speclm.cache.tree_cache import BLOCK
from speclm.errors import CacheError
from speclm.kernels.backends import VARIABLE

HEADS = 2


class Reference:
    """A cache next to a list of committed numbers per row; each slot holds its own number."""

    def __init__(
        self, batch: int, prompt: int, *, layers: int = 2, widths: tuple[int, int] = (3, 3)
    ) -> None:
        self.cache = TreeCache(num_layers=layers, num_padding=torch.zeros(batch, dtype=torch.long))
        self.widths, self._numbers = widths, count(1)
        self.pending: list[list[float]] = [[] for _ in range(batch)]
        self.rows = self._write(prompt)
        self.cache.commit_prompt()

    def append(self, nodes: int) -> None:
        self.cache.reserve(nodes)
        numbers = self._write(nodes)
        self.cache.append(nodes)
        for row, new in zip(self.pending, numbers, strict=True):
            row.extend(new)

    def keep(self, paths: list[list[int]], *, is_sent: bool = False) -> None:
        sent = None
        if is_sent:  # with any numbers after the longest path
            width = max(map(len, paths))
            rows = [path + [-1] * (width - len(path)) + [7] for path in paths]
            sent = torch.tensor(rows)
        self.cache.keep(paths, device_paths=sent)
        for row, (path, pending) in enumerate(zip(paths, self.pending, strict=True)):
            self.rows[row] += [pending[node] for node in path]
            pending.clear()

    def require_equal(self) -> None:
        cache = self.cache
        assert cache.host_lengths == [len(row) for row in self.rows]
        assert cache.lengths.tolist() == cache.host_lengths
        assert cache.tree_start == max(cache.host_lengths)
        assert cache.is_ragged == (len(set(cache.host_lengths)) > 1)
        assert cache.get_seq_length() == cache.tree_start + cache.num_pending
        for index, layer in enumerate(cache.layers):
            for offset, stored in enumerate((layer.keys, layer.values)):
                for row, numbers in enumerate(self.rows):
                    expected = self._tensor([numbers], index, offset)[0]
                    assert torch.equal(stored[row, :, : len(numbers)], expected)

    def _tensor(self, numbers: list[list[float]], layer: int, offset: int) -> Tensor:
        value = torch.tensor(numbers)[:, None, :, None] + 1000 * layer + 10000 * offset
        heads = torch.arange(HEADS)[:, None, None] * 1e5
        return (value + heads).expand(-1, -1, -1, self.widths[offset]).clone()

    def _write(self, slots: int) -> list[list[float]]:
        numbers = [[float(next(self._numbers)) for _ in range(slots)] for _ in self.pending]
        for index, layer in enumerate(self.cache.layers):
            keys, values = layer.update(
                self._tensor(numbers, index, 0), self._tensor(numbers, index, 1)
            )
            assert torch.equal(keys[:, :, -slots:], self._tensor(numbers, index, 0))
            assert torch.equal(values[:, :, -slots:], self._tensor(numbers, index, 1))
        return numbers


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, list[tuple[list[int], list[list[int]]]]]:
    """A batch, a prompt length, and rounds of forwards followed by the paths that are kept."""
    batch, prompt = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    plan = []
    for _ in range(draw(st.integers(1, 5))):
        forwards = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
        nodes = range(sum(forwards))
        paths = [sorted(draw(st.sets(st.sampled_from(nodes)))) for _ in range(batch)]
        plan.append((forwards, paths))
    return batch, prompt, plan


@given(case=rounds(), widths=st.sampled_from([(3, 3), (4, 2), (1, 5)]), is_sent=st.booleans())
def test_keep_equals_a_gather_of_each_rows_path(case, widths, is_sent):
    batch, prompt, plan = case
    reference = Reference(batch, prompt, widths=widths)
    for forwards, paths in plan:
        for nodes in forwards:
            reference.append(nodes)
        reference.keep(paths, is_sent=is_sent)
        reference.require_equal()


@given(case=rounds(), widths=st.sampled_from([(3, 3), (4, 2), (1, 5)]), is_sent=st.booleans())
def test_keep_through_the_op_equals_a_gather_of_each_rows_path(case, widths, is_sent):
    with mock.patch.dict(os.environ, {VARIABLE: "reference"}):
        test_keep_equals_a_gather_of_each_rows_path.hypothesis.inner_test(case, widths, is_sent)


@pytest.mark.parametrize(
    ("backend", "is_asked"), [(None, False), ("sdpa", False), ("reference", True), ("triton", True)]
)
def test_slots_move_through_the_op_where_the_environment_asks_for_it(backend, is_asked):
    others = {name: value for name, value in os.environ.items() if name != VARIABLE}
    chosen = {} if backend is None else {VARIABLE: backend}
    with (
        mock.patch.dict(os.environ, others | chosen, clear=True),
        mock.patch("speclm.cache.tree_cache.keep_path_") as op,
    ):
        reference = Reference(2, 4, widths=(4, 2))
        reference.append(5)
        reference.cache.keep([[0, 1], []])  # in place already
        assert not op.called
        reference.append(5)
        reference.cache.keep([[1, 3], [2]])
    assert op.call_count == is_asked  # one for all layers
    for call in op.call_args_list:
        arena, paths = call.args
        assert arena.shape == (2, 2, HEADS, BLOCK, 6)  # values next to keys
        assert paths.tolist() == [[1, 3], [2, -1]]
        assert call.kwargs["prefix_lengths"].tolist() == [6, 4]
        assert call.kwargs["tree_starts"].tolist() == [6, 6]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [1, BLOCK - 2, BLOCK, BLOCK + 1])
def test_storage_grows_over_the_borders_of_blocks(prompt, batch):
    reference = Reference(batch, prompt)
    for number in range(4):
        reference.append(100)
        reference.keep([list(range(row, 100, 1 + number)) for row in range(batch)])
        reference.require_equal()
    assert reference.cache.capacity % BLOCK == 0


def test_growth_in_the_midst_of_a_round_moves_pending_nodes_too():
    reference = Reference(2, 3)
    for _ in range(4):
        reference.append(BLOCK // 2)
    reference.keep([[0, 2 * BLOCK - 1], list(range(BLOCK, BLOCK + 5))])
    reference.require_equal()


def test_few_rounds_allocate_storage():
    reference = Reference(1, 5)
    storages = set()
    for _ in range(60):
        reference.append(8)
        reference.keep([[0, 1, 2]])
        storages.add(reference.cache.layers[0].keys.data_ptr())
    assert len(storages) == 1


def test_layers_of_equal_shape_share_one_storage():
    reference = Reference(1, 4, layers=3)
    reference.append(2)
    pointers = {layer.keys.untyped_storage().data_ptr() for layer in reference.cache.layers}
    pointers |= {layer.values.untyped_storage().data_ptr() for layer in reference.cache.layers}
    assert len(pointers) == 1


def test_layers_of_unequal_shape_are_kept_alike():
    cache = TreeCache(num_layers=2, num_padding=torch.tensor([0]))
    wide, narrow = torch.randn(1, 2, 4, 6), torch.randn(1, 1, 4, 3)
    cache.layers[0].update(wide, wide)
    cache.layers[1].update(narrow, narrow)
    cache.commit_prompt()
    cache.reserve(3)
    more_wide, more_narrow = torch.randn(1, 2, 3, 6), torch.randn(1, 1, 3, 3)
    cache.layers[0].update(more_wide, more_wide)
    cache.layers[1].update(more_narrow, more_narrow)
    cache.append(3)
    cache.keep([[0, 2]])
    assert torch.equal(cache.layers[0].keys[:, :, 4:6], more_wide[:, :, [0, 2]])
    assert torch.equal(cache.layers[1].values[:, :, 4:6], more_narrow[:, :, [0, 2]])


def test_empty_paths_forget_the_round():
    reference = Reference(2, 4)
    reference.append(5)
    reference.keep([[], []])
    reference.require_equal()
    reference.append(2)
    reference.keep([[1], []])
    reference.require_equal()


@pytest.mark.parametrize("bound", [-1, -3, 5, 2, 100])
def test_crop_keeps_the_first_slots_and_drops_pending_nodes(bound):
    reference = Reference(2, 4)
    reference.append(4)
    reference.keep([[0, 1, 3], [2]])
    reference.append(2)
    reference.cache.crop(bound)
    reference.pending = [[], []]
    for row in reference.rows:
        del row[bound if bound < 0 else min(bound, len(row)) :]
    assert reference.cache.num_pending == 0
    reference.require_equal()


def test_forward_beyond_the_reserved_room_is_an_error():
    reference = Reference(1, 4)
    reference.append(1)
    layer = reference.cache.layers[0]
    too_many = torch.zeros(1, HEADS, 2 * BLOCK, 3)
    with pytest.raises(CacheError, match=r"room for 256 slots.*DynamicCache"):
        layer.update(too_many, too_many)


def test_padding_is_known_before_the_first_forward():
    assert TreeCache(num_layers=1, num_padding=torch.tensor([0, 2])).has_padding
    assert not TreeCache(num_layers=1, num_padding=torch.tensor([0, 0])).has_padding


def test_an_unused_cache_is_empty():
    cache = TreeCache(num_layers=2, num_padding=torch.tensor([0]))
    assert cache.get_seq_length() == 0
    assert cache.layers[0].get_mask_sizes(3) == (3, 0)
    assert cache.layers[0].get_max_length() == -1
