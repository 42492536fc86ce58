from dataclasses import replace

import pytest

from speclm.bench import Outcome, Pair, Spread, compare, plain_decoder, speculative_decoder
from speclm.bench.pairs import Latency
from speclm.errors import MeasurementError
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.ngram.proposer import NgramProposer


def logging_method(method, log):
    def generate(call):
        log.append(method.name)
        return method.generate(call)

    return replace(method, generate=generate)


def wrong_method(base, *, promises_identity=True):
    def generate(call):
        output = plain_decoder(base).generate(call).clone()
        output[0, call.input_ids.shape[1]] += 1
        return output

    method = plain_decoder(base)
    return replace(method, name="wrong", generate=generate, promises_identity=promises_identity)


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_latency_is_mean_and_percentiles_of_the_calls():
    calls = [Outcome([[1]], float(seconds), None) for seconds in range(11)]
    halves = [number / 2 for number in range(21)]
    assert Latency.of(calls) == Latency(mean=5.0, p50=5.0, p90=9.0, quantiles=halves)
    assert Latency.of(calls[3:4]) == Latency(mean=3.0, p50=3.0, p90=3.0, quantiles=[3.0] * 21)


def test_ratio_is_of_seconds_for_equal_outputs_and_of_time_per_token_otherwise():
    plain = Outcome([[1, 2, 3, 4]], 2.0, None)
    assert Pair(plain, Outcome([[1, 2, 3, 4]], 1.0, None)).ratio == 2.0
    assert Pair(plain, Outcome([[1, 2]], 1.0, None)).ratio == 1.0


def test_runs_rotate_from_call_to_call(tiny_base, calls_of):
    log = []
    plain = logging_method(plain_decoder(tiny_base), log)
    method = logging_method(speculative_decoder("none", tiny_base, None), log)
    other = logging_method(replace(plain_decoder(tiny_base), name="other"), log)
    for methods, turns in (
        ([method], ["plain none", "none plain"] * 2),
        ([method, other], ["plain none other", "none other plain", "other plain none"]),
    ):
        log.clear()
        calls = calls_of(max_new_tokens=2)[: len(turns)]
        compare(plain, methods, calls, base=tiny_base, num_warmup=0)
        assert log == " ".join(turns).split()


def test_warmup_is_not_counted_and_pairs_are_reported(tiny_base, calls_of):
    reported = []
    (comparison,) = compare(
        plain_decoder(tiny_base),
        [speculative_decoder("ngram", tiny_base, NgramProposer())],
        calls_of("t1.0"),
        base=tiny_base,
        on_pair=reported.append,
    )
    assert reported == comparison.pairs
    assert comparison.num_identical == len(comparison.pairs) == 4
    assert comparison.is_honest
    assert comparison.stats is not None
    assert len(comparison.stats.rows) == 4
    assert comparison.tokens_per_second > 0
    assert comparison.plain_tokens_per_second > 0


def test_a_wrong_output_is_listed_and_not_honest(tiny_base, calls_of):
    calls = calls_of(max_new_tokens=2)[:2]
    (comparison,) = compare(
        plain_decoder(tiny_base), [wrong_method(tiny_base)], calls, base=tiny_base
    )
    assert comparison.num_identical == 0
    assert [found.position for found in comparison.divergences] == [0, 0]
    assert not comparison.is_honest


def test_a_method_that_promises_nothing_may_differ(tiny_base, calls_of):
    method = wrong_method(tiny_base, promises_identity=False)
    (comparison,) = compare(
        plain_decoder(tiny_base), [method], calls_of(max_new_tokens=2), base=tiny_base
    )
    assert comparison.is_honest
    assert comparison.num_identical == 0


def test_no_call_is_begun_when_the_time_is_up(tiny_base, calls_of):
    plain = plain_decoder(tiny_base)
    (comparison,) = compare(
        plain, [plain], calls_of(max_new_tokens=1), base=tiny_base, max_seconds=0.0
    )
    assert len(comparison.pairs) == 1


def test_no_prompts_is_an_error(tiny_base):
    plain = plain_decoder(tiny_base)
    with pytest.raises(MeasurementError, match="no prompts"):
        compare(plain, [plain], [], base=tiny_base)


def test_methods_forget_after_the_warmup_and_before_each_comparison(tiny_base, calls_of):
    log = []
    proposer = LookupProposer(tiny_base)
    method = speculative_decoder("lookup", tiny_base, proposer)

    def forget():
        method.forget()
        log.append(f"forget, {proposer.memory.num_pairs} pairs left")

    logged = replace(logging_method(method, log), forget=forget)
    calls = calls_of(max_new_tokens=8)[:1]
    for num_warmup in (1, 0):
        compare(plain_decoder(tiny_base), [logged], calls, base=tiny_base, num_warmup=num_warmup)
    forgotten = "forget, 0 pairs left"
    assert log == ["lookup", forgotten, "lookup", forgotten, "lookup"]
