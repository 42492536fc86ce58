"""A grid of decode measurements, resumable cell by cell."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from speclm.bench.calls import Call
from speclm.bench.decoders import Decoder, plain_decoder
from speclm.bench.pairs import Comparison, Pair, compare
from speclm.bench.records import Record, append_record, decode_record, is_recorded


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the grid, measured for every method.

    Args:
        calls: What is generated.
        settings: What tells this cell from others; the method's name is added.
    """

    calls: Sequence[Call]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A method measured in a cell."""

    cell: Cell
    comparison: Comparison
    record: Record


def measure_grid(
    cells: Sequence[Cell],
    methods: Sequence[Decoder],
    *,
    base: PreTrainedModel,
    benchmark: str,
    path: Path | None = None,
    on_pair: Callable[[Pair], object] | None = None,
) -> Iterator[Measured]:
    """Measure every method in every cell, record each as soon as it is done, and yield it.

    Arms that cannot generate a cell's batch are left out, and so is what `path` already holds a
    record of, made at the same commit with the same settings.

    Args:
        cells: What is measured on.
        methods: What is measured.
        base: The model of all methods.
        benchmark: Name of the benchmark in the records.
        path: Where records are appended; None to keep none.
        on_pair: Told every pair.

    Raises:
        MeasurementError: If outputs differ that may not; nothing is recorded of that method.
    """
    plain = plain_decoder(base)
    for cell in cells:
        batch = max((call.input_ids.shape[0] for call in cell.calls), default=1)
        for method in methods:
            settings = {**cell.settings, "method": method.name}
            if not method.can_run(batch):
                continue
            if path is not None and is_recorded(path, benchmark=benchmark, settings=settings):
                continue
            comparison = compare(plain, method, cell.calls, base=base, on_pair=on_pair)
            record = decode_record(comparison, benchmark=benchmark, settings=settings)
            if path is not None:
                append_record(path, record)
            yield Measured(cell, comparison, record)
