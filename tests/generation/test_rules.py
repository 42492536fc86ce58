"""Accept rules through the real loop: the law of their outputs, and what they ask for."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from speclm import SpecModel
from speclm.acceptance import (
    AcceptanceRule,
    Accepted,
    RejectionRule,
    TypicalRule,
    rejection,
)
from speclm.config import ProposerConfig
from speclm.errors import DraftError, NumericalError, OptionError, UnknownNameError
from speclm.generation import loop
from speclm.heads.medusa import MedusaHeads, MedusaHeadsConfig
from speclm.proposers import DraftModelProposer, MedusaProposer, NgramProposer
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling import DraftSampling, Draws, PositionNoise
from speclm.sampling.drafts import Families
from speclm.stats import SpeculationStats
from speclm.tree.topology import from_parents
from tests.enumeration import (
    EXACT,
    LENGTH,
    PROMPT,
    VOCAB,
    WARPERS,
    WRONG,
    Decisions,
    all_runs,
    distance,
    process,
    run_loop,
    target_law,
)
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model

CHAIN = [0, 0, 1]
WIDE = [0, 0, 0]
TREES = {
    "2x2": [0, 0, 0, 1, 1, 2, 2],
    "deep first": [0, 0, 0, 1],
    "deep second": [0, 0, 0, 2, 2],
    "more children than tokens": [0, 0, 0, 0, 0, 1],
}
TREE_RULES = ("multi_round", "traversal")


def tables(seed: int, *, likeness: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the target's and the draft's logits, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    target, other = 1.5 * torch.randn(
        2, VOCAB, VOCAB, VOCAB, dtype=torch.float64, generator=generator
    )
    return target, likeness * target + (1 - likeness) * other


class EnumeratedDraws(Draws):
    """Makes every draw a decision."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions

    @override
    def bernoulli(self, chance: float) -> bool:
        assert chance >= 0
        return self._decisions.draw((min(chance, 1.0), 1 - min(chance, 1.0))) == 0

    @override
    def categorical(self, probs: Tensor) -> int:
        return self._decisions.draw(probs.tolist())

    @override
    def without_replacement(self, probs: Tensor, *, num: int) -> Tensor:
        return torch.tensor([self._row(row.tolist(), num) for row in probs])

    def _row(self, law: list[float], num: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < min(num, sum(chance > 0 for chance in law)):
            left = [0.0 if token in drawn else chance for token, chance in enumerate(law)]
            drawn.append(self._decisions.draw([chance / sum(left) for chance in left]))
        return drawn + [0] * (num - len(drawn))  # any others follow


class SettledError(Exception):
    """The first round is over; what follows it starts afresh."""


class DrawnProposer(Proposer):
    """Draws trees of one shape from a table over the last two tokens.

    Levels of which no token could be emitted are left out. After the first round it ends the run,
    unless it is to draft in every round.
    """

    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT

    def __init__(self, parents: list[int], table: Tensor, *, every_round: bool = False) -> None:
        self.config = ProposerConfig(depth=len(parents))
        self._parents, self._table, self._every_round = parents, table, every_round
        self.emitted: list[int] = []
        self._asked = False

    @override
    def begin(self, prompt: Prefill) -> None:
        self.sampler = prompt.sampler

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        assert noise is None
        if self._asked and not self._every_round:
            raise SettledError
        self._asked = True
        text = [*PROMPT[0], *self.emitted]
        topology = from_parents([self._parents], device=roots.device)
        room = LENGTH - len(self.emitted) - 1
        kept = int((topology.depths[0] <= room).sum())  # shapes here are listed level by level
        topology = from_parents([self._parents[:kept]], device=roots.device)
        paths = topology.path_indices[0].tolist()
        tokens, laws = roots[:, None].repeat(1, kept), torch.zeros(1, kept, VOCAB).double()
        families = Families.of(self._parents[:kept])
        for parent, children in zip(families.parents, families.children, strict=True):
            above = [int(tokens[0, node]) for node in paths[parent][1:] if node >= 0]
            context = [*text, *above][-2:]
            law = self.sampler.law(self._table[context[0], context[1]][None, None])
            laws[:, parent] = law[:, 0]
            tokens[:, children] = self.pick(law, len(children))
        return self.shape(Draft(tokens=tokens, topology=topology, probs=None, laws=laws))

    @override
    def commit(self, accepted: Accepted) -> None:
        self.emitted += accepted.emitted[0]

    def pick(self, law: Tensor, num: int) -> Tensor:
        return self.sampler.siblings(law, num=num)[:, 0]

    def shape(self, draft: Draft) -> Draft:
        return draft


class RankedProposer(DrawnProposer):
    """Drafts the likeliest tokens, as if they had been drawn."""

    def pick(self, law: Tensor, num: int) -> Tensor:
        return law[:, 0].topk(num).indices


class PrunedProposer(DrawnProposer):
    """Leaves out children that its own law thinks little of."""

    def shape(self, draft: Draft) -> Draft:
        assert draft.laws is not None
        parents = draft.topology.host_parents[0]
        tokens = draft.tokens[0].tolist()
        kept = [
            node if node and float(draft.laws[0, parent, tokens[node]]) < 0.4 else parent
            for node, parent in enumerate(parents)
        ]
        for node, parent in enumerate(kept):
            if node and kept[parent] == parent != 0:  # below one that was left out
                kept[node] = node
        return Draft(
            draft.tokens, from_parents([kept], device=draft.tokens.device), None, draft.laws
        )


def law_of(
    monkeypatch: pytest.MonkeyPatch,
    rule: AcceptanceRule,
    make: Callable[[], DrawnProposer],
    *,
    table: Tensor,
    warpers: Sequence[Any] = (),
) -> tuple[dict[tuple[int, ...], float], float]:
    """Return the probability of every output, and the accepted length expected of round one."""

    def run(decisions: Decisions) -> tuple[tuple[int, ...], int]:
        monkeypatch.setattr(loop, "seeded_draws", lambda device: EnumeratedDraws(decisions))
        proposer, stats = make(), SpeculationStats()
        try:
            output = run_loop(proposer, warpers, rule=rule, table=table, stats=stats)
            emitted = output[0, len(PROMPT[0]) :].tolist()
        except SettledError:
            emitted = proposer.emitted
        return tuple(emitted), stats.rows[0].prefill_tokens - 1

    expected = target_law(warpers, table=table)
    law: dict[tuple[int, ...], float] = defaultdict(float)
    accepted = 0.0
    for (emitted, length), weight in all_runs(run):
        accepted += weight * length
        following = {out: w for out, w in expected.items() if out[: len(emitted)] == emitted}
        total = sum(following.values())
        for output, chance in following.items():
            law[output] += weight * chance / total
    return law, accepted


@pytest.mark.parametrize("variant", ["multi_round", "block", "traversal"])
@pytest.mark.parametrize("warpers", list(WARPERS))
def test_drawn_chains_leave_the_targets_law_over_all_rounds(variant, warpers, monkeypatch):
    target, draft = tables(1)
    law, _ = law_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(CHAIN, draft, every_round=True),
        table=target,
        warpers=WARPERS[warpers],
    )
    assert abs(sum(law.values()) - 1) <= EXACT
    assert distance(law, target_law(WARPERS[warpers], table=target)) <= EXACT


