"""Counts of a round, and bounds on them, so that they do not rise again unnoticed."""

import json

import pytest
import torch
from torch import nn

from benchmarks.round import ledger
from benchmarks.round.ledger import CallCounter, Ledger, ReadCounter

BOUNDS = {
    "ngram": (16, 0, 2),
    "ngram on the device": (28, 0, 1),
    "draft": (46, 64, 18),
    "draft on the device": (70, 64, 1),
    "medusa": (48, 0, 6),
    "medusa on the device": (82, 0, 1),
    "eagle3": (72, 36, 33),
    "eagle3 on the device": (98, 36, 1.5),
    "block": (190, 0, 31),
    "block on the device": (225, 0, 1.5),  # and the padding, in the first round
}
"""Calls outside the target's forward: of a round, and of each run of a network that runs by level;
host reads. Bundled models, greedy, one prompt."""


@pytest.fixture(scope="module")
def found():
    lines = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger, "METHODS", tuple(name for name in BOUNDS if " " not in name))
        patched.setattr(ledger, "MAX_NEW_TOKENS", 24)
        patched.setattr("builtins.print", lines.append)
        options = ["--n", "1", "--counts", "--json"]
        for path in ([], ["--device-path"]):
            ledger.main(["--method", "all", *options, *path])
    records = [json.loads(line) for line in lines]
    names = {"host": "{}", "device": "{} on the device"}
    return {names[record["path"]].format(record["method"]): record for record in records}


@pytest.mark.parametrize("method", BOUNDS)
def test_a_round_makes_no_more_calls_and_reads_than_before(found, method):
    calls, calls_a_level, reads = BOUNDS[method]
    counted = found[method]
    assert counted["rounds"] > 1
    assert counted["calls_outside_target"] <= calls + calls_a_level * counted["levels"]
    assert counted["host_reads"] <= reads
    assert counted["calls_in_target"] > 500


def test_comparing_states_of_generators_is_no_read():
    book, state = Ledger(), torch.get_rng_state()
    with CallCounter(book), book.within("draft"):
        assert torch.equal(state, state.clone())
        assert book.reads["draft"] == 0
        assert torch.equal(torch.ones(1), torch.ones(1))
    assert book.reads["draft"] == 1


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
