"""Levels run as stages give the drafts of the network, and an engine that cannot run is left."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.devices import device_path
from speclm.drafting.interface import Prefill
from speclm.engines import Engine
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.draft_model.stages import LevelStage
from tests.grids import turns
from tests.models import FAMILIES, build_model, generate, prompts, shared_model
from tests.stand_ins import Failing, FullGraph, Unreading, replaying

FREE = {"min_probability": 0.0, "min_confidence": 0.0}
SHAPES = {
    "chain": {"width": 1, "depth": 3, **FREE},
    "tree": {"width": 3, "branches": 3, "depth": 3, "num_draft_tokens": 12, **FREE},
    "static": {"paths": ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 2)), "depth": 3},
}
ROUNDS = ([1, 1], [3, 1], [0, 2], [2, 2], [3, 3], [1, 0])  # accepted tokens of each row
Drafts = list[tuple[list[list[int]], list[list[int]]]]


@pytest.fixture(autouse=True)
def on_a_device() -> Iterator[None]:
    """Draft as where stages run: on accelerators."""
    with device_path():
        yield


def model_of(family: str) -> PreTrainedModel:
    has_window = family in {"qwen2", "mistral"}
    return build_model(family, sliding_window=None) if has_window else shared_model(family)


@torch.no_grad()
def drafts(
    proposer: DraftModelProposer,
    engine: Engine | None,
    *,
    lengths: tuple[int, ...] = (9,),
    num_silent: int = 0,
    rounds: Any = ROUNDS,
) -> Drafts:
    """Return tokens and parents of the drafts of some rounds, with paths of given lengths.

    Args:
        proposer: What drafts.
        engine: Runs its stages.
        lengths: Tokens of the prompts.
        num_silent: Rounds without a draft before the last one.
        rounds: Accepted tokens of each row in each round.
    """
    inputs, batch = prompts(*lengths), len(lengths)
    roots, found = torch.arange(3, 3 + batch), []
    proposer.begin(
        Prefill(
            tokens=inputs["input_ids"],
            num_padding=(inputs["attention_mask"] == 0).sum(1),
            first_tokens=roots,
            temperature=0.0,
            max_new_tokens=64,
            engine=engine,
        )
    )
    for number, counts in enumerate(rounds):
        draft = proposer.propose(roots, noise=None)
        tokens, parents = draft.tokens.tolist(), list(draft.topology.host_parents)
        found.append((tokens, parents))
        paths = [
            path_of(parents[row % len(parents)], counts[row % len(counts)]) for row in range(batch)
        ]
        emitted = [
            [*(tokens[row][node] for node in path[1:]), 40 + number]
            for row, path in enumerate(paths)
        ]
        proposer.commit(Accepted.from_host(paths, emitted, device=roots.device))
        silent = number == len(rounds) - 2
        for token in range(50, 50 + num_silent) if silent else ():
            proposer.commit(Accepted.from_host([[0]] * batch, [[token]] * batch, device="cpu"))
            emitted = [[token]] * batch
        roots = torch.tensor([row[-1] for row in emitted])
    return found


def path_of(parents: list[int], length: int) -> list[int]:
    """Return a path of at most some length that leaves the first children if it can."""
    path = [0]
    while len(path) <= length:
        children = [node for node in range(1, len(parents)) if parents[node] == path[-1]]
        if not children:
            break
        path.append(children[len(children) // 2])
    return path


def proposer_of(shape: str = "tree", model: PreTrainedModel | None = None) -> DraftModelProposer:
    model = shared_model("llama") if model is None else model
    return DraftModelProposer(model, target=model, **SHAPES[shape])


@pytest.mark.parametrize(
    ("family", "shape", "lengths"), turns(FAMILIES, SHAPES, [(9,), (7, 3, 10)])
)
def test_drafts_of_recorded_stages_are_those_of_the_network_in_all_rounds(
    family, shape, lengths, monkeypatch
):
    model, engine = model_of(family), replaying()
    expected = drafts(proposer_of(shape, model), None, lengths=lengths)
    proposer = proposer_of(shape, model)
    assert drafts(proposer, engine, lengths=lengths) == expected
    assert proposer._stages.unproven == set()
    assert proposer._stages.obstacle is None
    monkeypatch.setattr(DraftNetwork, "forward", None)  # everything is proven
    assert drafts(proposer, engine, lengths=lengths) == expected


def test_drafts_stay_equal_while_the_storage_grows_and_after_many_unseen_tokens():
    lengths, silent = (246, 240), 20  # more than one block of 256, more than the largest bucket
    found = [
        drafts(proposer_of(), engine, lengths=lengths, num_silent=silent)
        for engine in (None, replaying())
    ]
    assert found[0] == found[1]


def test_stages_rank_nothing_where_more_than_logits_decides():
    model = shared_model("llama")
    spec = SpecModel(model, proposer_of("tree"))
    for options in ({"do_sample": True}, {"do_sample": False, "repetition_penalty": 1.3}):
        found = [
            (
                generate(spec, prompts(9, 5), max_new_tokens=16, engine=engine, **options)[
                    0
                ].tolist(),
                spec.last_speculation.tau,
            )
            for engine in ("eager", replaying())
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("engine", "family", "shape"),
    [
        ("full", "llama", "chain"),
        ("full", "qwen3", "tree"),
        ("unreading", "llama", "tree"),
        ("unreading", "qwen2", "chain"),
    ],
)
def test_stages_are_whole_graphs_and_read_nothing_on_the_host(engine, family, shape):
    model = model_of(family)
    engine = FullGraph() if engine == "full" else Unreading()
    proposer, rounds = proposer_of(shape, model), ROUNDS[:4]
    found = drafts(proposer, engine, lengths=(7, 4), rounds=rounds)
    assert found == drafts(proposer_of(shape, model), None, lengths=(7, 4), rounds=rounds)
    assert proposer._stages.obstacle is None
    assert {type(key[0]).__name__ for key in engine._prepared} == {"ReadStage", "LevelStage"}


class FailsLater(Failing):
    """Runs some stages before it fails."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.left = num

    def prepare(self, stage: Any, inputs: Any, storage: Any) -> Any:
        def run(inputs: Any, storage: Any) -> Any:
            if self.left == 0:
                return super(FailsLater, self).prepare(stage, inputs, storage)
            self.left -= 1
            return stage(*inputs, *storage)

        return run


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_a_draft_goes_on_eagerly_when_an_engine_fails_in_it(num, caplog):
    proposer = proposer_of()
    expected = drafts(proposer_of(), None, lengths=(9, 5))
    assert drafts(proposer, FailsLater(num), lengths=(9, 5)) == expected
    assert "OutOfMemoryError" in proposer._stages.obstacle
    assert len(caplog.records) == 1
    assert drafts(proposer, proposer._stages.engine, lengths=(9, 5)) == expected
    assert len(caplog.records) == 1


