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
from speclm.bench.inflate import bytes_read, inflate_llama, inflate_medusa
from speclm.bench.inflate_eagle import inflate_eagle
from speclm.bench.pairs import Comparison, Pair, Spread, compare
from speclm.bench.records import Record, append_record, read_records
from speclm.bench.shapes import SHAPES, InflatedShape, draft_shape

__all__ = [
    "SETTINGS",
    "SHAPES",
    "Arm",
    "Call",
    "Cell",
    "Comparison",
    "Divergence",
    "InflatedShape",
    "Measured",
    "Outcome",
    "Pair",
    "Record",
    "Spread",
    "append_record",
    "assisted_arm",
    "bytes_read",
    "compare",
    "draft_shape",
    "inflate_eagle",
    "inflate_llama",
    "inflate_medusa",
    "make_calls",
    "measure_grid",
    "plain_arm",
    "prompt_lookup_arm",
    "read_records",
    "setting_options",
    "speculative_arm",
]
