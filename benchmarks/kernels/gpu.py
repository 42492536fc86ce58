"""Check and measure kernels and decoding on this machine's GPU: what is right first, then speed.

Kernels have the first four minutes. Needs PyTorch 2.11 and Transformers 5.17 or newer, and no
network. Ends within nine minutes and says what it left out.

    PYTHONPATH=. python benchmarks/kernels/gpu.py
    PYTHONPATH=. python benchmarks/kernels/gpu.py --tiny --out /tmp/gpu.jsonl  # a dry run
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # kernels compile side by side before

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from benchmarks.decode.decode import build_cells, build_methods, describe, load_model
from benchmarks.inflation.shapes import SHAPES, InflatedShape
from benchmarks.kernels import checks, speed
from benchmarks.kernels.bench import Bench
from benchmarks.kernels.findings import Findings
from benchmarks.kernels.rows import rows, tiny_rows
from benchmarks.round import large
from speclm.bench import Call, Decoder, make_calls, measure_grid, plain_decoder, setting_options
from speclm.bench.divergence import explain
from speclm.demo.bundle import assets, load_prompts
from speclm.engines import Engine
from speclm.errors import MeasurementError

BUDGET_SECONDS = 8.5 * 60
KERNEL_SECONDS = 4 * 60  # of these, for checks and speed of kernels
CHECK_SECONDS = 2 * 60  # of these, for checks
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SETTINGS = ("greedy", "t0.7", "t1.0")
SPECULATIVE = ("none", "ngram", "draft")
HEADS = ("eagle3", "block")
BASELINES = ("prompt_lookup", "assisted")
LARGE_SECONDS = 100  # for rounds at the shape of a large model
DRY_ENGINES: tuple[Engine, ...] = ()  # compiling takes too long, and graphs need a GPU


@dataclass(slots=True)
class Plan:
    """How much is done, and until when.

    Args:
        device: Where everything runs.
        dtypes: Of the weights.
        settings: Of the identity suite.
        batches: Rows of each call.
        speculative: Our methods.
        heads: Further ones, which only the bundled base has.
        engines: What verifies trees of the bundled models, besides eager forwards.
        num_prompts: Prompts of each set in the decode benchmark.
        max_new_tokens: Of the decode benchmark; None for its own.
        identity_tokens: New tokens in the identity suite.
        large: Shape of the large model; None for that of the bundled base with one more layer.
        deadline: On the monotonic clock.
        left_out: What there was no time for.
        failures: What went wrong.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    settings: tuple[str, ...]
    batches: tuple[int, ...]
    speculative: tuple[str, ...]
    heads: tuple[str, ...]
    engines: tuple[str | Engine, ...]
    num_prompts: int
    max_new_tokens: int | None
    identity_tokens: int
    large: str | None
    deadline: float
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def has_time(self, name: str) -> bool:
        """Return whether to go on; note `name` as left out if not."""
        if monotonic() < self.deadline:
            return True
        self.left_out.append(f"{name}: no time")
        return False


def check_kernels(plan: Plan) -> None:
    """Compare kernels with what they are to compute, and meanwhile compile those to be timed."""
    findings = Findings(min(plan.deadline, monotonic() + CHECK_SECONDS))
    if plan.device == "cpu":
        setup = checks.Setup(plan.device, "reference", is_tiny=True)
        checks.run_in_process(("attention", "report"), setup, findings)
    else:
        checks.run_in_processes(checks.ALL, findings, is_tiny=False, also=speed.warm_commands())
    print(f"kernels: {len(findings.passed)} checks passed", flush=True)
    take_over(plan, findings)


def measure_kernels(plan: Plan, path: Path, *, deadline: float) -> None:
    """Run the benchmark of kernels, the most important rows first."""
    findings = Findings(min(plan.deadline, deadline))
    bench = Bench(plan.device, path, findings)
    if bench.is_tiny:
        bench.samples, bench.methods = 2, ("ours", "sdpa")
    speed.run(bench, tiny_rows() if bench.is_tiny else rows())
    take_over(plan, findings)


