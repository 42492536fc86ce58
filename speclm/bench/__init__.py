"""Measure ways to generate, each in pairs with regular generation."""

from speclm.bench.answers import write_answers
from speclm.bench.decoders import (
    SETTINGS,
    Answer,
    Call,
    Decoder,
    Outcome,
    Task,
    assisted_decoder,
    make_calls,
    plain_decoder,
    prompt_lookup_decoder,
    setting_options,
    speculative_decoder,
)
from speclm.bench.dialogues import Dialogue, make_dialogues
from speclm.bench.divergence import Divergence
from speclm.bench.pairs import Comparison, Pair, Spread, compare
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
    "Answer",
    "Call",
    "Cell",
    "Comparison",
    "Decoder",
    "Dialogue",
    "Divergence",
    "Measured",
    "Outcome",
    "Pair",
    "Record",
    "Spread",
    "Task",
    "append_record",
    "assisted_decoder",
    "compare",
    "make_calls",
    "make_dialogues",
    "measure_grid",
    "plain_decoder",
    "prompt_lookup_decoder",
    "read_records",
    "setting_options",
    "speculative_decoder",
    "write_answers",
]
