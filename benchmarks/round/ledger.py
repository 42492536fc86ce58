"""Count what a round costs: ATen calls, host reads and allocated bytes, by stage, and its times.

Counts do not depend on the machine. They are means over the rounds of some calls with the bundled
models, prefill excluded. Times are of the same calls without counting.

    python benchmarks/round/ledger.py --method eagle3
    python benchmarks/round/ledger.py --method all --out benchmarks/results/ledger.jsonl
"""

import argparse
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from benchmarks.decode.decode import load_drafters, load_model
from speclm import SpecModel
from speclm.bench import Call, append_record, make_calls
from speclm.bench.decoders import setting_options
from speclm.bench.pairs import Spread
from speclm.bench.records import Record
from speclm.cache.tree_cache import TreeCache
from speclm.demo.bundle import assets, load_prompts
from speclm.devices import device_path
from speclm.drafting.interface import Proposer
from speclm.generation.loop import Generation
from speclm.stats import SpeculationStats

METHODS = ("ngram", "lookup", "draft", "medusa", "eagle", "eagle3", "block")
TARGET, NETWORK = "target", "draft network"
STAGES = ("draft", NETWORK, "verify", TARGET, "accept", "keep", "commit", "other")
"""Parts of a round. The networks' forwards are apart from the stages that run them."""

MAX_NEW_TOKENS = 48

_READING_CALLS = frozenset(
    {
        "_local_scalar_dense",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "_unique2",
        "unique_dim",
    }
)
"""ATen calls whose result, or its shape, the host has to wait for."""

_READING_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
_UPLOADING = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Ledger:
    """Counts by stage, over the rounds of any number of calls.

    Attributes:
        calls_by_round: ATen calls of each round outside the target's forward.
        runs: Number of times that the draft network ran.
        calls: ATen calls of each stage.
        reads: Values that the host waited for, or sent from lists, in each stage.
        uploads: Copies to the device that the host did not wait for, in each stage.
        allocated: Bytes of new tensors of each stage.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.calls_by_round: list[int] = []
        self.calls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.allocated: Counter[str] = Counter()
        self._stages: list[str] = []  # the innermost last; empty outside rounds

    @property
    def stage(self) -> str | None:
        """The running stage; None outside rounds."""
        return self._stages[-1] if self._stages else None

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Count towards a stage inside the block."""
        self._stages.append(stage)
        try:
            yield
        finally:
            self._stages.pop()

    def wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts towards a stage of a round, and not outside of rounds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.stage is None:
                return function(*args, **kwargs)
            self.runs += stage == NETWORK
            with self.within(stage):
                return function(*args, **kwargs)

        return call

    @property
    def outside(self) -> int:
        """ATen calls so far outside the target's forward."""
        return self.calls.total() - self.calls[TARGET]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.calls_by_round)

    def a_round(self, stages: Sequence[str], counts: Counter[str]) -> float:
        """Return how many of something there are in a round, over some stages."""
        return round(sum(counts[stage] for stage in stages) / max(self.rounds, 1), 2)


class CallCounter(TorchDispatchMode):
    """Counts ATen calls and the bytes they allocate."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        stage = self._ledger.stage
        if stage is not None:
            self._ledger.calls[stage] += 1
            name = func._schema.name.removeprefix("aten::")
            is_read = name in _READING_CALLS and not _is_of_generators(name, args)
            self._ledger.reads[stage] += is_read or _has_mask_index(name, args)
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf)}
            made = {_storage(leaf) for leaf in tree_leaves(result) if _is_plain(leaf)} - given
            self._ledger.allocated[stage] += sum(size for _, size in made)
        return result


class ReadCounter(TorchFunctionMode):
    """Counts values that go between host and device outside of ATen calls."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        stage = self._ledger.stage
        if stage is not None and (func in _READING_METHODS or func in _UPLOADING):
            self._ledger.reads[stage] += 1
        return func(*args, **(kwargs or {}))


def _upload(ledger: Ledger) -> Callable[..., Tensor]:
    def count_upload(values: Any) -> Tensor:
        if ledger.stage is not None:
            ledger.uploads[ledger.stage] += 1
        return from_numpy(values)

    from_numpy = torch.from_numpy
    return count_upload


