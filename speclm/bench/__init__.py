"""Measures decoding: paired with plain decoding, identity first, every figure with its spread."""

from speclm.bench.arms import (
    Arm,
    Outcome,
    assisted_arm,
    plain_arm,
    prompt_lookup_arm,
    speculative_arm,
)
from speclm.bench.calls import SETTINGS, Call, make_calls, setting_options
from speclm.bench.divergence import Divergence
from speclm.bench.grid import Cell, Measured, measure_grid
from speclm.bench.pairs import Comparison, Pair, Spread, compare
from speclm.bench.records import Record, append_record, read_records

__all__ = [
    "SETTINGS",
    "Arm",
    "Call",
    "Cell",
    "Comparison",
    "Divergence",
    "Measured",
    "Outcome",
    "Pair",
    "Record",
    "Spread",
    "append_record",
    "assisted_arm",
    "compare",
    "make_calls",
    "measure_grid",
    "plain_arm",
    "prompt_lookup_arm",
    "read_records",
    "setting_options",
    "speculative_arm",
]
