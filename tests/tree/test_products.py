import math
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from speclm.tree.static import likeliest_paths

CLOSE = 1e-9  # sums of a few logarithms, in another order

LEVELS = st.lists(
    st.lists(st.floats(-6.0, -0.01), min_size=1, max_size=4).map(
        lambda level: sorted(level, reverse=True)
    ),
    min_size=1,
    max_size=4,
)


def paths_of(nodes):
    paths = [()]
    for node in nodes:
        paths.append((*paths[node.parent], node.rank))
        assert len(paths[-1]) == node.depth + 1
    return paths[1:]


def score(path, levels):
    return sum(level[rank] for level, rank in zip(levels, path, strict=False))


@given(LEVELS, st.integers(1, 12), st.floats(-12.0, -0.5))
def test_no_path_left_out_is_likelier_than_one_taken(levels, num_nodes, min_score):
    taken = paths_of(likeliest_paths(levels, num_nodes=num_nodes, min_score=min_score))
    every = [
        path
        for depth in range(1, len(levels) + 1)
        for path in product(*(range(len(level)) for level in levels[:depth]))
        if score(path, levels) >= min_score
    ]
    assert len(taken) == len(set(taken)) == min(num_nodes, len(every))
    left = set(every) - set(taken)
    if taken and left:
        worst = min(score(path, levels) for path in taken)
        assert max(score(path, levels) for path in left) <= worst + CLOSE


def test_paths_come_with_their_prefixes_and_in_order_of_probability():
    levels = [[math.log(0.6), math.log(0.3)], [math.log(0.9)]]
    nodes = likeliest_paths(levels, num_nodes=9, min_score=math.log(0.3))
    assert paths_of(nodes) == [(0,), (0, 0), (1,)]


def test_nothing_is_likely_enough():
    assert likeliest_paths([[-3.0]], num_nodes=4, min_score=-2.0) == []
