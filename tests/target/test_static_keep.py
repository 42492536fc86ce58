"""Acceptance and moves in the cache as one stage, against those on the host."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance.exact import accept_exact, read_accepted
from speclm.cache import TreeCache
from speclm.target.static_keep import accept_and_keep, padded_parts
from speclm.tree import from_parents
from tests.stand_ins import replaying, unread

VOCAB, BUCKET = 4, 8
CPU = torch.device("cpu")


def cache_of(lengths, num_nodes, generator):
    """A cache whose rows have these lengths, with as many pending nodes."""
    cache = TreeCache(num_layers=2, num_padding=torch.zeros(len(lengths), dtype=torch.long))
    for count, paths in ((1, [range(1)] * len(lengths)), (9, [range(n - 1) for n in lengths])):
        cache.reserve(count)
        write(cache, len(lengths), count, generator)
        cache.append(count)
        cache.keep([list(path) for path in paths])
    cache.reserve(BUCKET)
    write(cache, len(lengths), num_nodes, generator)
    cache.append(num_nodes)
    return cache


def write(cache, batch, count, generator):
    for layer in cache.layers:
        layer.update(*(torch.randn(batch, 2, count, 3, generator=generator) for _ in range(2)))


def contents(cache):
    return [
        part[row, :, :length]
        for part in cache.parts()
        for row, length in enumerate(cache.host_lengths)
    ]


@st.composite
def rounds(draw):
    """Lengths, trees and a seed of a round."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    num_nodes = draw(st.integers(1, BUCKET))
    rows = [[0, *(draw(st.integers(0, node)) for node in range(1, num_nodes))] for _ in lengths]
    for row in rows:  # nothing hangs on padding
        for node in range(1, num_nodes):
            parent = row[node]
            if parent and row[parent] == parent:
                row[node] = 0
    return lengths, rows, draw(st.integers(0, 99))


@given(rounds())
def test_paths_tokens_and_slots_are_those_of_the_host(case):
    lengths, parents, seed = case
    generator = torch.Generator().manual_seed(seed)
    topology = from_parents(parents, device=CPU)
    batch, nodes = len(lengths), topology.num_nodes
    tokens = torch.randint(0, VOCAB, (batch, nodes), generator=generator)
    logits = torch.randn(batch, nodes, VOCAB, generator=generator)
    caches = [cache_of(lengths, nodes, torch.Generator().manual_seed(seed)) for _ in range(2)]
    expected = accept_exact(tokens, logits.argmax(2), topology)
    caches[0].keep(expected.paths)

    wide = torch.zeros(batch, BUCKET, VOCAB)
    wide[:, :nodes] = logits
    padded = torch.zeros(batch, BUCKET, dtype=torch.long)
    padded[:, :nodes] = tokens
    parts = padded_parts(topology, BUCKET, batch=batch)
    (storage,) = caches[1].arenas
    path, chosen = accept_and_keep(wide, padded, *parts, caches[1].lengths, storage)
    found = read_accepted(path, chosen, topology)
    assert found.paths == expected.paths
    assert found.emitted == expected.emitted
    assert found.roots_or_sent([]).tolist() == [row[-1] for row in expected.emitted]
    assert torch.equal(found.path, expected.path[:, : found.path.shape[1]])
    caches[1].keep(found.paths, device_paths=found.sent_path, have_moved=True)
    assert caches[1].host_lengths == caches[0].host_lengths
    assert caches[1].lengths.tolist() == caches[0].host_lengths
    for one, other in zip(*map(contents, caches), strict=True):
        assert torch.equal(one, other)


def inputs_of(seed, parents):
    generator = torch.Generator().manual_seed(seed)
    topology = from_parents([parents], device=CPU)
    parts = padded_parts(topology, BUCKET, batch=1)
    tokens = torch.randint(0, 2, (1, BUCKET), generator=generator)
    logits = torch.randn(1, BUCKET, 2, generator=generator)
    return [logits, tokens, *parts, torch.tensor([3 + seed])]


def test_replays_follow_other_trees_tokens_and_lengths():
    engine = replaying()
    for seed, parents in enumerate([[0, 0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 1, 2, 3, 4]]):
        inputs = inputs_of(seed, parents)
        storages = [torch.arange(2.0 * 32).view(2, 1, 1, 32, 1) for _ in range(2)]
        if seed == 0:
            recorded = storages[0]
        recorded.copy_(storages[1])
        found = engine.run(accept_and_keep, inputs, [recorded], is_repeatable=False)
        expected = accept_and_keep(*inputs, storages[1])
        assert all(map(torch.equal, found, expected))
        assert torch.equal(recorded, storages[1])
    assert len(engine._prepared) == 1


def test_it_is_one_graph_without_breaks_and_reads_nothing():
    torch._dynamo.reset()
    traced = torch.compile(accept_and_keep, fullgraph=True, dynamic=False, backend="eager")
    inputs = [*inputs_of(1, [0, 0, 1, 1]), torch.zeros(2, 1, 1, 32, 1)]
    expected = accept_and_keep(*inputs)
    assert all(map(torch.equal, traced(*inputs), expected))
    with unread():
        accept_and_keep(*inputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_are_padded_once_for_each_size(batch):
    topology = from_parents([[0, 0, 1]], device=CPU)
    parts = padded_parts(topology, 4, batch=batch)
    assert padded_parts(topology, 4, batch=batch) is parts
    assert [tuple(part.shape) for part in parts] == [
        (batch, 4),
        (batch, 4, 4),
        (batch, 4),
        (batch, 4, 5),
    ]
