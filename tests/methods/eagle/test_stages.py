"""EAGLE heads as stages of an engine draft what they draft without one."""

import logging
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch

from speclm import SpecModel
from speclm.devices import device_path
from speclm.drafting.mixture import Mixture
from speclm.engines import Engine
from speclm.methods.eagle.network import EagleHeads, LevelRun
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.stages import LevelStage, ReadStage, laid_out, padded
from tests.grids import grid, turns
from tests.methods.eagle.eagle_heads import heads_for
from tests.models import build_model, generate, prompts
from tests.proposers import HittingProposer
from tests.stand_ins import Failing, FullGraph, Unreading, replaying

LAYERS = (1, 2, 3)
FREE = {"min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"depth": 5, "mixture": Mixture(), **FREE},
    "tree": {"depth": 4, "width": 3, "branches": 2, **FREE},
}
HEADS: dict[str, dict[str, Any]] = {
    "eagle": {},
    "eagle part": {"draft_vocab_size": 40},
    "eagle3": {"draft_vocab_size": 40},
    "eagle3 window": {"sliding_window": 6},
}
GREEDY = {"max_new_tokens": 14, "do_sample": False}


class Drafting:
    """Generates with the same heads, and keeps the drafts of a call."""

    def __init__(self, kind: str, shape: str, *, lengths: tuple[int, ...] = (9,)) -> None:
        self.model = build_model("llama", num_hidden_layers=4)
        self.heads = heads_for(self.model, kind.split()[0], layers=LAYERS, **HEADS[kind])
        self.inputs, self.on_host = prompts(*lengths), False
        self.reference = generate(self.model, self.inputs, **GREEDY)[0]
        self.eagle = EagleProposer(self.heads, target=self.model, **SHAPES[shape])
        self.hitting = HittingProposer(self.eagle, self.reference[:, max(lengths) :].tolist())
        self.spec = SpecModel(self.model, self.hitting, adaptive=False)
        self.drafts: list[list[list[int]]] = []
        propose = self.eagle.propose

        def kept(*given: Any, **options: Any) -> Any:
            draft = propose(*given, **options)
            self.drafts.append(draft.tokens.tolist())
            return draft

        self.eagle.propose = kept

    def __call__(self, engine: str | Engine, **options: Any) -> tuple[Any, ...]:
        """Return the drafts, tau, and tokens of a call."""
        self.drafts.clear()
        self.hitting._generator.manual_seed(0)
        settings = {**GREEDY, **options}
        with nullcontext() if self.on_host else device_path():
            tokens = generate(self.spec, self.inputs, engine=engine, **settings)[0]
        if not settings["do_sample"] and len(settings) == len(GREEDY):
            assert torch.equal(tokens, self.reference)
        return deepcopy(self.drafts), self.spec.last_speculation.tau, tokens.tolist()

    @property
    def stages(self) -> Any:
        return self.eagle._context._kept


@pytest.mark.parametrize(("kind", "shape", "lengths"), turns(HEADS, SHAPES, [(9,), (7, 3)]))
def test_recorded_stages_draft_what_the_heads_do(kind, shape, lengths, monkeypatch):
    drafting, engine = Drafting(kind, shape, lengths=lengths), replaying()
    expected = drafting("eager")
    assert drafting(engine) == drafting(engine) == expected
    assert drafting.stages.obstacle is None
    assert drafting.stages.unproven == set()
    monkeypatch.setattr(LevelRun, "below", None)  # all is proven
    assert drafting(engine) == expected


def test_where_the_host_reads_every_level_the_heads_run_eagerly():
    drafting = Drafting("eagle3", "chain")
    drafting.on_host = True
    assert drafting(replaying()) == drafting("eager")
    assert drafting.stages is None


@pytest.mark.parametrize("options", [{"do_sample": True}, {"repetition_penalty": 1.3}])
def test_stages_return_logits_where_more_than_the_heads_ranks(options):
    drafting, engine = Drafting("eagle3", "chain"), replaying()
    expected = drafting("eager", **options)
    assert drafting(engine, **options) == drafting(engine, **options) == expected
    assert drafting.stages.unproven == set()
    assert list(drafting.stages._pairs) == [None]


