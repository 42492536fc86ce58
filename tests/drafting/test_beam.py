"""Trees that grow on the device, against a search on the host."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.devices import device_path
from speclm.drafting.beam import grow, grow_on_device, reads_levels
from speclm.drafting.levels import GrownTreeConfig, RunByLevelConfig
from speclm.drafting.search import search_on_host
from speclm.tree.plan import TreePlan
from tests.drafting.test_search import DEPTH, ROOTS, VOCAB, Table, paths_of
from tests.stand_ins import unread

CPU = torch.device("cpu")
CONFIG = {"min_probability": 0.0, "min_confidence": 0.0}


def rows_of(draft, grown):
    """Tokens below each row's root with what is known of the row, without padding."""
    parents = draft.topology.host_parents
    for row, tokens in enumerate(draft.tokens.tolist()):
        own = parents[row if len(parents) > 1 else 0]
        paths, expansions = {0: (tokens[0],)}, {}
        for node in range(1, len(own)):
            if own[node] != node:
                paths[node] = (*paths[own[node]], tokens[node])
                expansions[paths[node]] = grown[row].expansions[node - 1]
        yield [paths[node] for node in sorted(paths)][1:], expansions


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(2, 4),
    branches=st.integers(1, VOCAB),
    num_nodes=st.integers(1, 14),
    num_levels=st.integers(1, DEPTH),
)
def test_the_best_nodes_are_those_of_the_search_on_the_host(
    seed, width, branches, num_nodes, num_levels
):
    config = GrownTreeConfig(width=width, num_draft_tokens=num_nodes, **CONFIG)
    levels = min(num_levels, num_nodes)
    bounds = [levels] * len(ROOTS)
    host = search_on_host(
        Table(seed, branches=branches),
        ROOTS,
        config=config,
        bounds=bounds,
        leaf_tokens=frozenset(),
    )
    draft, grown = grow_on_device(
        Table(seed, branches=branches), ROOTS, config=config, num_levels=num_levels
    )
    assert draft.topology.max_depth == levels
    for row, ((paths, expansions), expected) in enumerate(
        zip(rows_of(draft, grown), host, strict=True)
    ):
        wanted = paths_of(expected, int(ROOTS[row]))
        assert sorted(paths) == sorted(wanted)
        known = dict(zip(wanted, expected.expansions, strict=True))
        for path, expansion in expansions.items():
            # The host does not ask below nodes that cannot lead to a better one.
            assert known[path] is None or known[path] == expansion


@given(seed=st.integers(0, 10**6), branches=st.integers(1, VOCAB), num_nodes=st.integers(1, 9))
def test_with_a_width_of_one_siblings_fill_the_first_levels(seed, branches, num_nodes):
    config = GrownTreeConfig(width=1, num_draft_tokens=num_nodes, **CONFIG)
    table = Table(seed, branches=branches)
    draft, grown = grow_on_device(table, ROOTS, config=config, num_levels=DEPTH)
    levels = min(DEPTH, num_nodes)
    assert draft.topology.is_on_host
    assert draft.topology.num_nodes - 1 == min(num_nodes, levels * branches)
    for row, (paths, expansions) in enumerate(rows_of(draft, grown)):
        best = (int(ROOTS[row]),)
        for level in range(levels):
            ranked = table.after(row, best).topk(branches).indices.tolist()
            found = [path[-1] for path in paths if path[:-1] == best]
            assert found == ranked[: len(found)]
            best = (*best, ranked[0])
            assert expansions[best] == ((level, 0) if level + 1 < levels else None)
        sizes = [sum(len(path) == level + 2 for path in paths) for level in range(levels)]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("width", [1, 3])
def test_nothing_is_read_until_the_tree_is_asked_for(width):
    table, config = Table(7), GrownTreeConfig(width=width, num_draft_tokens=9, **CONFIG)
    found = {}

    def candidates(nodes, level):
        if level not in found:
            found[level] = table(nodes, level)
        return found[level]

    for level_by_level in (False, True):  # constants are made once
        with unread() if level_by_level else torch.no_grad():
            draft, grown = grow_on_device(candidates, ROOTS, config=config, num_levels=3)
            assert draft.topology.is_on_host == (width == 1)
    assert [len(grown[row].expansions) for row in range(2)] == [9, 9]


def test_no_levels_make_a_root():
    config = GrownTreeConfig(width=2, **CONFIG)
    draft, grown = grow_on_device(Table(1), ROOTS, config=config, num_levels=0)
    assert draft.tokens.tolist() == ROOTS[:, None].tolist()
    assert [grown[row].expansions for row in range(2)] == [[], []]


def test_probabilities_that_are_no_numbers_make_a_draft_all_the_same():
    def candidates(nodes, level):
        values = torch.full((2, nodes[0].shape[1], 3), torch.nan)
        return values, torch.zeros(values.shape, dtype=torch.long)

    config = GrownTreeConfig(width=2, num_draft_tokens=5, **CONFIG)
    draft, _ = grow_on_device(candidates, ROOTS, config=config, num_levels=3)
    assert draft.tokens.shape == (2, 6)
    for parents in draft.topology.host_parents:
        assert all(parent <= node for node, parent in enumerate(parents))


def test_levels_are_read_on_a_cpu_and_for_thresholds_of_a_plan():
    planned = TreePlan(4, 9, min_probability=0.1)
    assert reads_levels(None, CPU)
    assert reads_levels(planned, torch.device("cuda"))
    with device_path():
        assert not reads_levels(None, CPU)
        assert not reads_levels(TreePlan(4, 9), CPU)


def test_both_ways_are_open_to_a_proposer():
    config = RunByLevelConfig(width=2, num_draft_tokens=4, **CONFIG)
    options = {"config": config, "bounds": [2, 2], "leaf_tokens": frozenset()}
    host, _ = grow(Table(5), ROOTS, reads=True, **options)
    device, _ = grow(Table(5), ROOTS, reads=False, **options)
    assert host.topology.is_on_host
    assert not device.topology.is_on_host
    for one, other in zip(host.tokens.tolist(), device.tokens.tolist(), strict=True):
        assert sorted(one) == sorted(other)
