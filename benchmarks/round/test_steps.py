"""Times of single steps: `pytest -p benchmark benchmarks`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.round.overhead import TREE_PARENTS
from speclm.acceptance import Verified, accept_exact
from speclm.acceptance.exact import choose_at_all_nodes
from speclm.cache import CACHE_NAME, TreeCache
from speclm.demo.bundle import assets
from speclm.drafting.interface import Prefill
from speclm.methods.ngram.proposer import NgramProposer
from speclm.sampling import TokenChooser
from speclm.self_check.comparison import check_trees
from speclm.target import TargetView
from speclm.tree.topology import TreeTopology, from_parents

PROMPT_LENGTH = 100

Filled = tuple[TargetView, TreeTopology, TreeCache]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, 4000, (1, PROMPT_LENGTH), generator=generator)


@pytest.fixture
def filled(base: PreTrainedModel, prompt: Tensor) -> Filled:
    """View, tree and a cache that holds the prompt."""
    view = TargetView(base)
    cache = view.new_cache(torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        view.prefill(prompt, cache)
    return view, from_parents([TREE_PARENTS], device=prompt.device), cache


@torch.no_grad()
def test_plain_step(benchmark: BenchmarkFixture, base: PreTrainedModel, prompt: Tensor) -> None:
    cache = DynamicCache(config=base.config)
    base(input_ids=prompt, **{CACHE_NAME: cache})

    def step() -> None:
        base(input_ids=prompt[:, :1], **{CACHE_NAME: cache})
        cache.crop(-1)

    benchmark(step)


@torch.no_grad()
def test_verify_8_nodes(benchmark: BenchmarkFixture, filled: Filled, prompt: Tensor) -> None:
    view, tree, cache = filled
    tokens = prompt[:, : tree.num_nodes]

    def step() -> None:
        view.forward_tree(tokens, tree, cache)
        cache.keep([[]])

    benchmark(step)


@torch.no_grad()
def test_round_of_8_nodes(benchmark: BenchmarkFixture, filled: Filled, prompt: Tensor) -> None:
    view, tree, cache = filled
    tokens = prompt[:, : tree.num_nodes]
    chooser = TokenChooser([], is_greedy=True)

    def play() -> None:
        logits = view.forward_tree(tokens, tree, cache)
        chosen = choose_at_all_nodes(Verified(tokens, tree, logits, chooser, [True]))
        cache.keep(accept_exact(tokens, chosen, tree).paths)
        cache.crop(PROMPT_LENGTH)

    benchmark(play)


@torch.no_grad()
def test_keep_path(benchmark: BenchmarkFixture, filled: Filled, prompt: Tensor) -> None:
    view, tree, cache = filled

    def forward() -> None:
        cache.keep([[]])
        cache.crop(PROMPT_LENGTH)
        view.forward_tree(prompt[:, : tree.num_nodes], tree, cache)

    benchmark.pedantic(cache.keep, args=([[0, 2, 5]],), setup=forward, rounds=50)


def test_self_check(benchmark: BenchmarkFixture, base: PreTrainedModel) -> None:
    verdict = benchmark(check_trees, TargetView(base))
    assert verdict.passes


def test_ngram_propose(benchmark: BenchmarkFixture, prompt: Tensor) -> None:
    proposer = NgramProposer()
    text = prompt.repeat(1, 2)
    roots = prompt[:, 4]
    proposer.begin(
        Prefill(
            tokens=torch.cat([text, prompt[:, :4]], dim=1),
            num_padding=torch.zeros(1, dtype=torch.long),
            first_tokens=roots,
            temperature=0.0,
            max_new_tokens=64,
        )
    )
    draft = benchmark(proposer.propose, roots, noise=None)
    assert draft.tokens.shape[1] > 1