def test_a_stage_that_computes_something_else_is_found_at_once(monkeypatch, caplog):
    level = LevelStage.forward

    def wrong(self: LevelStage, tokens: Any, *more: Any) -> Any:
        return level(self, tokens + 1, *more)

    monkeypatch.setattr(LevelStage, "forward", wrong)
    proposer = proposer_of()
    assert drafts(proposer, replaying()) == drafts(proposer_of(), None)
    assert "something else over fixed shapes" in caplog.text


def test_a_stage_that_fails_is_named(monkeypatch, caplog):
    def failing(*args: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(LevelStage, "forward", failing)
    proposer = proposer_of()
    assert drafts(proposer, replaying()) == drafts(proposer_of(), None)
    assert "fails: no kernel" in caplog.text


def test_stages_follow_the_engine_and_the_weights():
    model, engine = build_model("llama"), replaying()
    proposer = proposer_of("chain", model)
    drafts(proposer, engine)
    first = proposer._stages
    drafts(proposer, None)
    drafts(proposer, engine)
    assert proposer._stages is first
    drafts(proposer, replaying())
    assert proposer._stages is not first
    with torch.no_grad():
        head = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(head.flip(0).clone())  # at another address
    before = proposer._stages
    found = drafts(proposer, before.engine)
    assert proposer._stages is not before
    assert not before._storage
    assert found == drafts(proposer_of("chain", model), None)
    copied = deepcopy(proposer)
    assert copied._stages.network is None
    assert drafts(copied, before.engine) == found
    assert copied._stages.unproven == set()


def test_a_level_wider_than_all_buckets_runs_eagerly():
    model = shared_model("llama")
    options = {"width": 40, "branches": 40, "num_draft_tokens": 90, "depth": 2, **FREE}
    proposers = [DraftModelProposer(model, target=model, **options) for _ in range(2)]
    found = [
        drafts(proposer, engine, rounds=ROUNDS[:2])
        for proposer, engine in zip(proposers, (None, replaying()), strict=True)
    ]
    assert found[0] == found[1]
    assert proposers[1]._stages.unproven


def test_no_stage_runs_on_a_device_that_the_engine_cannot_use():
    class Elsewhere(Failing):
        def obstacle(self, device: torch.device) -> str:
            return f"not on {device}"

    proposer = proposer_of()
    assert drafts(proposer, Elsewhere(), rounds=ROUNDS[:2]) == drafts(
        proposer_of(), None, rounds=ROUNDS[:2]
    )
    assert proposer._stages.obstacle == "not on cpu"
