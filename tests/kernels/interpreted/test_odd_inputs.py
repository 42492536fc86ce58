"""Arguments of a wrong kind, which the shape checks of the other test runs would stop before."""

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels import keep_path_, tree_attention, tree_words
from tests.grids import turns

ODD_NUMBERS = {
    "window": [2.5, True, "3", 2**40, float("nan"), torch.tensor(3)],
    "num_splits": [2.5, True, "2", 10**6],
    "scale": ["1", 1j, True, torch.ones(2), float("inf")],
    "softcap": ["a", True, 0.0],
    "deterministic": ["x", 1],
    "return_lse": [None],
    "backend": [None, 3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ODD_NUMBERS.items() for value in values]
)
def test_numbers_of_another_kind_are_refused(name, value):
    with pytest.raises(KernelError, match=f"{name} is .*, expected"):
        tree_attention(**{**arguments(), name: value})


@pytest.mark.parametrize("name", ["query", "key", "prefix_lengths", "ancestor_words", "depths"])
@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_anything_but_a_tensor_is_refused(name, value):
    with pytest.raises(KernelError, match=f"{name} is a {type(value).__name__}, expected a tensor"):
        tree_attention(**{**arguments(), name: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda given: {"query": given["query"].to_sparse()},
        lambda given: {"query": given["query"].to(torch.complex64).conj()},
        lambda given: {"query": given["query"][0, 0, 0, 0]},
        lambda given: {"query": given["query"][..., :0], "key": given["key"][..., :0]},
        lambda given: {"query": given["query"][:, :0]},
        lambda given: {
            name: given[name].to(torch.float8_e5m2) for name in ("query", "key", "value")
        },
        lambda given: {"sinks": torch.zeros(4, dtype=torch.long)},
        lambda given: {"depths": given["depths"].long() + 2**40},
        lambda given: {name: part.to("meta") for name, part in given.items()},
    ],
)
def test_tensors_of_another_kind_are_refused(change):
    given = arguments()
    with pytest.raises(KernelError, match=r"ordinary tensor|expected|meta device"):
        tree_attention(**{**given, **change(given)})


def arguments() -> dict[str, torch.Tensor]:
    key, value = torch.randn(2, 1, 2, 9, 16)
    return {
        "query": torch.randn(1, 4, 3, 16),
        "key": key,
        "value": value,
        "prefix_lengths": torch.tensor([6]),
        "ancestor_words": torch.tensor([[[1], [3], [5]]]),
        "depths": torch.tensor([[0, 1, 1]]),
    }


@pytest.mark.parametrize("odd", [None, [[0]], torch.zeros(1, 1).to_sparse()])
def test_other_ops_refuse_what_is_no_ordinary_tensor(odd):
    with pytest.raises(KernelError, match="parents is"):
        tree_words(odd)
    storage, lengths = torch.zeros(1, 1, 1, 8, 4), torch.tensor([4])
    with pytest.raises(KernelError, match="storage is"):
        keep_path_(odd, torch.tensor([[0]]), prefix_lengths=lengths)
    with pytest.raises(KernelError, match="paths is"):
        keep_path_(storage, odd, prefix_lengths=lengths)
    with pytest.raises(KernelError, match="prefix_lengths is"):
        keep_path_(storage, torch.tensor([[0]]), prefix_lengths=odd)


def test_other_ops_refuse_odd_backends_meta_tensors_and_storage_that_overlaps():
    parents, lengths = torch.tensor([[0, 0]]), torch.tensor([4])
    storage, paths = torch.zeros(1, 1, 1, 8, 4), torch.tensor([[0]])
    for backend in (None, 3, "sdpa"):
        with pytest.raises(KernelError, match="backend is"):
            tree_words(parents, backend=backend)
        with pytest.raises(KernelError, match="backend is"):
            keep_path_(storage, paths, prefix_lengths=lengths, backend=backend)
    with pytest.raises(KernelError, match="meta device"):
        tree_words(parents.to("meta"))
    with pytest.raises(KernelError, match="meta device"):
        keep_path_(storage.to("meta"), paths.to("meta"), prefix_lengths=lengths.to("meta"))
    overlapping = torch.zeros(64).as_strided((1, 1, 1, 8, 4), (32, 32, 32, 2, 1))
    with pytest.raises(KernelError, match="let none overlap"):
        keep_path_(overlapping, paths, prefix_lengths=lengths)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_unchecked_parents_that_lie_outside_are_taken_for_padding(backend):
    parents = torch.tensor([[0, 0, 99, -5, 1]])
    words, depths = tree_words(parents, check_values=False, backend=backend)
    assert words[0, :, 0].tolist() == [1, 3, 4, 8, 19]
    assert depths.tolist() == [[0, 1, 0, 0, 2]]


@pytest.mark.parametrize(("num_splits", "deterministic"), turns([1, 2, 3, 7], [False, True]))
def test_padding_beyond_the_prefix_hides_no_part_of_the_tree(num_splits, deterministic):
    parents = torch.tensor([[max(node - 1, 0) for node in range(48)]])
    words, depths = tree_words(parents)
    key, value = torch.randn(2, 1, 1, 48, 16)
    query = torch.randn(1, 2, 48, 16)
    options = {"ancestor_words": words, "depths": depths, "num_splits": num_splits}
    options |= {"prefix_lengths": torch.tensor([0]), "deterministic": deterministic}
    expected = tree_attention(query, key, value, backend="reference", **options)
    found = tree_attention(
        query,
        key,
        value,
        prefix_starts=torch.tensor([40]),
        check_values=False,
        backend="triton",
        **options,
    )
    torch.testing.assert_close(found, expected)