@pytest.mark.parametrize("variant", TREE_RULES)
def test_drawn_siblings_leave_the_targets_law_over_all_rounds(variant, monkeypatch):
    target, draft = tables(2)
    law, _ = law_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(WIDE, draft, every_round=True),
        table=target,
    )
    assert distance(law, target_law(table=target)) <= EXACT


@pytest.mark.parametrize("variant", TREE_RULES)
@pytest.mark.parametrize(
    ("tree", "warpers", "seed"),
    [
        ("2x2", "plain", 1),
        ("deep first", "temperature", 2),
        ("deep second", "plain", 3),
        ("deep second", "top-k", 4),
        ("more children than tokens", "temperature", 6),
        ("more children than tokens", "top-k", 7),
    ],
)
def test_drawn_trees_leave_the_targets_law(variant, tree, warpers, seed, monkeypatch):
    target, draft = tables(seed)
    law, _ = law_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(TREES[tree], draft),
        table=target,
        warpers=WARPERS[warpers],
    )
    assert abs(sum(law.values()) - 1) <= EXACT
    assert distance(law, target_law(WARPERS[warpers], table=target)) <= EXACT


@pytest.mark.parametrize("variant", ["multi_round", "block", "traversal"])
def test_harness_catches_ranked_chains_that_pass_for_drawn_ones(variant, monkeypatch):
    target, draft = tables(1)
    law, _ = law_of(
        monkeypatch, RejectionRule(variant), lambda: RankedProposer(CHAIN, draft), table=target
    )
    assert abs(sum(law.values()) - 1) <= EXACT
    assert distance(law, target_law(table=target)) > WRONG


@pytest.mark.parametrize("variant", TREE_RULES)
@pytest.mark.parametrize("cheat", [RankedProposer, PrunedProposer])
def test_harness_catches_trees_that_are_not_as_drawn(variant, cheat, monkeypatch):
    target, draft = tables(2)
    law, _ = law_of(
        monkeypatch, RejectionRule(variant), lambda: cheat(TREES["deep first"], draft), table=target
    )
    assert abs(sum(law.values()) - 1) <= EXACT
    assert distance(law, target_law(table=target)) > WRONG


