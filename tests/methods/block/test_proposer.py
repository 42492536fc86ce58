"""Block heads as a proposer: the same tokens, and states that training would see."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.devices import device_path
from speclm.drafting.interface import Prefill
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.block.context import BlockContext
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.tree import BlockLogits
from speclm.testing import check_proposer
from speclm.tree.plan import TreePlan
from tests.grids import turns
from tests.methods.block.target_heads import HEADS, LAYERS, heads_for, states_at
from tests.models import VOCAB_SIZE, build_model, generate, prompts
from tests.proposers import HittingProposer

TOLERANCE = 1e-5  # of the largest number
FULL = {"min_probability": 0.0}


def base_of(**settings: Any) -> PreTrainedModel:
    return build_model("llama", num_hidden_layers=3, **settings)


def require_equal(spec: SpecModel, inputs: dict[str, Tensor], **settings: Any) -> None:
    expected = generate(spec.base, inputs, **settings)
    found = generate(spec, inputs, **settings)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize(
    ("kind", "lengths", "cell"),
    turns(
        tuple(HEADS),
        [(9,), (1,), (7, 2, 10)],
        [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}],
    ),
)
def test_tokens_are_those_of_plain_decoding(kind, cell, lengths):
    model = base_of()
    proposer = BlockProposer(heads_for(model, kind), target=model, **FULL)
    require_equal(SpecModel(model, proposer), prompts(*lengths), max_new_tokens=14, **cell)


@pytest.mark.parametrize(
    ("kind", "do_sample"),
    [("vanilla", True), ("rnn", True), ("gated in place", False), ("window", True)],
)
def test_tokens_on_the_path_of_a_device_are_those_of_plain_decoding(kind, do_sample):
    model = base_of()
    inputs, settings = prompts(7, 3, 10), {"max_new_tokens": 14, "do_sample": do_sample}
    expected = generate(model, inputs, **settings)[0][:, 10:].tolist()
    proposer = HittingProposer(BlockProposer(heads_for(model, kind), target=model), expected)
    with device_path():
        require_equal(SpecModel(model, proposer), inputs, **settings)


@pytest.mark.parametrize("kind", HEADS)
def test_accepted_paths_of_all_lengths_leave_the_states_that_training_sees(kind, monkeypatch):
    model = base_of()
    heads = heads_for(model, kind)
    inputs, settings = prompts(7, 3, 10), {"max_new_tokens": 20, "do_sample": False}
    expected = generate(model, inputs, **settings)[0]
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    wanted = [states_at(model, heads, expected[row, start:]) for row, start in enumerate(padding)]
    block = BlockProposer(heads, target=model, **FULL)
    proposer = HittingProposer(block, expected[:, 10:].tolist())
    anchors: list[int] = []
    original = BlockProposer._run

    def checked(self, roots, context, num_drafts) -> BlockLogits:
        logits = original(self, roots, context, num_drafts)
        for row, start in enumerate(padding):
            anchor = context.lengths[row] - start
            states = wanted[row][anchor, :num_drafts]
            scores = heads.logits(states, lm_head=model.get_output_embeddings())
            for found, exact in (
                (logits.hidden[row], states),
                (logits.without_markov[row], scores),
            ):
                assert (found - exact).abs().max() < TOLERANCE * exact.abs().max()
            anchors.append(anchor)
        return logits

    monkeypatch.setattr(BlockProposer, "_run", checked)
    require_equal(SpecModel(model, proposer), inputs, **settings)
    assert len(set(anchors)) > 6


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vanilla", {"min_acceptance": 0.1}),
        pytest.param(
            "rnn", {"tree": [[0], [2], [0, 1], [2, 0], [2, 0, 0]]}, marks=pytest.mark.slow
        ),
        pytest.param("gated in place", {}, marks=pytest.mark.slow),
        pytest.param("both ways", {}, marks=pytest.mark.slow),
        ("window", {"tree": [2, 1]}),
    ],
)
def test_it_keeps_the_contract_of_proposers(kind, options):
    model = base_of()
    heads = heads_for(model, kind)
    if "tree" not in options:
        options = {**FULL, "num_draft_tokens": 80, **options}  # a cut would fall between near ties
    check_proposer(
        lambda: BlockProposer(heads, target=model, **options),
        vocab_size=VOCAB_SIZE,
        hidden_size=model.config.hidden_size * len(LAYERS),
        max_length=32,
    )


@pytest.mark.parametrize(
    ("kind", "num_positions"), [("vanilla", 3), ("window", 4), ("both ways", 5)]
)
def test_causal_blocks_run_only_as_far_as_they_are_needed(kind, num_positions, monkeypatch):
    model = base_of()
    proposer = BlockProposer(heads_for(model, kind), target=model)
    _, whole = first_run(proposer, monkeypatch)
    proposer.plan = TreePlan(3, 16)
    size, short = first_run(proposer, monkeypatch)
    assert size == num_positions
    torch.testing.assert_close(short.without_markov, whole.without_markov[:, :3])


def first_run(proposer: BlockProposer, monkeypatch: Any) -> tuple[int, BlockLogits]:
    """Return how many positions the first block of a text has, and what the heads say there."""
    sizes: list[int] = []
    masks = BlockContext.masks

    def counted(self, num_positions):
        sizes.append(num_positions)
        return masks(self, num_positions)

    monkeypatch.setattr(BlockContext, "masks", counted)
    generator = torch.Generator().manual_seed(1)
    width = len(LAYERS) * proposer.view.hidden_size
    proposer.begin(
        Prefill(
            tokens=torch.zeros(1, 7, dtype=torch.long),
            num_padding=torch.zeros(1, dtype=torch.long),
            first_tokens=torch.tensor([5]),
            temperature=0.0,
            max_new_tokens=10,
            features=torch.randn(1, 7, width, generator=generator),
        )
    )
    found: list[BlockLogits] = []
    run = BlockProposer._run
    monkeypatch.setattr(
        BlockProposer, "_run", lambda *given: found.append(run(*given)) or found[-1]
    )
    with torch.no_grad():
        proposer.propose(torch.tensor([5]), noise=None)
    monkeypatch.undo()
    return sizes[0], found[0]


def test_no_node_is_deeper_than_what_a_row_may_still_emit(monkeypatch):
    model = base_of()
    inputs, settings = prompts(6, 4), {"max_new_tokens": 9, "do_sample": False}
    reference = generate(model, inputs, **settings)[0][:, 6:].tolist()
    for kind in ("vanilla", "both ways"):
        proposer = BlockProposer(heads_for(model, kind), target=model, **FULL)
        spec = SpecModel(model, HittingProposer(proposer, reference, hit_rate=1.0))
        original, seen = proposer.propose, []

        def propose(roots, *, noise, original=original, seen=seen, proposer=proposer):
            draft = original(roots, noise=noise)
            depths = draft.topology.host_node_depths
            for row, room in enumerate(proposer._bounds.within(99)):
                deepest = max(depths[row if len(depths) > 1 else 0])
                assert deepest <= room
                seen.append((deepest, room))
            return draft

        monkeypatch.setattr(proposer, "propose", propose)
        require_equal(spec, inputs, **settings)
        assert any(0 < room < 4 for _, room in seen)
        assert any(deepest == room > 0 for deepest, room in seen)


def test_the_confidence_head_cuts_paths_that_it_does_not_trust(monkeypatch):
    model = base_of()
    for kind in ("vanilla", "both ways"):
        heads = heads_for(model, kind, has_confidence=True)
        asked: list[tuple[Tensor, Tensor]] = []
        original = type(heads).confidence

        def confidence(self, hidden, previous, original=original, asked=asked):
            found = original(self, hidden, previous)
            asked.append((previous, found))
            return found

        monkeypatch.setattr(type(heads), "confidence", confidence)
        sizes = []
        for least in (0.0, 0.8, 1.0):
            proposer = BlockProposer(heads, target=model, min_acceptance=least, **FULL)
            spec = SpecModel(model, proposer)
            require_equal(spec, prompts(6), max_new_tokens=8, do_sample=False)
            sizes.append(sum(row.num_draft_tokens for row in spec.last_speculation.rows))
            assert bool(asked) == (least > 0)
        assert sizes[0] > sizes[1] > sizes[2] == 0


def test_heads_of_other_models_and_unknown_options_are_refused():
    model = base_of()
    heads = heads_for(model, "vanilla")
    with pytest.raises(VocabularyMismatchError, match="vocabulary of 160"):
        BlockProposer(heads, target=base_of(vocab_size=200))
    with pytest.raises(OptionError, match="features of width 40"):
        BlockProposer(heads, target=base_of(hidden_size=60))
    with pytest.raises(OptionError, match="unknown option 'trees'"):
        BlockProposer(heads, target=model, trees="auto")
    with pytest.raises(OptionError, match="unknown option 'min_growing'"):
        BlockProposer(heads, target=model, min_growing=0.5)  # all rows share a pass
    with pytest.raises(OptionError, match="depth is 6, the block heads draft 5 tokens"):
        BlockProposer(heads, target=model, depth=6)
    with pytest.raises(OptionError, match=r"min_acceptance is 2\.0, expected 0\.0 to 1\.0"):
        BlockProposer(heads, target=model, min_acceptance=2.0)
    with pytest.raises(OptionError, match=r"feature_layers is .*expected at most 1"):
        BlockProposer(heads, target=build_model("llama", num_hidden_layers=1))


def test_acceptance_without_a_head_that_estimates_it_is_refused():
    model = base_of()
    with pytest.raises(OptionError, match=r"min_acceptance is 0\.5.*without one; leave it out"):
        BlockProposer(heads_for(model, "both ways"), target=model, min_acceptance=0.5)
