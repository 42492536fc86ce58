import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import OptionError
from speclm.training.length_sampler import LengthSampler


@given(st.lists(st.integers(1, 99), min_size=1, max_size=400), st.integers(1, 5))
def test_every_row_is_drawn_once(lengths, batch_size):
    sampler = LengthSampler(lengths, batch_size=batch_size)
    assert sorted(sampler) == list(range(len(sampler))) == list(range(len(lengths)))


def test_rows_of_a_batch_are_about_equally_long():
    sampler = LengthSampler([length % 100 for length in range(200)], batch_size=4)
    rows = [row % 100 for row in sampler]
    spreads = [max(batch) - min(batch) for batch in zip(*[iter(rows)] * 4, strict=True)]
    assert max(spreads) <= 2


def test_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(64))
    first, again = LengthSampler(lengths, batch_size=2), LengthSampler(lengths, batch_size=2)
    start = list(first)
    first.set_epoch(3)
    again.set_epoch(3)
    assert list(first) == list(first) == list(again) != start
    assert list(LengthSampler(lengths, batch_size=2, seed=1)) != start


def test_batch_size_below_one_is_refused():
    with pytest.raises(OptionError, match="batch_size is 0"):
        LengthSampler([1], batch_size=0)
