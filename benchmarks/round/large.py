"""Measure rounds at the shape of a large model: the bundled models, inflated, on a GPU.

Every call is also run by regular generation, eagerly and over Transformers' static cache, with
which it compiles the forward on a GPU. Stages are timed in a pass of their own, in which the device
is idle at the beginning and the end of each stage; together they take longer than a round does.

    PYTHONPATH=. python benchmarks/round/large.py --shape 8b
    PYTHONPATH=. python benchmarks/round/large.py --shape 0.5b --device cpu --engines eager
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.decode.decode import (
    Drafters,
    build_cells,
    build_methods,
    describe,
    load_drafters,
    load_model,
    with_shape,
)
from benchmarks.inflation.inflate import inflate_llama
from benchmarks.inflation.shapes import SHAPES, InflatedShape
from speclm.bench import Call, Cell, Decoder, Measured, append_record, compare, plain_decoder
from speclm.bench.records import decode_record
from speclm.engines import Engine
from speclm.stats import SpeculationStats

METHODS = ("ngram", "draft", "eagle3", "block")
ENGINES: tuple[str, ...] = ("eager", "graph")
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Large:
    """The bundled base and what methods draft with, widened to a shape.

    Args:
        name: Of the shape.
        base: The base.
        methods: Names of methods.
        drafters: What they draft with.
    """

    name: str
    base: PreTrainedModel
    methods: Sequence[str]
    drafters: Drafters

    @classmethod
    def of(
        cls,
        name: str,
        shape: InflatedShape,
        methods: Sequence[str],
        *,
        dtype: torch.dtype,
        device: str,
    ) -> "Large":
        """Widen the models on a device."""
        base = inflate_llama(load_model("base", dtype=dtype, device=device), shape)
        return cls(name, base, methods, load_drafters(methods, base, shape=shape))

    def rows(self, engines: Sequence[str | Engine]) -> list[tuple[str, Decoder]]:
        """Return what is measured: names of engines, and decoders."""
        compiles = self.base.device.type == "cuda"
        rows = [("compiled" if compiles else "eager", static_decoder(self.base))]
        for engine in engines:
            built = build_methods(
                self.methods, self.base, lookup_tokens=10, drafters=self.drafters, engine=engine
            )
            name = engine if isinstance(engine, str) else engine.name
            rows += [(name, method) for method in built]
        return rows


def static_decoder(base: PreTrainedModel) -> Decoder:
    """Return regular generation over a static cache, which Transformers compiles on a GPU."""

    def generate(call: Call) -> Tensor:
        output: Tensor = base.generate(**call.arguments, cache_implementation="static")
        return output

    # Compiled sums are rounded in another order.
    return Decoder("static", generate, lambda: None, promises_identity=False)


@contextmanager
def idle_between_stages() -> Iterator[None]:
    """Wait for the device at the beginning and the end of every stage."""
    phase = SpeculationStats.phase

    @contextmanager
    def wait(self: SpeculationStats, name: str) -> Iterator[None]:
        _synchronize()
        with phase(self, name):
            yield
            _synchronize()

    with patch.object(SpeculationStats, "phase", wait):
        yield


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def stage_milliseconds(method: Decoder, calls: Sequence[Call]) -> dict[str, float]:
    """Return the milliseconds that each stage of a round takes by itself; none for no rounds."""
    seconds: dict[str, float] = {}
    num_rounds = 0
    with idle_between_stages():
        for call in calls:
            stats = method.run(call).stats
            if stats is None:
                return {}
            num_rounds += stats.rounds
            for name, spent in stats.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
    seconds.pop("prefill", None)
    return {name: round(1e3 * spent / max(num_rounds, 1), 3) for name, spent in seconds.items()}


def measure(
    large: Large, calls: Cell, *, engines: Sequence[str | Engine], until: float, path: Path
) -> list[str]:
    """Measure methods with every engine, and append a record of each.

    Returns:
        What there was no time for, on the monotonic clock.
    """
    # The first call decides how long the static cache is, and with it the compiled forward.
    ordered = sorted(calls.calls, key=lambda call: -call.input_ids.shape[1])
    left_out = []
    for engine, method in large.rows(engines):
        if monotonic() > until:
            left_out.append(f"{large.name} {method.name} {engine}: no time")
            continue
        cell = with_shape(calls, method, shape=large.name, base=large.base, drafters=large.drafters)
        (found,) = compare(plain_decoder(large.base), [method], ordered, base=large.base)
        settings = {
            **cell.settings,
            "method": method.name,
            "engine": engine,
            "stage_milliseconds": stage_milliseconds(method, ordered[:2]),
        }
        record = decode_record(found, benchmark="large_rounds", settings=settings)
        append_record(path, record)
        measured = Measured(replace(cell, settings=settings), found, record)
        print(f"{large.name} {engine:8s} {describe(measured)}", flush=True)
        print(f"  milliseconds by stage: {settings['stage_milliseconds']}", flush=True)
    return left_out


def large_cell(
    base: PreTrainedModel, *, num_prompts: int, max_new_tokens: int = MAX_NEW_TOKENS
) -> Cell:
    """Return greedy calls of one row."""
    (cell,) = build_cells(
        base,
        sets=("sql",),
        num_prompts=num_prompts,
        settings=("greedy",),
        batches=(1,),
        max_new_tokens=max_new_tokens,
    )
    return cell


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n", type=int, default=6, help="prompts of text-to-SQL")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_rounds.jsonl"))
    options = parser.parse_args(arguments)
    until = monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    large = Large.of(
        options.shape,
        SHAPES[options.shape],
        options.methods,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    calls = large_cell(large.base, num_prompts=options.n)
    for name in measure(large, calls, engines=options.engines, until=until, path=options.out):
        print(f"left out: {name}")


if __name__ == "__main__":
    main()