def take_over(plan: Plan, findings: Findings) -> None:
    """Add what checks of kernels found to the plan's own."""
    plan.failures += findings.failures
    plan.left_out += findings.left_out


def tiny_model(family: str, *, vocab_size: int) -> PreTrainedModel:
    """Return a random model of a family, with grouped heads."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=vocab_size,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def identity_models(plan: Plan, dtype: torch.dtype) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the bundled base and one random model of each family."""
    base = load_model("base", dtype=dtype, device=plan.device)
    yield "bundled", base
    for family in FAMILIES:
        model = tiny_model(family, vocab_size=base.config.vocab_size)
        yield family, model.to(device=plan.device, dtype=dtype).eval()


def check_identity(plan: Plan, dtype: torch.dtype) -> None:
    """Compare tokens and the generator's state with regular generation."""
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    prompts = load_prompts("sql_tune", limit=2) + load_prompts("gsm8k_tune", limit=2)
    kinds = [
        (name, model, engine)
        for name, model in identity_models(plan, dtype)
        for engine in ("eager", *(plan.engines if name == "bundled" else ()))
    ]
    for name, model, engine in kinds:
        names = plan.speculative + (plan.heads if name == "bundled" else ())
        methods = build_methods(names, model, lookup_tokens=10, engine=engine)
        for setting in plan.settings:
            for batch in plan.batches:
                what = f"identity {name} {dtype} {setting} batch {batch} {name_of(engine)}"
                if not plan.has_time(what):
                    continue
                options = {**setting_options(setting), "max_new_tokens": plan.identity_tokens}
                calls = make_calls(prompts, model, tokenizer, options=options, batch=batch)
                for method in methods:
                    verdict = compare_states(model, method, calls, is_half=dtype != torch.float32)
                    print(f"{what} {method.name:6s} {verdict}", flush=True)
                    if "FAILED" in verdict:
                        plan.failures.append(f"{what} {method.name}: {verdict}")


def name_of(engine: str | Engine) -> str:
    """Return the name of an engine for messages and records."""
    return engine if isinstance(engine, str) else engine.name


def compare_states(
    base: PreTrainedModel, method: Decoder, calls: list[Call], *, is_half: bool
) -> str:
    """Say whether a method gives regular generation's tokens and leaves its generator state."""
    plain = plain_decoder(base)
    num_explained = 0
    for index, call in enumerate(calls):
        expected, wanted = plain.run(call), generator_state(call)
        outcome, state = method.run(call), generator_state(call)
        if outcome.stats is not None and outcome.stats.fallbacks:
            return f"FAILED: left to regular generation, {outcome.stats.fallbacks[0]}"
        if outcome.stats is not None and "because" in outcome.stats.engine:
            return f"FAILED: {outcome.stats.engine}"
        if outcome.tokens == expected.tokens:
            if not torch.equal(wanted, state):
                return f"FAILED: call {index} leaves another generator state"
            continue
        found = explain(base, call, index=index, plain=expected.tokens, other=outcome.tokens)
        if not is_half or not all(divergence.is_explained for divergence in found):
            return f"FAILED: {found}"
        num_explained += 1
    return "identical" if num_explained == 0 else f"explained by rounding: {num_explained} calls"