def _is_plain(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _is_of_generators(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether states of generators are compared, which the host has on every device."""
    return name == "equal" and args[0].dtype == torch.uint8


def _has_mask_index(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether a call selects by a mask, so that the size of its result has to be read."""
    if name not in ("index", "index_put_", "_index_put_impl_"):
        return False
    return any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


@contextmanager
def counted(ledger: Ledger, base: PreTrainedModel, networks: Sequence[Any]) -> Iterator[None]:
    """Count what the rounds of all calls inside the block do."""
    phase, run_round = SpeculationStats.phase, Generation._run_round

    @contextmanager
    def count_phase(self: SpeculationStats, name: str) -> Iterator[None]:
        with phase(self, name), ledger.within(name) if ledger.stage else nullcontext():
            yield

    def count_round(self: Generation) -> None:
        before = ledger.outside
        with ledger.within("other"):
            run_round(self)
        ledger.calls_by_round.append(ledger.outside - before)

    with ExitStack() as stack:
        stack.enter_context(patch.object(SpeculationStats, "phase", count_phase))
        stack.enter_context(patch.object(Generation, "_run_round", count_round))
        stack.enter_context(patch.object(TreeCache, "keep", _keep(ledger)))
        stack.enter_context(patch.object(torch, "from_numpy", _upload(ledger)))
        # The wrapped forwards look like hooks, after which random generators would be compared.
        stack.enter_context(patch("speclm.model.call.may_draw", return_value=False))
        for stage, modules in ((TARGET, [base]), (NETWORK, networks)):
            for module in modules:
                forward = ledger.wrapped(stage, module.forward)
                stack.enter_context(patch.object(module, "forward", forward))
        stack.enter_context(ReadCounter(ledger))
        stack.enter_context(CallCounter(ledger))
        yield


def _keep(ledger: Ledger) -> Callable[..., Any]:
    keep = TreeCache.keep

    def count_keep(self: TreeCache, *args: Any, **kwargs: Any) -> Any:
        is_targets = ledger.stage == "commit"  # a proposer's own cache is part of its stage
        with ledger.within("keep") if is_targets else nullcontext():
            return keep(self, *args, **kwargs)

    return count_keep


def draft_networks(proposer: Proposer) -> list[Any]:
    """Return what a proposer runs by its `forward`, once it has drafted."""
    heads = getattr(proposer, "heads", None)
    if isinstance(heads, nn.Module):
        return [heads]
    network = getattr(proposer, "network", None)
    if network is not None:
        return [network]
    view = getattr(proposer, "view", None)
    return [] if view is None else [view.model]


def measure(
    method: str,
    base: PreTrainedModel,
    calls: Sequence[Call],
    *,
    on_device_path: bool,
    has_times: bool,
) -> tuple[dict[str, Any], list[int]]:
    """Return what a round of a method costs, and its calls outside the target round by round."""
    drafters = load_drafters([method], base)
    heads: dict[str, Any] = {
        "draft": drafters.draft,
        "medusa": drafters.medusa,
        "block": drafters.block,
        **drafters.eagle,
    }
    model = SpecModel.from_pretrained(base, heads.get(method, method), adaptive=False)
    assert model.proposer is not None
    seconds: defaultdict[str, float] = defaultdict(float)
    num_rounds = 0
    ledger = Ledger()
    with device_path() if on_device_path else nullcontext():
        # The first pass warms up.
        for is_counted in (False, False, True) if has_times else (False, True):
            seconds.clear()
            num_rounds = 0
            networks = draft_networks(model.proposer)
            with counted(ledger, base, networks) if is_counted else nullcontext():
                for call in calls:
                    torch.manual_seed(call.seed)
                    model.generate(**call.arguments)
                    stats = model.last_speculation
                    assert stats is not None
                    num_rounds += stats.rounds
                    for name, spent in stats.seconds.items():
                        seconds[name] += spent
            if not is_counted:
                times = {name: spent / max(num_rounds, 1) for name, spent in seconds.items()}
    outside = [stage for stage in STAGES if stage != TARGET]
    found = {
        "calls_outside_target": ledger.a_round(outside, ledger.calls),
        "calls_in_target": ledger.a_round([TARGET], ledger.calls),
        "calls_in_draft_network": ledger.a_round([NETWORK], ledger.calls),
        "host_reads": ledger.a_round(outside, ledger.reads),
        "uploads": ledger.a_round(outside, ledger.uploads),
        "levels": round(ledger.runs / max(ledger.rounds, 1), 2),
        "megabytes": round(ledger.a_round(outside, ledger.allocated) / 1e6, 3),
        "rounds": ledger.rounds,
        "calls": {stage: ledger.a_round([stage], ledger.calls) for stage in STAGES},
        "reads": {stage: ledger.a_round([stage], ledger.reads) for stage in STAGES},
        "ms": {
            name: round(1e3 * times[name], 3) for name in times if has_times and name != "prefill"
        },
    }
    return found, ledger.calls_by_round


def as_record(found: dict[str, Any], by_round: Sequence[int], settings: dict[str, Any]) -> Record:
    """Return a record, with machine, versions and commit."""
    spread = Spread.of(by_round)
    return Record(
        benchmark="ledger",
        settings={**settings, "counts": found},
        unit="tensor calls a round",
        n=len(by_round),
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
        promises_identity=False,  # outputs are not compared here
    )


def show(found: dict[str, Any]) -> None:
    """Print counts by stage."""
    print(f"{'stage':14} {'calls':>8} {'host reads':>11} {'ms':>8}")
    for stage in STAGES:
        spent = found["ms"].get(stage)
        shown = "" if spent is None else f"{spent:.2f}"
        print(f"{stage:14} {found['calls'][stage]:8} {found['reads'][stage]:11} {shown:>8}")
    print(
        f"outside the target {found['calls_outside_target']} calls, {found['host_reads']} host "
        f"reads, {found['uploads']} uploads, {found['megabytes']} MB, {found['levels']} runs of "
        "the draft network a round"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=(*METHODS, "all"), required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sample", action="store_true", help="temperature 1 instead of greedy")
    parser.add_argument(
        "--device-path", action="store_true", help="run on the CPU what an accelerator would run"
    )
    parser.add_argument("--counts", action="store_true", help="measure no times")
    parser.add_argument("--n", type=int, default=8, help="prompts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="append records to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    base = load_model("base", dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    setting = "t1.0" if options.sample else "greedy"
    calls = make_calls(
        load_prompts("sql_dev", limit=options.n),
        base,
        tokenizer,
        options={**setting_options(setting), "max_new_tokens": MAX_NEW_TOKENS},
        batch=options.batch,
    )
    for method in METHODS if options.method == "all" else [options.method]:
        found, by_round = measure(
            method,
            base,
            calls,
            on_device_path=options.device_path,
            has_times=not options.counts,
        )
        settings = {"method": method, "batch": options.batch, "setting": setting}
        settings["path"] = "device" if options.device_path else "host"
        if options.out is not None:
            append_record(options.out, as_record(found, by_round, settings))
        if options.json:
            print(json.dumps({**settings, **found}))
        else:
            print(f"\n{method}, batch {options.batch}, {setting}, {settings['path']} path")
            show(found)


if __name__ == "__main__":
    main()
