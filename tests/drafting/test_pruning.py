import pytest

from speclm.drafting.levels import least_probability


def test_the_threshold_of_a_single_row_is_the_option():
    assert least_probability(0.09, num_rows=1) == 0.09
    assert least_probability(0.09, num_rows=0) == 0.09


def test_more_rows_ask_for_likelier_nodes_up_to_a_bound():
    assert least_probability(0.09, num_rows=4) == pytest.approx(0.18)
    assert least_probability(0.09, num_rows=1000) == 0.5
    assert least_probability(0.7, num_rows=1000) == 0.7


def test_no_threshold_stays_none():
    assert least_probability(0.0, num_rows=64) == 0.0