@pytest.mark.parametrize("variant", TREE_RULES)
def test_harness_catches_a_sibling_that_is_not_removed_from_the_law(variant, monkeypatch):
    target, draft = tables(7)  # two tokens are left after the first rejection
    monkeypatch.setattr(rejection, "_without", lambda law, token: law)
    law, _ = law_of(
        monkeypatch, RejectionRule(variant), lambda: DrawnProposer(WIDE, draft), table=target
    )
    assert distance(law, target_law(table=target)) > WRONG


def expected_length(monkeypatch, variant: str, tree: list[int], seed: int) -> float:
    target, draft = tables(seed)
    return law_of(
        monkeypatch, RejectionRule(variant), lambda: DrawnProposer(tree, draft), table=target
    )[1]


def test_one_drawn_token_is_accepted_as_often_as_the_laws_overlap(monkeypatch):
    target, draft = tables(3)
    laws = [process([], table[PROMPT[0][0], PROMPT[0][1]]) for table in (target, draft)]
    overlap = float(torch.minimum(*laws).sum())
    for variant in ("multi_round", "block", "traversal"):
        assert expected_length(monkeypatch, variant, [0, 0], 3) == pytest.approx(overlap)


@pytest.mark.parametrize("seed", range(3))
def test_block_keeps_more_of_a_chain_than_tokens_one_by_one(seed, monkeypatch):
    one_by_one, block, traversal = (
        expected_length(monkeypatch, variant, CHAIN, seed)
        for variant in ("multi_round", "block", "traversal")
    )
    assert block > one_by_one + 1e-3
    assert traversal == pytest.approx(block, abs=EXACT)


@pytest.mark.parametrize("seed", range(2))
def test_traversal_keeps_more_of_a_tree_than_multi_round_and_both_more_than_a_chain(
    seed, monkeypatch
):
    chain = expected_length(monkeypatch, "block", CHAIN, seed)
    multi_round, traversal = (
        expected_length(monkeypatch, variant, TREES["deep first"], seed) for variant in TREE_RULES
    )
    assert chain < multi_round < traversal


def test_greedy_decoding_takes_the_exact_rule():
    base = shared_model("llama")
    spec = SpecModel(base, NgramProposer())  # which could not draw
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = base.generate(**prompts(6, 4), **settings)
    for acceptance in ("typical", "rejection"):
        found = spec.generate(**prompts(6, 4), **settings, acceptance=acceptance)
        assert torch.equal(found, expected)
        assert spec.last_speculation.acceptance == "exact"
        assert not spec.last_speculation.is_lossy


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0}
RULES = [TypicalRule(), *map(RejectionRule, ("multi_round", "block", "traversal"))]


def drafter(kind: str) -> Proposer:
    base = shared_model("llama")
    if kind == "chain":
        return DraftModelProposer(base, target=base, num_draft_tokens=3, branches=1)
    if kind == "tree":
        other = shared_model("llama", 1)
        return DraftModelProposer(other, target=base, num_draft_tokens=7, width=2, branches=2)
    heads = MedusaHeads(MedusaHeadsConfig(base.config.hidden_size, VOCAB_SIZE, num_heads=2))
    heads.init_weights_(base.get_output_embeddings().weight)
    return MedusaProposer(heads, target=base, tree=[2, 2])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (kind, rule)
        for kind in ("chain", "tree", "medusa")
        for rule in RULES
        if kind == "chain" or rule != RejectionRule("block")
    ],
)
def test_ragged_batches_end_at_their_ends_and_are_padded_there_alone(kind, rule):
    spec = SpecModel(shared_model("llama"), drafter(kind))
    ends, unused = list(range(1, 24)), VOCAB_SIZE - 1
    inputs, lengths = prompts(9, 3, 6), set()
    for seed in range(2):
        output, _ = generate(
            spec,
            inputs,
            seed=seed,
            **SAMPLED,
            max_new_tokens=25,
            eos_token_id=ends,
            pad_token_id=unused,
            suppress_tokens=[unused],
            acceptance=rule,
        )
        assert torch.equal(output[:, :9], inputs["input_ids"])
        for row in output[:, 9:].tolist():
            length = row.index(unused) if unused in row else len(row)
            assert set(row[length:]) <= {unused}
            assert not set(row[: length - 1]) & set(ends)
            assert length == 25 or row[length - 1] in ends
            lengths.add(length)
    assert len(lengths) > 1
    assert spec.last_speculation.acceptance == rule.name
    assert spec.last_speculation.is_lossy == rule.is_lossy


