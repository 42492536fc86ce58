"""Counters, by hand."""

import json

import pytest

from speclm.stats import PHASES, Pause, RowStats, SpeculationStats


@pytest.fixture
def stats() -> SpeculationStats:
    """Two rows: kept 2 of a chain of 3, then 0 of 3, then 1 of 1; and 3 of a tree of 5 nodes."""
    first, second = RowStats(), RowStats()
    first.add_round(accepted_length=2, depth=3, num_draft_tokens=3)
    first.add_round(accepted_length=0, depth=3, num_draft_tokens=3)
    first.add_round(accepted_length=1, depth=1, num_draft_tokens=1)
    second.add_round(accepted_length=3, depth=3, num_draft_tokens=5)
    return SpeculationStats(rows=[first, second], rounds=3)


def test_counters_of_a_row(stats):
    first = stats.rows[0]
    assert first.accepted_lengths == [2, 0, 1]
    assert first.tau == pytest.approx(2.0)  # (3 + 1 + 2) tokens in 3 rounds
    assert first.histogram == [1, 1, 1]
    assert first.offered == [3, 2, 2]
    assert first.accepted == [2, 1]
    assert first.num_draft_tokens == 7


def test_total_is_over_all_rows(stats):
    assert stats.tau == pytest.approx(1 + 6 / 4)
    assert stats.accepted_length_histogram == [1, 1, 1, 1]
    assert stats.total.offered == [4, 3, 3]
    assert stats.total.accepted == [3, 2, 1]
    assert stats.acceptance_by_depth == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert stats.kept_by_depth == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert stats.tau == pytest.approx(1 + sum(stats.kept_by_depth))
    assert stats.total.num_draft_tokens == 12


def test_depths_that_never_survived_have_acceptance_zero():
    row = RowStats()
    row.add_round(accepted_length=0, depth=2, num_draft_tokens=2)
    assert SpeculationStats(rows=[row]).acceptance_by_depth == [0.0, 0.0]


def test_no_round_at_all():
    stats = SpeculationStats(rows=[RowStats()])
    assert stats.tau == 1.0
    assert stats.accepted_length_histogram == []
    assert stats.acceptance_by_depth == stats.kept_by_depth == []
    assert stats.to_dict()["draft_acceptance_rate"] == 0.0
    assert SpeculationStats().tau == 1.0


def test_phases_are_timed_even_when_they_fail(stats, monkeypatch):
    clock = iter([1.0, 1.5, 7.0, 7.25, 8.0, 8.03])
    monkeypatch.setattr("speclm.stats.perf_counter", lambda: next(clock))
    with stats.phase("prefill"):
        pass
    with pytest.raises(KeyError), stats.phase("verify"):
        raise KeyError
    with stats.phase("verify"):
        pass
    per_round = stats.milliseconds_per_round
    assert per_round["verify"] == pytest.approx((250 + 30) / 3)
    assert per_round["draft"] == 0.0
    assert set(per_round) == set(PHASES) - {"prefill"}
    assert stats.to_dict()["prefill_milliseconds"] == pytest.approx(500.0)


def test_record_has_vllms_names_and_is_json(stats):
    stats.verification = "tree attention"
    record = json.loads(json.dumps(stats.to_dict()))
    assert record["mean_acceptance_length"] == pytest.approx(2.5)
    assert record["draft_acceptance_rate"] == pytest.approx(6 / 12)
    assert record["acceptance_histogram"] == [1, 1, 1, 1]
    assert record["num_spec_steps"] == 4
    assert record["num_accepted_draft_tokens"] == 6
    assert record["num_draft_tokens"] == 12
    assert record["num_target_forwards"] == 3
    assert record["verification"] == "tree attention"
    assert record["is_lossy"] is False
    assert record["fallbacks"] == []
    assert [row["num_draft_tokens"] for row in record["rows"]] == [7, 5]


def test_pauses_are_summed_up_in_one_line(stats):
    assert stats.pause_summary is None
    stats.num_plain_rounds = 2
    assert stats.pause_summary == "2 of 3 rounds without a draft"
    stats.pauses.append(Pause(1, "round of 11.2 ms for 1.1 tokens, plain 7.9 ms"))
    assert stats.pause_summary == (
        "2 of 3 rounds without a draft; paused, after round 1: "
        "round of 11.2 ms for 1.1 tokens, plain 7.9 ms"
    )
    stats.pauses.append(Pause(3, "x"))
    assert stats.pause_summary.endswith("paused 2 times, after round 3: x")


def test_pauses_are_in_the_record(stats):
    assert stats.to_dict()["pauses"] == []
    assert stats.to_dict()["num_plain_rounds"] == 0
    stats.num_plain_rounds = 2
    stats.pauses.append(Pause(1, "x"))
    record = json.loads(json.dumps(stats.to_dict()))
    assert record["num_plain_rounds"] == 2
    assert record["pauses"] == [{"round": 1, "reason": "x"}]


def test_merged_counters_are_those_of_all_calls():
    parts = [
        SpeculationStats(rows=[RowStats(accepted_lengths=[1])], rounds=1, fallbacks=["x"]),
        SpeculationStats(rows=[RowStats(accepted_lengths=[3])], rounds=2, fallbacks=["x", "y"]),
    ]
    parts[0].seconds["draft"], parts[1].seconds["draft"] = 0.5, 1.0
    parts[0].num_plain_rounds, parts[1].num_plain_rounds = 1, 2
    parts[0].num_regular_steps, parts[1].num_regular_steps = 3, 4
    parts[0].plain_round_seconds, parts[0].is_lossy, parts[1].verification = 0.5, True, "chains"
    parts[1].pauses.append(Pause(1, "y"))
    merged = SpeculationStats.merge(parts)
    assert (merged.rounds, merged.tau, merged.fallbacks) == (3, 3.0, ["x", "y"])
    assert merged.seconds["draft"] == 1.5
    assert (merged.num_plain_rounds, merged.pauses) == (3, [Pause(2, "y")])  # after the first call
    assert (merged.num_regular_steps, merged.plain_round_seconds) == (7, 0.5)
    assert (merged.is_lossy, merged.verification) == (True, "chains")
    assert SpeculationStats.merge([]) == SpeculationStats()


def test_rounds_are_counted_in_rows_that_emitted_tokens():
    stats = SpeculationStats(rows=[RowStats(), RowStats()])
    stats.count_round([[0, 2], []], sizes=[4], depths=[2])
    stats.count_round([[0], [0, 1]], sizes=[3, 2], depths=[2, 1])
    assert stats.rounds == 2
    assert [row.accepted_lengths for row in stats.rows] == [[1, 0], [1]]
    assert [row.num_draft_tokens for row in stats.rows] == [5, 1]


def test_printed_counters_are_readable(stats):
    text = str(stats)
    assert "tau         2.50 tokens per target forward" in text
    assert "1 + mean accepted length" in text
    assert "accepted    0.50 of 12 draft tokens" in text
    assert "by position 0.75 0.67 0.33" in text
    assert "time not known" in text
    assert "speed-up    not known" in text
    stats.seconds["verify"], stats.is_lossy = 2.0, True
    stats.plain_round_seconds, stats.num_regular_steps = 0.5, 6
    assert "tokens      10 in 2.00 s, 5.0 tokens/s" in str(stats)
    assert "speed-up    about 1.50" in str(stats)
    assert "exact, lossy: the distribution is not the base's" in str(stats)
    assert str(SpeculationStats(fallbacks=["num_beams=2"])) == "regular generation: num_beams=2"
    assert "nothing drafted" in str(SpeculationStats(rows=[RowStats()]))