def test_drafts_stay_equal_while_the_storage_grows():
    drafting = Drafting("eagle3", "tree", lengths=(360,))
    drafting("eager")
    assert drafting(replaying()) == drafting("eager")
    assert drafting.eagle._context.cache.capacity == 512


@pytest.mark.parametrize("kind", grid(["eagle", "eagle3"], runs=lambda kind: kind == "eagle3"))
def test_stages_are_graphs_without_breaks(kind):
    drafting, engine = Drafting(kind, "tree", lengths=(7, 4)), FullGraph(ReadStage | LevelStage)
    expected = drafting("eager")
    assert drafting(engine) == expected
    assert drafting.stages.obstacle is None
    assert drafting.stages.unproven == set()


def test_stages_read_nothing_on_the_host():
    drafting = Drafting("eagle3 window", "tree", lengths=(7, 4))
    expected = drafting("eager")
    assert drafting(Unreading()) == drafting("eager") == expected
    assert drafting.stages.obstacle is None


def test_an_engine_that_fails_is_left_in_the_middle_of_a_draft(caplog):
    class LateFailing(Failing):
        num_levels = 0

        def run(self, stage, inputs, storage, **options):
            self.num_levels += isinstance(stage, LevelStage)
            if isinstance(stage, LevelStage) and self.num_levels == 3:
                return super().run(stage, inputs, storage, **options)
            return stage(*inputs, *storage)

    drafting, engine = Drafting("eagle3", "tree"), LateFailing()
    expected = drafting("eager")
    with caplog.at_level(logging.WARNING):
        assert drafting(engine) == expected
    assert "no memory" in drafting.stages.obstacle
    assert drafting(engine) == expected


def test_heads_that_compute_otherwise_over_fixed_shapes_are_found_at_once(monkeypatch):
    drafting = Drafting("eagle3", "chain")
    expected = drafting("eager")
    forward = LevelStage.forward
    monkeypatch.setattr(
        LevelStage, "forward", lambda *given: tuple(2 * part for part in forward(*given))
    )
    assert drafting(replaying()) == expected
    assert "something else over fixed shapes" in drafting.stages.obstacle


def test_a_stage_that_raises_is_given_up(monkeypatch):
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such shape")

    drafting = Drafting("eagle3", "chain")
    expected = drafting("eager")
    monkeypatch.setattr(LevelStage, "forward", refuse)
    assert drafting(replaying()) == expected
    assert "fails: no such shape" in drafting.stages.obstacle


def test_what_has_no_fixed_shape_is_drafted_eagerly():
    drafting = Drafting("eagle3", "chain")
    rope = {**drafting.heads.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    object.__setattr__(drafting.heads.config, "rope_parameters", rope)
    expected = drafting("eager")
    assert drafting(replaying()) == expected
    assert "depend on the length of the text" in drafting.stages.obstacle
    other = Drafting("eagle", "chain")
    other.model.lm_head.register_forward_hook(lambda *_: None)
    expected = other("eager")
    assert other(replaying()) == expected
    assert "head does more than multiply" in other.stages.obstacle


def test_weights_at_other_addresses_have_other_stages():
    drafting, engine = Drafting("eagle3", "chain"), replaying()
    drafting(engine)
    first = drafting.stages
    drafting(engine)
    assert drafting.stages is first
    drafting.heads.fuse_()
    drafting(engine)
    second = drafting.stages
    assert second is not first
    drafting.heads.layers[0].mlp.down_proj.weight.data = drafting.heads.layers[
        0
    ].mlp.down_proj.weight.data.clone()
    drafting(engine)
    assert drafting.stages is not second
    copied = deepcopy(drafting.eagle._context)
    assert copied._kept is None
    assert isinstance(copied._heads, EagleHeads)


def test_inputs_are_padded_and_have_the_strides_of_new_tensors():
    part = torch.arange(12).view(1, 4, 3)[:, :2]
    assert part.stride() != torch.empty(1, 2, 3).stride()
    assert laid_out(part).stride() == (6, 3, 1)
    assert padded(part, 2).stride() == (6, 3, 1)
    assert padded(part, 3).tolist() == [[[0, 1, 2], [3, 4, 5], [0, 0, 0]]]
    assert padded(torch.ones(2, 1), 3).tolist() == [[1, 0, 0]] * 2