@pytest.mark.parametrize("acceptance", ["rejection", RejectionRule("traversal")])
@pytest.mark.parametrize("kind", ["chain", "tree", "medusa"])
def test_seed_reproduces_a_run_and_moves_the_generator_by_one_draw(kind, acceptance):
    spec = SpecModel(shared_model("llama"), drafter(kind))
    settings = {**SAMPLED, "max_new_tokens": 10, "acceptance": acceptance}
    first, state = generate(spec, prompts(5, 7), seed=2, **settings)
    again, _ = generate(spec, prompts(5, 7), seed=2, **settings)
    other, _ = generate(spec, prompts(5, 7), seed=3, **settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(2)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)


def test_typical_draws_nothing():
    spec = SpecModel(shared_model("llama"), NgramProposer())
    torch.manual_seed(9)
    before = torch.get_rng_state()
    settings = {**SAMPLED, "max_new_tokens": 10, "acceptance": "typical"}
    first, state = generate(spec, prompts(5), seed=9, **settings)
    assert torch.equal(before, state)
    assert torch.equal(first, generate(spec, prompts(5), seed=1, **settings)[0])


def test_a_draft_model_that_is_the_target_is_always_kept():
    spec = SpecModel(shared_model("llama"), drafter("chain"))
    for acceptance in RULES[1:]:
        generate(spec, prompts(5, 8), **SAMPLED, max_new_tokens=16, acceptance=acceptance)
        assert spec.last_speculation.tau == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("kind", ["tree", "medusa"])
def test_laws_of_a_draft_are_what_its_network_says_below_each_node(kind):
    """And siblings are different tokens that their law allows."""
    drafts: list[Draft] = []
    inner = drafter(kind)
    original = inner.propose

    def propose(roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        drafts.append(original(roots, noise=noise))
        return drafts[-1]

    inner.propose = propose  # type: ignore[method-assign]  # watches what passes
    spec = SpecModel(shared_model("llama"), inner)
    output, _ = generate(spec, prompts(5), **SAMPLED, max_new_tokens=8, acceptance="rejection")
    first = drafts[0] if kind == "tree" else drafts[-1]
    assert first.laws is not None
    families = Families.of(first.topology.host_parents[0])
    for parent, children in zip(families.parents, families.children, strict=True):
        law, tokens = first.laws[0, parent], first.tokens[0, children]
        assert law.sum() == pytest.approx(1.0, abs=1e-5)
        assert len(tokens.unique()) == len(children)
        assert (law[tokens] > 0).all()
        if kind == "tree":
            path = [node for node in first.topology.path_indices[0, parent].tolist() if node > 0]
            text = torch.cat([output[:, :5], first.tokens[:, path]], dim=1)
            logits = shared_model("llama", 1)(text).logits[0, -1]
            torch.testing.assert_close(law, (logits / 0.9).softmax(-1), rtol=1e-3, atol=1e-5)


def test_proposers_that_do_not_draw_are_refused_before_anything_is_computed(monkeypatch):
    spec = SpecModel(shared_model("llama"), NgramProposer())
    for name in ("prefill", "forward_tree"):
        monkeypatch.setattr(spec._target, name, None)
    with pytest.raises(OptionError, match=r"drafts drawn without replacement.*NgramProposer"):
        spec.generate(**prompts(4), do_sample=True, max_new_tokens=4, acceptance="rejection")


def test_unknown_rules_are_refused():
    spec = SpecModel(shared_model("llama"), None)
    with pytest.raises(UnknownNameError, match="'lossless' is no registered rule"):
        spec.generate(**prompts(4), acceptance="lossless")


def test_draft_without_its_laws_is_refused():
    class Silent(DrawnProposer):
        def shape(self, draft: Draft) -> Draft:
            return Draft(draft.tokens, draft.topology, None)

    target, draft = tables(0)
    with pytest.raises(DraftError, match=r"laws of shape None.*expected \(1, 3, 3\)"):
        run_loop(Silent(CHAIN, draft), [], rule=RejectionRule(), table=target)


def test_nan_is_reported_under_every_rule():
    base = build_model("llama")
    with torch.no_grad():
        base.get_output_embeddings().weight.fill_(float("nan"))
    for rule in RULES:
        spec = SpecModel(base, None)
        spec.self_check = SpecModel(shared_model("llama"), None).self_check
        with pytest.raises(NumericalError, match="NaN"):
            spec.generate(**prompts(4), **SAMPLED, max_new_tokens=4, acceptance=rule)


def test_report_names_the_rule_and_that_it_is_lossy():
    spec = SpecModel(shared_model("llama"), None)
    spec.generate(**prompts(4), **SAMPLED, max_new_tokens=4, acceptance="typical")
    lines: list[str] = []
    spec.print_report(write=lines.append)
    assert any("typical" in line and "lossy" in line for line in lines)
    record = spec.last_speculation.to_dict()
    assert record["is_lossy"] is True
    assert record["acceptance"] == "typical (epsilon 0.09, delta 0.3)"
