"""Measure a tree's forward next to the same forward with a dense mask, and keeping a path.

python benchmarks/round/attention.py
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.round.overhead import TREE_PARENTS, fixed_tree
from speclm.bench import Spread, append_record
from speclm.bench.records import Record, time_record
from speclm.cache import CACHE_NAME, TreeCache
from speclm.errors import MeasurementError
from speclm.target import TargetView

NUM_NODES = len(TREE_PARENTS)
KEPT = ([0, 2, 5, 7], [0, 1, 3, 6], [0, 2], [0, 1, 4])
"""A path for each row; none of them is a prefix of the slots."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of the logits' spread: the two forwards sum in different orders."""


class DenseForward:
    """The tree's forward by Transformers alone, with a cache and a mask made by hand."""

    def __init__(self, base: PreTrainedModel, prompt: Tensor, view: TargetView) -> None:
        """Fill the cache with the prompts."""
        topology = fixed_tree("tree", num_nodes=NUM_NODES, device=view.device)
        batch, prefix = prompt.shape
        self._base, self._prefix = base, prefix
        self._cache = DynamicCache(config=base.config)
        base(input_ids=prompt, logits_to_keep=1, **{CACHE_NAME: self._cache})
        seen = torch.ones(batch, 1, NUM_NODES, prefix, dtype=torch.bool, device=view.device)
        tree = topology.ancestor_mask[:, None].expand(batch, -1, -1, -1)
        self._mask = torch.cat([seen, tree], dim=3)
        self._positions = (prefix + topology.depths).expand(batch, -1)

    def __call__(self, tree: Tensor) -> Tensor:
        """Return the logits at all nodes."""
        return self._base(
            input_ids=tree,
            attention_mask=self._mask,
            position_ids=self._positions,
            **{CACHE_NAME: self._cache},
            use_cache=True,
        ).logits

    def reset(self) -> None:
        """Forget the nodes."""
        self._cache.crop(-NUM_NODES)


class TreeForward:
    """The tree's forward by the library."""

    def __init__(self, prompt: Tensor, view: TargetView) -> None:
        """Fill the cache with the prompts."""
        self._view, self._prefix = view, prompt.shape[1]
        self._topology = fixed_tree("tree", num_nodes=NUM_NODES, device=view.device)
        self.cache: TreeCache = view.new_cache(prompt.new_zeros(len(prompt)))
        view.prefill(prompt, self.cache)

    def __call__(self, tree: Tensor) -> Tensor:
        """Return the logits at all nodes."""
        return self._view.forward_tree(tree, self._topology, self.cache)

    def keep(self) -> None:
        """Keep a path in every row."""
        self.cache.keep([KEPT[row % len(KEPT)] for row in range(len(self.cache.host_lengths))])

    def reset(self) -> None:
        """Forget the nodes, kept or not."""
        self.cache.crop(self._prefix)


@torch.no_grad()
def measure(
    base: PreTrainedModel, *, batch: int, prefix: int, num_pairs: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Time pairs of forwards in alternating order.

    Returns:
        The ratio of ours to the dense forward in each pair, then seconds of ours, of the dense
        forward, and of keeping a path.

    Raises:
        MeasurementError: If the two forwards give different logits.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = base.config.vocab_size
    prompt = torch.randint(vocab_size, (batch, prefix), generator=generator).to(base.device)
    tree = torch.randint(vocab_size, (batch, NUM_NODES), generator=generator).to(base.device)
    view = TargetView(base)
    ours, dense = TreeForward(prompt, view), DenseForward(base, prompt, view)
    _require_equal(ours(tree), dense(tree))
    ours.reset()
    dense.reset()
    seconds: dict[object, list[float]] = {ours: [], dense: []}
    kept = []
    for index in range(num_pairs + 3):
        for forward in (ours, dense) if index % 2 else (dense, ours):
            seconds[forward].append(_time(lambda forward=forward: forward(tree), base.device))
            if forward is ours:
                kept.append(_time(ours.keep, base.device))
            forward.reset()
    mine, theirs = seconds[ours][3:], seconds[dense][3:]  # the first ones warm up
    return [a / b for a, b in zip(mine, theirs, strict=True)], mine, theirs, kept[3:]


def _require_equal(found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max() / expected.float().std())
    if not error <= TOLERANCE[expected.dtype]:
        raise MeasurementError(f"logits of the two forwards differ by {error:.1e} of their spread")


def _time(work: Callable[[], object], device: torch.device) -> float:
    start = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def build(*, layers: int, hidden: int, groups: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return a random Llama with heads of 64, `groups` of which share keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 64 // groups, 1),
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.jsonl"))
    parser.add_argument("--pairs", type=int, default=40, help="forwards of each kind")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--prefix", type=int, default=1000, help="slots before the tree")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4], help="heads a key head")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        for groups in options.groups:
            sizes = {"layers": options.layers, "hidden": options.hidden, "groups": groups}
            base = build(**sizes, dtype=getattr(torch, dtype)).to(options.device)
            for batch in options.batch:
                settings = {
                    **sizes,
                    "dtype": dtype,
                    "device": options.device,
                    "batch": batch,
                    "prefix": options.prefix,
                    "num_nodes": NUM_NODES,
                }
                measured = measure(
                    base, batch=batch, prefix=options.prefix, num_pairs=options.pairs
                )
                report(options.out, measured, settings)


def report(
    path: Path,
    measured: tuple[list[float], list[float], list[float], list[float]],
    settings: dict[str, object],
) -> None:
    """Print and record what one model and batch took."""
    ratios, *times = measured
    spread = Spread.of(ratios)
    record = Record(
        benchmark="tree_forward_ratio",
        settings=settings,
        unit="times the forward with a dense mask",
        n=len(ratios),
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
    )
    append_record(path, record)
    print(f"{settings['dtype']} batch {settings['batch']} groups {settings['groups']}")
    print(f"  tree_forward {spread.median:.3f} times the dense one")
    for name, seconds in zip(("tree_forward", "dense_forward", "keep_path"), times, strict=True):
        in_ms = Spread.of([1e3 * value for value in seconds])
        append_record(path, time_record(in_ms, n=record.n, benchmark=name, settings=settings))
        quartiles = f"[{in_ms.lower_quartile:.2f}, {in_ms.upper_quartile:.2f}]"
        print(f"  {name} {in_ms.median:.2f} ms {quartiles}")


if __name__ == "__main__":
    main()
