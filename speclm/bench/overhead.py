"""What speclm adds to a round beside the base's own forward, and to the time of an import."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.model import SpecModel
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology, chain, from_parents

_ROOT = Path(__file__).parents[2]

TREE_PARENTS = (0, 0, 0, 1, 1, 2, 3, 5)
"""A tree of 8 nodes on 3 levels."""

_IMPORT = """
from time import perf_counter
from transformers import AutoModelForCausalLM, PreTrainedModel
start = perf_counter()
import speclm
print(perf_counter() - start)
"""


class FixedProposer(Proposer):
    """Proposes the same tokens in every round and notes when it is asked."""

    def __init__(self, topology: TreeTopology, tokens: Sequence[int]) -> None:
        """Use one token a node below the root."""
        self._topology = topology
        self._tokens = list(tokens)
        self._guesses: Tensor | None = None
        self.times: list[float] = []
        self.accepted_lengths: list[int] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        device, batch = prompt.tokens.device, prompt.tokens.shape[0]
        self._guesses = torch.tensor(self._tokens, device=device).expand(batch, -1)
        self.times.clear()
        self.accepted_lengths.clear()

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        if roots.device.type == "cuda":
            torch.cuda.synchronize(roots.device)
        self.times.append(perf_counter())
        assert self._guesses is not None, "propose before begin"
        tokens = torch.cat([roots[:, None], self._guesses], dim=1)
        return Draft(tokens=tokens, topology=self._topology, probs=None)

    @override
    def commit(self, accepted: Accepted) -> None:
        self.accepted_lengths.append(max(map(len, accepted.emitted)) - 1)


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
    num_repeats: int = 5,
    options: dict[str, Any] | None = None,
) -> list[float]:
    """Return seconds that rounds take beyond bare forwards of the base over as many nodes.

    Round k of a generation is compared with the base's k-th forward over `num_nodes` tokens at
    the same cache length; generations and bare runs alternate. Drafting costs nothing here: the
    proposal is always the same. It is made of tokens that the base does not choose after the
    prompt; rounds after one that was accepted by chance are left out.

    Args:
        base: The model.
        prompt: Prompts without padding.
        shape: "tree" or "chain".
        num_nodes: Nodes a round, root included; at most 8 for a tree.
        num_rounds: Rounds a generation.
        num_repeats: Generations.
        options: Arguments of ``generate``; greedy by default.
    """
    topology = fixed_tree(shape, num_nodes=num_nodes, device=prompt.device)
    guesses = _unlikely_tokens(base, prompt, num_nodes - 1)
    proposer = FixedProposer(topology, guesses)
    model = SpecModel(base, proposer)
    arguments: dict[str, Any] = {
        "do_sample": False,
        **(options or {}),
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": num_rounds + 2,
        "eos_token_id": base.config.get_text_config().vocab_size,  # never generated
        "pad_token_id": 0,
    }
    overheads: list[float] = []
    for repeat in range(num_repeats + 1):
        torch.manual_seed(repeat)
        model.generate(prompt, **arguments)
        times, lengths = proposer.times, proposer.accepted_lengths
        rounds = [after - before for before, after in pairwise(times)]
        is_clean = [not any(lengths[: index + 1]) for index in range(len(rounds))]
        bare = _bare_forwards(base, prompt, num_nodes=num_nodes, num_rounds=len(rounds))
        if repeat > 0:  # the first warms up
            pairs = zip(rounds, bare, is_clean, strict=True)
            overheads += [mine - theirs for mine, theirs, clean in pairs if clean]
    return overheads


@torch.no_grad()
def _bare_forwards(
    base: PreTrainedModel, prompt: Int[Tensor, "batch seq"], *, num_nodes: int, num_rounds: int
) -> list[float]:
    """Return the seconds of forwards over `num_nodes` tokens, each one slot further."""
    cache = DynamicCache(config=base.config)
    base(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = prompt[:, :1].expand(-1, num_nodes).contiguous()
    seconds: list[float] = []
    for _ in range(num_rounds):
        _synchronize(prompt)
        start = perf_counter()
        base(input_ids=tokens, past_key_values=cache, use_cache=True)
        _synchronize(prompt)
        seconds.append(perf_counter() - start)
        cache.crop(1 - num_nodes)
    return seconds


@torch.no_grad()
def _unlikely_tokens(
    base: PreTrainedModel, prompt: Int[Tensor, "batch seq"], count: int
) -> list[int]:
    logits = base(input_ids=prompt[:1], logits_to_keep=1).logits[0, -1]
    unlikely: list[int] = logits.topk(count, largest=False).indices.tolist()
    return unlikely


def import_seconds(*, num_runs: int = 5) -> list[float]:
    """Return what ``import speclm`` takes in fresh processes that have imported Transformers."""
    seconds: list[float] = []
    for _ in range(num_runs):
        command = [sys.executable, "-c", _IMPORT]
        result = subprocess.run(command, check=True, cwd=_ROOT, capture_output=True, text=True)
        seconds.append(float(result.stdout))
    return seconds


def _synchronize(tokens: Tensor) -> None:
    if tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
