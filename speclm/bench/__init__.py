"""Measures decoding, paired with regular generation."""

from speclm.bench.calls import SETTINGS, Call, make_calls, setting_options
from speclm.bench.decoders import (
    Decoder,
    Outcome,
    assisted_decoder,
    plain_decoder,
    prompt_lookup_decoder,
    speculative_decoder,
)
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
    "Call",
    "Cell",
    "Comparison",
    "Decoder",
    "Divergence",
    "InflatedShape",
    "Measured",
    "Outcome",
    "Pair",
    "Record",
    "Spread",
    "append_record",
    "assisted_decoder",
    "bytes_read",
    "compare",
    "draft_shape",
    "inflate_eagle",
    "inflate_llama",
    "inflate_medusa",
    "make_calls",
    "measure_grid",
    "plain_decoder",
    "prompt_lookup_decoder",
    "read_records",
    "setting_options",
    "speculative_decoder",
]
