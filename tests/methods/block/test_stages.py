"""Drafts over fixed shapes are those of a usual draft, and what an engine cannot run is left."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from speclm import SpecModel
from speclm.devices import device_path
from speclm.engines import Engine
from speclm.methods.block.context import BlockContext
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.stages import BlockStage, BlockStages
from tests.methods.block.target_heads import HEADS, heads_for
from tests.models import build_model, generate, prompts
from tests.proposers import HittingProposer
from tests.stand_ins import Failing, FullGraph, Unreading, replaying

GREEDY = {"max_new_tokens": 24, "do_sample": False}


class OnlyTargets(Failing):
    """Runs stages of the target only."""

    def prepare(self, stage, inputs, storage):
        if isinstance(stage, BlockStage):
            return super().prepare(stage, inputs, storage)
        return lambda inputs, storage: stage(*inputs, *storage)


class Drafting:
    """Generates on the path of a device, and keeps the drafts."""

    def __init__(self, kind: str, *lengths: int, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.model = build_model("llama", num_hidden_layers=3)
        self.inputs = prompts(*lengths)
        self.expected = generate(self.model, self.inputs, **GREEDY)[0]
        self.heads = heads_for(self.model, kind)
        self.block = BlockProposer(self.heads, target=self.model, **options)
        self.patch = patch

    @property
    def stages(self) -> BlockStages:
        assert self.block._stages is not None
        return self.block._stages

    def drafts(self, engine: Engine | str, **settings: Any) -> list[tuple[Any, Any]]:
        """Return tokens and parents of the drafts of a call, whose tokens are checked."""
        start = self.inputs["input_ids"].shape[1]
        hitting = HittingProposer(self.block, self.expected[:, start:].tolist())
        found, propose = [], BlockProposer.propose

        def seen(proposer, roots, *, noise):
            draft = propose(proposer, roots, noise=noise)
            found.append((draft.tokens.tolist(), draft.topology.parents.tolist()))
            return draft

        spec = SpecModel(self.model, hitting, engine=engine)
        with device_path(), self.patch.context() as patched:
            patched.setattr(BlockProposer, "propose", seen)
            tokens = generate(spec, self.inputs, **{**GREEDY, **settings})[0]
        if not settings:
            assert tokens.tolist() == self.expected.tolist()
        return found


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("vanilla", (9,)),
        ("rnn", (7, 2, 10)),
        ("gated in place", (9,)),
        ("both ways", (7, 2, 10)),
        ("window", (5, 8)),
    ],
)
def test_drafts_of_changing_lengths_are_those_without_an_engine(kind, lengths, monkeypatch):
    assert set(HEADS) == {"vanilla", "rnn", "gated in place", "both ways", "window"}
    drafting, engine = Drafting(kind, *lengths, patch=monkeypatch), replaying()
    expected = drafting.drafts("eager")
    assert drafting.block._stages is None
    for _ in range(2):  # the second call finds what the first one has prepared
        assert drafting.drafts(engine) == expected
    assert drafting.stages.obstacle is None
    prepared = [key for key in engine._prepared if isinstance(key[0], BlockStage)]
    assert len(prepared) == 1
    assert len(expected) > 4


def test_a_draft_is_one_graph_without_breaks_that_reads_nothing(monkeypatch):
    drafting = Drafting("vanilla", 7, 4, patch=monkeypatch)
    expected = drafting.drafts("eager")
    for engine in (FullGraph(BlockStage), Unreading(BlockStage)):
        assert drafting.drafts(engine) == expected
        assert drafting.stages.obstacle is None


def test_a_context_that_grows_is_prepared_anew(monkeypatch):
    drafting, engine = Drafting("vanilla", 9, patch=monkeypatch), replaying()
    expected = drafting.drafts("eager")
    monkeypatch.setattr("speclm.methods.block.context._LEAST_CAPACITY", 24)
    assert drafting.drafts(engine) == expected
    prepared = [key for key in engine._prepared if isinstance(key[0], BlockStage)]
    assert len(prepared) == 2


def test_features_of_several_rounds_are_added_before_a_draft(monkeypatch):
    drafting = Drafting("vanilla", 9, 6, patch=monkeypatch)
    commit = BlockProposer.commit

    def halved(proposer, accepted):
        commit(proposer, accepted)
        features, counts = proposer._unseen.pop()
        first = [min(count, 1) for count in counts]
        rest = [count - own for count, own in zip(counts, first, strict=True)]
        proposer._unseen += [(features, first), (features[:, 1:], rest)]

    expected = drafting.drafts("eager")
    monkeypatch.setattr(BlockProposer, "commit", halved)
    assert drafting.drafts(replaying()) == expected


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"do_sample": True}, {}),
        ({"repetition_penalty": 1.2}, {}),
        ({}, {"min_acceptance": 0.1}),
        ({}, {"tree": [2, 1]}),
    ],
)
def test_drafts_that_depend_on_more_than_a_stage_has_are_made_without_one(
    settings, options, monkeypatch
):
    drafting, engine = Drafting("vanilla", 9, patch=monkeypatch, **options), replaying()
    assert drafting.drafts(engine, **settings)
    assert not any(isinstance(key[0], BlockStage) for key in engine._prepared)
    assert drafting.stages.obstacle is None


def test_an_engine_that_fails_is_given_up_and_drafts_stay_the_same(monkeypatch, caplog):
    drafting = Drafting("vanilla", 9, patch=monkeypatch)
    assert drafting.drafts(OnlyTargets()) == drafting.drafts("eager")
    assert sum("OutOfMemoryError" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda *_: torch.zeros(1, 1, 1), "compute something else"),
        (lambda *_: 1 / 0, "fails: ZeroDivisionError"),
    ],
)
def test_a_stage_that_does_not_compute_the_usual_states_is_found_at_once(
    change, reason, monkeypatch
):
    drafting = Drafting("vanilla", 9, patch=monkeypatch)
    expected = drafting.drafts("eager")
    compute = BlockStage.compute
    monkeypatch.setattr(BlockStage, "compute", lambda *given: (change(), compute(*given)[1]))
    assert drafting.drafts(replaying()) == expected
    assert reason in drafting.stages.obstacle


def test_other_weights_are_prepared_anew(monkeypatch):
    drafting, engine = Drafting("vanilla", 9, patch=monkeypatch), replaying()
    drafting.drafts(engine)
    before = drafting.stages
    with torch.no_grad():
        other = deepcopy(drafting.heads).requires_grad_(False)
        for name, parameter in other.named_parameters():
            parameter.add_(0.01) if "markov" in name else None
    drafting.heads.load_state_dict(other.state_dict(), assign=True)
    drafting.heads.fuse_()
    assert drafting.drafts(engine) == drafting.drafts("eager")
    drafting.drafts(engine)
    assert drafting.stages is not before


def test_a_second_form_that_is_made_again_is_recorded_anew(monkeypatch):
    drafting, engine = Drafting("vanilla", 9, patch=monkeypatch), replaying()
    drafting.drafts(engine)
    before = drafting.stages
    drafting.heads.fuse_()  # as another proposer with the same heads does
    assert drafting.drafts(engine) == drafting.drafts("eager")
    drafting.drafts(engine)
    assert drafting.stages is not before


def test_eager_calls_in_between_leave_the_stages_as_they_are(monkeypatch):
    drafting, engine = Drafting("vanilla", 9, patch=monkeypatch), replaying()
    drafting.drafts(engine)
    before = drafting.stages
    drafting.drafts("eager")
    drafting.drafts(engine)
    assert drafting.stages is before
    drafting.drafts(replaying())
    assert not any(isinstance(key[0], BlockStage) for key in engine._prepared)


def test_the_targets_embeddings_are_not_read_if_heads_have_their_own():
    model = build_model("llama", num_hidden_layers=3)
    heads = heads_for(model, "vanilla", has_own_embeddings=True)
    block = BlockProposer(heads, target=model)
    model.get_input_embeddings().to("meta")  # as if offloaded
    assert BlockStages(heads, block.view, replaying()).serves(replaying()) is False


def test_rotations_by_length_are_named():
    model = build_model("llama", num_hidden_layers=3)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    heads = heads_for(model, "vanilla", rope_parameters=rope)
    block = BlockProposer(heads, target=model)
    assert "longest text" in BlockStages(heads, block.view, replaying()).obstacle


def test_few_sizes_of_drafts_are_kept(monkeypatch):
    model = build_model("llama", num_hidden_layers=3)
    heads = heads_for(model, "both ways")
    block = BlockProposer(heads, target=model)
    monkeypatch.setattr("speclm.methods.block.stages._MAX_STAGES", 1)
    stages = BlockStages(heads, block.view, replaying())
    context = BlockContext(heads, first_positions=[0])
    with torch.no_grad():
        for depth in (2, 3):
            inputs = stages.inputs(context, None, [0], torch.tensor([5]), depth=depth)
            stage = BlockStage(heads, block.view, block.config, depth=depth)
            hidden, _ = stage.compute(*inputs, context.storage)
            stages.prove(block.config, inputs, context, hidden)
            assert stages.stage_of(block.config, depth=depth) is not None
    assert stages.stage_of(block.config, depth=2) is None
