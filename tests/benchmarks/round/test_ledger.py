"""Counts of a round, and bounds on them, so that they do not rise again unnoticed."""

import json

import pytest
import torch
from torch import nn

from benchmarks.round import ledger
from benchmarks.round.ledger import CallCounter, Ledger, ReadCounter

BOUNDS = {
    "ngram": (24, 0, 7),
    "draft": (50, 78, 24),
    "medusa": (90, 0, 11),
    "eagle3": (60, 80, 34),
    "block": (300, 0, 32),
}
"""Calls outside the target's forward: of a round, and of each run of a network that runs by level;
host reads. Bundled models, greedy, one prompt."""


@pytest.fixture(scope="module")
def found():
    lines = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger, "METHODS", tuple(BOUNDS))
        patched.setattr(ledger, "MAX_NEW_TOKENS", 24)
        patched.setattr("builtins.print", lines.append)
        ledger.main(["--method", "all", "--n", "1", "--counts", "--json"])
    records = [json.loads(line) for line in lines]
    return {record["method"]: record for record in records}


@pytest.mark.parametrize("method", BOUNDS)
def test_a_round_makes_no_more_calls_and_reads_than_before(found, method):
    calls, calls_a_level, reads = BOUNDS[method]
    counted = found[method]
    assert counted["rounds"] > 1
    assert counted["calls_outside_target"] <= calls + calls_a_level * counted["levels"]
    assert counted["host_reads"] <= reads
    assert counted["calls_in_target"] > 500


def test_calls_reads_and_bytes_are_counted_by_stage_inside_rounds_only():
    book, network = Ledger(), nn.Linear(4, 4)
    network.forward = book.wrapped("draft network", network.forward)
    ones = torch.ones(1, 4)
    with torch.no_grad(), ReadCounter(book), CallCounter(book):
        network(ones).tolist()
        with book.within("draft"):
            scores = network(ones)
            scores.tolist()
            _ = scores[scores > 0]
            torch.tensor([1])
        with book.within("accept"):
            bool(scores.sum() > 0)
    assert book.runs == 1
    assert book.calls["draft network"] >= 1
    assert (book.reads["draft"], book.reads["accept"]) == (3, 1)
    assert book.allocated["draft network"] >= 16
    assert set(book.calls) == {"draft", "draft network", "accept"}
