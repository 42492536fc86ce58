"""Measure what speclm adds to a round and to a position, and the time of ``import speclm``.

python benchmarks/round/overhead.py
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import logging
from typing_extensions import override

from speclm import SpecModel
from speclm.acceptance.interface import Accepted
from speclm.bench import SETTINGS, Call, Spread, append_record, make_calls
from speclm.bench.records import Record, time_record
from speclm.cache import CACHE_NAME
from speclm.demo.bundle import assets, load_prompts
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import MeasurementError
from speclm.methods.ngram.proposer import NgramProposer
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology, chain, from_parents

ROOT = Path(__file__).parents[2]
NUM_NODES = 8
PROMPT_LENGTH = 100

TREE_PARENTS = (0, 0, 0, 1, 1, 2, 3, 5)
"""A tree of 8 nodes on 3 levels."""

IMPORT = """
from time import perf_counter
from transformers import AutoModelForCausalLM, PreTrainedModel
start = perf_counter()
import speclm
print(perf_counter() - start)
"""


class FixedProposer(Proposer):
    """Propose the same tokens in every round, and time rounds and bare forwards of the base.

    After each round, a bare forward over as many tokens at the same cache length is timed, so that
    a busy machine slows both.
    """

    def __init__(
        self, base: PreTrainedModel, topology: TreeTopology, tokens: Sequence[int]
    ) -> None:
        """Take one token for each node below the root."""
        self._base = base
        self._topology = topology
        self._tokens = list(tokens)
        self._nodes: Tensor | None = None
        self._cache: DynamicCache | None = None
        self._num_committed = 0  # tokens in the cache of the target
        self._is_in_prompt = True
        self._round_start: float | None = None
        self.round_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        tokens = prompt.tokens
        drafted = torch.tensor(self._tokens, device=tokens.device, dtype=torch.long)
        self._nodes = torch.cat(
            [prompt.first_tokens[:, None], drafted.expand(len(tokens), -1)], dim=1
        )
        self._cache = DynamicCache(config=self._base.config)
        self._num_committed, self._is_in_prompt = tokens.shape[1], True
        if self._num_committed > 0:
            self._base(input_ids=tokens, logits_to_keep=1, **{CACHE_NAME: self._cache})
        self._round_start = None
        self.round_seconds.clear()
        self.bare_seconds.clear()

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        now = _now(roots)
        if self._round_start is not None:
            self.round_seconds.append(now - self._round_start)
        assert self._nodes is not None, "propose before begin"
        assert self._cache is not None, "propose before begin"
        num_missing = self._num_committed - self._cache.get_seq_length()
        if num_missing < 0:
            self._cache.crop(num_missing)
        elif num_missing > 0:  # the prompt's forward verified no draft
            self._base(input_ids=self._nodes[:, :num_missing], **{CACHE_NAME: self._cache})
        start = _now(roots)
        self._base(input_ids=self._nodes, **{CACHE_NAME: self._cache})
        if not self._is_in_prompt:  # the forward over the prompt is no round
            self._round_start = _now(roots)
            self.bare_seconds.append(self._round_start - start)
        tokens = torch.cat([roots[:, None], self._nodes[:, 1:]], dim=1)
        return Draft(tokens=tokens, topology=self._topology)

    @override
    def commit(self, accepted: Accepted) -> None:
        self._num_committed += max(map(len, accepted.emitted))
        self._is_in_prompt = False


def fixed_tree(shape: str, *, num_nodes: int, device: torch.device) -> TreeTopology:
    """Return a chain of `num_nodes`, or the first nodes of `TREE_PARENTS` for ``"tree"``."""
    if shape == "tree":
        return from_parents([TREE_PARENTS[:num_nodes]], device=device)
    return chain(num_nodes - 1, device=device)


def round_overheads(
    base: PreTrainedModel,
    prompt: Int[Tensor, "batch seq"],
    *,
    shape: str = "tree",
    num_nodes: int = 8,
    num_rounds: int = 40,
    options: dict[str, Any] | None = None,
) -> list[float]:
    """Return the seconds that rounds take beyond bare forwards of the base over as many nodes.

    Drafting costs nothing here: the draft is always the same, made of tokens that the base is
    unlikely to choose. May be negative: a round does not build the masks that a forward builds.

    Args:
        base: The model.
        prompt: Prompts without padding.
        shape: "tree" or "chain".
        num_nodes: Nodes per round, root included; at most 8 for a tree.
        num_rounds: Timed rounds, after as many for warming up.
        options: Arguments of ``generate``; greedy by default.
    """
    topology = fixed_tree(shape, num_nodes=num_nodes, device=prompt.device)
    proposer = FixedProposer(base, topology, _unlikely_tokens(base, prompt, num_nodes - 1))
    model = SpecModel(base, proposer, adaptive=False)
    arguments: dict[str, Any] = {
        "do_sample": False,
        **(options or {}),
        "attention_mask": torch.ones_like(prompt),
        # The prompt's forward and the last two rounds are not timed.
        "max_new_tokens": num_rounds + 3,
        "eos_token_id": base.config.get_text_config().vocab_size,  # never generated
        "pad_token_id": 0,
    }
    for _ in range(2):
        torch.manual_seed(0)
        model.generate(prompt, **arguments)
    pairs = zip(proposer.round_seconds, proposer.bare_seconds, strict=False)
    return [mine - theirs for mine, theirs in pairs]


def position_overheads(model: SpecModel, calls: Sequence[Call]) -> list[float]:
    """Return the seconds per round that deciding position by position takes beyond all at once.

    A repetition penalty of 1 changes no score, but has to see the text of every position. Each
    call is run both ways, in alternating order.

    Raises:
        MeasurementError: If the two ways give different tokens.
    """
    by_position = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.0)])
    overheads = []
    for index, call in enumerate(calls):
        seconds: dict[bool, float] = {}
        outputs: dict[bool, Tensor] = {}
        num_rounds = 1
        for is_slow in (True, False) if index % 2 else (False, True):
            arguments = {**call.arguments, "logits_processor": by_position if is_slow else None}
            torch.manual_seed(call.seed)
            start = perf_counter()
            output = model.generate(**arguments)
            seconds[is_slow] = perf_counter() - start
            assert isinstance(output, Tensor)
            assert model.last_speculation is not None
            outputs[is_slow] = output
            num_rounds = model.last_speculation.rounds + 1  # the prefill decides too
        if not torch.equal(outputs[True], outputs[False]):
            raise MeasurementError(f"call {index} gave other tokens position by position")
        overheads.append((seconds[True] - seconds[False]) / num_rounds)
    return overheads


@torch.no_grad()
def _unlikely_tokens(
    base: PreTrainedModel, prompt: Int[Tensor, "batch seq"], count: int
) -> list[int]:
    logits = base(input_ids=prompt[:1], logits_to_keep=1).logits[0, -1]
    unlikely: list[int] = logits.topk(count, largest=False).indices.tolist()
    return unlikely


def import_seconds(*, num_runs: int = 5) -> list[float]:
    """Return the seconds of ``import speclm`` in fresh processes, Transformers imported."""
    seconds: list[float] = []
    for _ in range(num_runs):
        command = [sys.executable, "-c", IMPORT]
        result = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        seconds.append(float(result.stdout))
    return seconds


def _now(tokens: Tensor) -> float:
    """Wait for all work issued so far, and return the time."""
    if tokens.device.type != "cpu":
        torch.accelerator.synchronize(tokens.device)
    return perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.jsonl"))
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each kind")
    parser.add_argument("--calls", type=int, default=50, help="prompts decoded both ways")
    parser.add_argument("--imports", type=int, default=5, help="processes that import speclm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(
        assets()["base"], dtype=getattr(torch, options.dtype)
    ).to(options.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 4000, (options.batch, PROMPT_LENGTH), generator=generator)
    common = {"dtype": options.dtype, "device": options.device, "batch": options.batch}
    for shape in ("chain", "tree"):
        for setting in ("greedy", "t1.0"):
            seconds = round_overheads(
                base,
                prompt.to(options.device),
                shape=shape,
                num_nodes=NUM_NODES,
                num_rounds=options.rounds,
                options=dict(SETTINGS[setting]),
            )
            settings = {**common, "shape": shape, "num_nodes": NUM_NODES, "setting": setting}
            report(options.out, "round_overhead", seconds, settings)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    for setting in ("greedy", "t1.0"):
        calls = make_calls(
            load_prompts("sql_dev", limit=options.calls),
            base,
            tokenizer,
            options={**SETTINGS[setting], "max_new_tokens": 128},
            batch=options.batch,
        )
        model = SpecModel(base, NgramProposer(), adaptive=False)
        position_overheads(model, calls[:2])  # warms up
        settings = {**common, "setting": setting}
        report(options.out, "position_overhead", position_overheads(model, calls), settings)
    report(options.out, "import", import_seconds(num_runs=options.imports), {})


def report(path: Path, benchmark: str, seconds: list[float], settings: dict[str, object]) -> Record:
    """Print and record times."""
    spread = Spread.of([1e3 * value for value in seconds])
    record = time_record(spread, n=len(seconds), benchmark=benchmark, settings=settings)
    append_record(path, record)
    what = " ".join(str(settings[name]) for name in ("shape", "setting") if name in settings)
    print(
        f"{f'{benchmark} {what}'.strip()}: {spread.median:.2f} ms "
        f"[{spread.lower_quartile:.2f}, {spread.upper_quartile:.2f}], n {record.n}"
    )
    return record


if __name__ == "__main__":
    main()
