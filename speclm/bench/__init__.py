"""Measure ways to generate, each in pairs with regular generation."""

from speclm.bench.decoders import (
    SETTINGS,
    Call,
    Decoder,
    Outcome,
    assisted_decoder,
    make_calls,
    plain_decoder,
    prompt_lookup_decoder,
    setting_options,
    speculative_decoder,
)
from speclm.bench.pairs import Comparison, Divergence, Pair, Spread, compare
from speclm.bench.records import (
    Cell,
    Measured,
    Record,
    append_record,
    measure_grid,
    read_records,
)

__all__ = [
    "SETTINGS",
    "Call",
    "Cell",
    "Comparison",
    "Decoder",
    "Divergence",
    "Measured",
    "Outcome",
    "Pair",
    "Record",
    "Spread",
    "append_record",
    "assisted_decoder",
    "compare",
    "make_calls",
    "measure_grid",
    "plain_decoder",
    "prompt_lookup_decoder",
    "read_records",
    "setting_options",
    "speculative_decoder",
]
