"""Checks of kernels in captured graphs and in compiled functions."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, build, is_bitwise, random_parents, random_paths
from speclm.kernels import keep_path_, tree_attention, tree_words
from speclm.kernels.reference import keep_path_reference, tree_words_reference

Function = Callable[[], Any]
Check = tuple[str, Callable[[], str | None]]


def captured(function: Function, *, device: str) -> Function:
    """Return a function that replays a captured graph of another one; without a GPU, that one."""
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles and loads, which may not happen within a graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def graph_checks(*, device: str, backend: str, is_tiny: bool) -> Iterator[Check]:
    """Return the checks, by name."""
    sizes: dict[str, Any] = {"head_dim": 128, "groups": 4, "nodes": 64, "lengths": (1000, 513, 64)}
    if is_tiny:
        sizes = {"head_dim": 16, "groups": 2, "nodes": 5, "lengths": (20, 13, 7)}
    dtype = torch.float32 if is_tiny else torch.bfloat16
    plain = Case(**sizes, dtype=dtype, gap=0, has_own_trees=True)
    rich = replace(plain, has_padding=True, window=100, softcap=20.0, has_sinks=True)
    cases = {
        "plain": plain,
        "every feature": rich,
        "deterministic": replace(plain, is_deterministic=True),
        "one node": replace(plain, nodes=1),
    }
    for name, case in cases.items():
        yield (
            f"graph of attention, {name}",
            lambda case=case: _check_attention(case, device=device, backend=backend),
        )
    yield "graph of tree_words", lambda: _check_words(plain, device=device)
    yield "graph of keep_path_", lambda: _check_keep(plain, device=device)
    yield "graph of a whole round", lambda: _check_round(plain, device=device, backend=backend)


def _check_attention(case: Case, *, device: str, backend: str) -> str | None:
    """Replay with other lengths, trees and contents, and compare with eager calls."""
    call = build(case, device=device)
    still = call.arguments

    def attend() -> Tensor:
        return tree_attention(**still, check_values=False, backend=backend)

    replay = captured(attend, device=device)
    for seed in range(1, 5):
        other = build(_shorter(case, seed), device=device, seed=seed)
        _copy_into(still, other.arguments)
        expected = tree_attention(**other.arguments, backend=backend)
        complaint = is_bitwise(replay(), expected, lambda seed=seed: f"replay {seed}")
        if complaint is not None:
            return complaint
    return None


def _shorter(case: Case, seed: int) -> Case:
    """Return a case of the same shapes with other lengths."""
    lengths = tuple(max(length - 7 * seed, 0) for length in reversed(case.lengths))
    lost = max(case.lengths) - max(lengths)
    gap = lost % 3
    return replace(case, lengths=lengths, gap=gap, room=case.room + lost - gap)


def _copy_into(still: dict[str, Any], others: dict[str, Any]) -> None:
    for name, tensor in still.items():
        if isinstance(tensor, Tensor):
            tensor.copy_(others[name])


def _check_words(case: Case, *, device: str) -> str | None:
    rows, slots = len(case.lengths), case.nodes
    parents = random_parents(rows, slots, torch.Generator().manual_seed(0)).to(device)
    replay = captured(lambda: tree_words(parents, check_values=False), device=device)
    for seed in range(1, 9):
        other = random_parents(rows, slots, torch.Generator().manual_seed(seed)).roll(seed, 0)
        parents.copy_(other)
        words, depths = replay()
        expected_words, expected_depths = tree_words_reference(parents)
        if not torch.equal(words, expected_words) or not torch.equal(depths, expected_depths):
            return f"trees of seed {seed} differ from the reference"
    return None


def _check_keep(case: Case, *, device: str) -> str | None:
    generator = torch.Generator().manual_seed(0)
    batch = len(case.lengths)
    lengths = torch.tensor(case.lengths, device=device)
    begins = lengths.max().expand(batch).contiguous()
    kv_len = max(case.lengths) + case.nodes
    storage = torch.zeros(6, batch, 2, kv_len, case.head_dim, dtype=case.dtype, device=device)
    length = min(12, case.nodes)
    paths = random_paths(batch, length=length, nodes=case.nodes, generator=generator).to(device)
    tensors = {"prefix_lengths": lengths, "tree_starts": begins}
    replay = captured(
        lambda: keep_path_(storage, paths, **tensors, check_values=False), device=device
    )
    for seed in range(1, 9):
        contents = torch.randn(storage.shape, generator=generator).to(storage)
        storage.copy_(contents)
        moved = random_paths(batch, length=length, nodes=case.nodes, generator=generator)
        paths.copy_(moved)
        lengths.copy_(torch.tensor(case.lengths) - seed % 5)
        replay()
        keep_path_reference(contents, paths, **tensors)
        if not torch.equal(storage, contents):
            return f"paths of seed {seed} are not moved as by the reference"
    return None


def _check_round(case: Case, *, device: str, backend: str) -> str | None:
    """Replay words, attention and the move of the path as one graph, twice in a row."""
    call = build(case, device=device)
    still = dict(call.arguments)
    for name in ("ancestor_words", "depths"):
        del still[name]
    generator = torch.Generator().manual_seed(7)
    storage = torch.stack([still.pop("key"), still.pop("value")])
    storage = torch.randn(storage.shape, generator=generator).to(storage)
    batch = len(case.lengths)
    parents = random_parents(batch, case.nodes, generator).to(device)
    paths = random_paths(batch, length=5, nodes=case.nodes, generator=generator).to(device)
    places = {name: still[name] for name in ("prefix_lengths", "tree_starts")}

    def one_round() -> Tensor:
        words, depths = tree_words(parents, check_values=False)
        output = tree_attention(
            key=storage[0],
            value=storage[1],
            ancestor_words=words,
            depths=depths,
            **still,
            check_values=False,
            backend=backend,
        )
        keep_path_(storage, paths, **places, check_values=False)
        still["prefix_lengths"] += (paths >= 0).sum(1, dtype=torch.int32)
        still["tree_starts"].copy_(still["prefix_lengths"].max().expand(batch))
        return output

    before = [tensor.clone() for tensor in (storage, *places.values())]
    expected = [one_round().clone() for _ in range(2)]
    _restore([storage, *places.values()], before)
    replay = captured(one_round, device=device)
    _restore([storage, *places.values()], before)
    for index in range(2):
        found = replay().clone()
        complaint = is_bitwise(found, expected[index], lambda index=index: f"round {index}")
        if complaint is not None:
            return complaint
    return None


def _restore(tensors: list[Tensor], before: list[Tensor]) -> None:
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)


def check_compiled(*, device: str, backend: str, is_tiny: bool) -> str | None:
    """Compile functions around the kernels as one graph each, and compare with eager calls."""
    sizes: dict[str, Any] = {"head_dim": 128, "groups": 4, "nodes": 33, "lengths": (500, 129)}
    if is_tiny:
        sizes = {"head_dim": 16, "groups": 2, "nodes": 5, "lengths": (20, 13)}
    case = Case(**sizes, dtype=torch.float32, softcap=20.0, window=90, has_sinks=True)
    arguments = build(case, device=device).arguments
    query = arguments.pop("query")
    parents = random_parents(1, case.nodes, torch.Generator().manual_seed(3)).to(device)

    def attend(query: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        words, depths = tree_words(parents)
        given = {**arguments, "ancestor_words": words, "depths": depths}
        output, lse = tree_attention(query, **given, return_lse=True, backend=backend)
        return output.flatten(2), lse + 1

    compiler = "inductor" if device != "cpu" else "eager"  # which needs a C++ compiler there
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    for scale in (1.0, 0.5):
        expected, expected_lse = attend(query * scale, parents)
        output, lse = compiled(query * scale, parents)
        complaint = is_bitwise(output, expected, lambda: "output")
        complaint = complaint or is_bitwise(lse, expected_lse, lambda: "lse")
        if complaint is not None:
            return f"compiled {complaint}"
    return None


def check_compiled_keep(*, device: str) -> str | None:
    """Compile a function that moves paths between other operations."""
    generator = torch.Generator().manual_seed(5)
    storage = torch.randn(4, 2, 2, 40, 16, generator=generator).to(device)
    paths = random_paths(2, length=5, nodes=12, generator=generator).to(device)
    lengths = torch.tensor([20, 17], device=device)

    def move(storage: Tensor) -> Tensor:
        keep_path_(storage, paths, prefix_lengths=lengths)
        return storage + 1

    compiler = "inductor" if device != "cpu" else "eager"
    expected, found = storage.clone(), storage.clone()
    right = move(expected)
    result = torch.compile(move, fullgraph=True, backend=compiler)(found)
    same = torch.equal(found, expected) and torch.equal(result, right)
    return None if same else "compiled moves differ from eager ones"