def generator_state(call: Call) -> torch.Tensor:
    """Return the state of the default generator that sampling draws from."""
    device = call.input_ids.device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def measure_decoding(plan: Plan, dtype: torch.dtype, path: Path) -> None:
    """Run the decode benchmark, cell by cell."""
    base = load_model("base", dtype=dtype, device=plan.device)
    ours = plan.speculative + (() if plan.device == "cpu" else plan.heads)
    decoders = [
        (method, "eager") for method in build_methods((*BASELINES, *ours), base, lookup_tokens=10)
    ] + [
        (method, name_of(engine))
        for engine in plan.engines
        for method in build_methods(ours, base, lookup_tokens=10, engine=engine)
    ]
    cells = build_cells(
        base,
        sets=("sql", "gsm8k"),
        num_prompts=plan.num_prompts,
        settings=("greedy", "t1.0"),
        batches=plan.batches,
        tune=plan.device == "cpu",  # a dry run is no measurement
        max_new_tokens=plan.max_new_tokens,
    )
    for cell in cells:
        for method, engine in decoders:
            settings = {**cell.settings, "engine": engine}
            what = f"decode {dtype} {settings['prompts']} {settings['setting']} "
            what += f"batch {settings['batch']} {method.name} {engine}"
            if not plan.has_time(what):
                continue
            try:
                for measured in measure_grid(
                    [replace(cell, settings=settings)],
                    [method],
                    base=base,
                    benchmark="gpu_decode",
                    path=path,
                ):
                    print(describe(measured), flush=True)
            except MeasurementError as error:
                plan.failures.append(f"{what}: {error}")


def measure_large_rounds(plan: Plan, path: Path) -> None:
    """Measure rounds of a large model, by stage."""
    if not plan.has_time(f"rounds {plan.large or 'tiny'}"):
        return
    shape = SHAPES.get(plan.large or "")
    if shape is None:
        small = InflatedShape.of(load_model("base", dtype=torch.float32, device="cpu"))
        shape = replace(small, num_layers=small.num_layers + 1)
    models = large.Large.of(
        plan.large or "tiny",
        shape,
        (*(name for name in plan.speculative if name != "none"), *plan.heads),
        dtype=plan.dtypes[-1],
        device=plan.device,
    )
    given = {} if plan.large is not None else {"max_new_tokens": 4}
    plan.left_out += large.measure(
        models,
        large.large_cell(models.base, num_prompts=min(plan.num_prompts, 4), **given),
        engines=("eager", *(engine for engine in plan.engines if engine != "compile")),
        until=min(plan.deadline, monotonic() + LARGE_SECONDS),
        path=path,
    )


def make_plan(options: argparse.Namespace) -> Plan:
    if options.tiny:
        return Plan(
            device="cpu",
            dtypes=(torch.float32,),
            settings=("greedy", "t1.0"),
            batches=(2,),
            speculative=("ngram",),
            heads=("eagle3",),
            engines=DRY_ENGINES,
            num_prompts=1,
            max_new_tokens=4,
            identity_tokens=4,
            large=None,
            deadline=monotonic() + options.seconds,
        )
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to this Python; --tiny makes a dry run")
    return Plan(
        device="cuda",
        dtypes=(torch.float32, torch.bfloat16),
        settings=SETTINGS,
        batches=(1, 4),
        speculative=SPECULATIVE,
        heads=HEADS,
        engines=("graph", "compile"),
        num_prompts=options.n,
        max_new_tokens=None,
        identity_tokens=64,
        large="8b",
        deadline=monotonic() + options.seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="dry run on the CPU, in seconds")
    parser.add_argument("--n", type=int, default=12, help="prompts of each set")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.jsonl"))
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    if options.tiny:
        torch.set_num_threads(1)
    plan = make_plan(options)
    kernels_until = monotonic() + KERNEL_SECONDS
    check_kernels(plan)
    measure_kernels(plan, options.out.with_name("kernels.jsonl"), deadline=kernels_until)
    for dtype in plan.dtypes:
        check_identity(plan, dtype)
    measure_large_rounds(plan, options.out)
    for dtype in plan.dtypes:
        measure_decoding(plan, dtype, options.out)
    for name in plan.left_out:
        print(f"left out: {name}")
    for failure in plan.failures:
        print(f"FAILED {failure}")
    print(f"{len(plan.failures)} failures, {len(plan.left_out)} left out")
    return 1 if plan.failures else 0


if __name__ == "__main__":
    sys.exit(main())
