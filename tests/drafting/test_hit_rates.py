import pytest

from speclm.drafting.hit_rates import HitRates


def learn(rates: HitRates, code: int, hits: int, misses: int) -> None:
    for is_hit in [True] * hits + [False] * misses:
        rates.count(code, is_hit=is_hit)
    for _ in range(32):
        rates.end_round()


def test_rates_start_where_they_are_told_and_move_to_what_is_measured():
    rates = HitRates([(0.8, 0.2)])
    rates.begin("greedy")
    assert rates.rate(1) == pytest.approx(0.8)
    assert rates.rate(2) == pytest.approx(0.2)
    learn(rates, 1, hits=100, misses=300)
    assert rates.rate(1) == pytest.approx(0.26, abs=0.03)
    assert rates.rate(2) == pytest.approx(0.2)


def test_rates_stay_the_same_within_an_update():
    rates = HitRates([(0.5,)])
    rates.begin("greedy")
    before = rates.rate(1)
    for _ in range(50):
        rates.count(1, is_hit=True)
    rates.end_round()
    assert rates.rate(1) == before


def test_sources_that_agree_are_likelier_than_either():
    rates = HitRates([(0.5,), (0.4,)])
    rates.begin("greedy")
    first, second = rates.strides
    assert 0.5 < rates.rate(first + second) < 0.7
    learn(rates, first + second, hits=400, misses=0)
    assert rates.rate(first + second) > 0.97


def test_what_is_measured_of_a_key_counts_where_it_meets_others():
    rates = HitRates([(0.5,), (0.4,)])
    rates.begin("greedy")
    first, second = rates.strides
    before = rates.rate(first + second)
    learn(rates, first, hits=0, misses=200)
    assert rates.rate(first + second) < before


def test_settings_have_rates_of_their_own_and_the_oldest_is_dropped():
    rates = HitRates([(0.5,)])
    rates.begin("greedy")
    learn(rates, 1, hits=100, misses=0)
    rates.begin("sampled")
    assert rates.rate(1) == pytest.approx(0.5)
    rates.begin("greedy")
    assert rates.rate(1) > 0.9
    for other in range(8):
        rates.begin(other)
    rates.begin("greedy")
    assert rates.rate(1) == pytest.approx(0.5)


def test_smaller_noise_makes_a_candidate_likelier():
    rates = HitRates([(0.5,)])
    rates.begin("sampled")
    by_bucket = [rates.rate(1 + bucket * rates.noise_stride) for bucket in range(1, 5)]
    assert by_bucket == sorted(by_bucket, reverse=True)
    assert by_bucket[0] > 0.6
    assert by_bucket[-1] < 0.4


def test_old_counts_fade():
    rates = HitRates([(0.5,)])
    rates.begin("greedy")
    for _ in range(50):
        learn(rates, 1, hits=100, misses=0)
    for _ in range(30):
        learn(rates, 1, hits=0, misses=100)
    assert rates.rate(1) < 0.3


def test_forgotten_rates_start_again_in_every_setting():
    rates = HitRates([(0.8,)])
    for setting in ("greedy", "sampled"):
        rates.begin(setting)
        learn(rates, 1, hits=0, misses=100)
    rates.forget()
    for setting in ("greedy", "sampled"):
        rates.begin(setting)
        assert rates.rate(1) == pytest.approx(0.8)
