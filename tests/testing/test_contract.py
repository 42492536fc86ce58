from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import OptionError, ProposerContractError
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.methods.recycling.proposer import RecyclingProposer
from speclm.target.features import TargetFeatures
from speclm.testing import ScriptedProposer, check_proposer
from speclm.tree import TreeTopology, chain, from_parents
from tests.models import VOCAB_SIZE, shared_model

DEPTH = 3


class RepeatProposer(Proposer):
    """Proposes the last token again; reads neither prompt nor commits, and need not."""

    config = ProposerConfig(depth=DEPTH)

    def begin(self, prompt):
        pass

    def propose(self, roots, *, noise):
        tokens = roots[:, None].expand(-1, DEPTH + 1)
        node_probs = [[0.5] * (DEPTH + 1) for _ in roots]
        return Draft(tokens=tokens, topology=chain(DEPTH), node_probs=node_probs)

    def commit(self, accepted):
        pass


class Planted(Proposer):
    """An honest proposer with a fault: `spoil` changes each draft, the others spy on calls."""

    def __init__(self, inner=NgramProposer, *, spoil=None, on_begin=None, on_commit=None):
        self.inner = inner()
        self.spoil = spoil or (lambda draft: draft)
        self.on_begin = on_begin or (lambda prompt: None)
        self.on_commit = on_commit or self.inner.commit

    def begin(self, prompt):
        self.inner.begin(prompt)
        self.on_begin(prompt)

    def propose(self, roots, *, noise):
        return self.spoil(self.inner.propose(roots, noise=noise))

    def commit(self, accepted):
        self.on_commit(accepted)


def refuses(match, make):
    with pytest.raises(ProposerContractError, match=match) as caught:
        check_proposer(make)
    assert "expected" in str(caught.value)


def with_topology(draft, **changes):
    known = vars(draft.topology) | changes
    return replace(draft, topology=TreeTopology(**known))


def test_honest_factory_passes():
    check_proposer(Planted)  # nothing is spoilt


def test_scripted_proposer_passes():
    reference = [[(7 * i * i + i) % 32 for i in range(50)]] * 4
    check_proposer(lambda: ScriptedProposer(reference, wrong_at=(3, 8)))


def test_honest_proposer_passes_with_other_sizes():
    check_proposer(
        lambda: NgramProposer(num_draft_tokens=1), vocab_size=3, temperature=1.0, max_length=32
    )


class Forgetful(RecyclingProposer):
    """Drafts by what it remembers, and does not say so."""

    remembers = False


def test_proposer_that_remembers_has_to_declare_it():
    base = shared_model("llama")
    check_proposer(lambda: RecyclingProposer(base), vocab_size=VOCAB_SIZE)
    with pytest.raises(ProposerContractError, match="kept state between generations"):
        check_proposer(lambda: Forgetful(base), vocab_size=VOCAB_SIZE)


def test_drafts_of_a_proposer_that_remembers_are_checked():
    class Spoilt(Planted):
        remembers = True

    def spoil(draft):
        return replace(draft, tokens=draft.tokens + 1000)

    refuses("tokens", lambda: Spoilt(RepeatProposer, spoil=spoil))


def test_honest_instance_passes_and_generators_of_the_caller_are_left_as_they_are():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_proposer(RepeatProposer())
    assert torch.equal(before, torch.get_rng_state())


def test_other_objects_than_drafts_are_refused():
    class Tuples(RepeatProposer):
        def propose(self, roots, *, noise):
            return roots, None

    refuses("returned tuple, expected a Draft", Tuples)


def test_child_before_parent_is_refused():
    def spoil(draft):
        bad = torch.tensor([[0, 2, 0, 1]])
        return with_topology(draft, parents=bad)

    refuses("parents do not describe a tree.*before", lambda: Planted(RepeatProposer, spoil=spoil))


@pytest.mark.parametrize("field", ["depths", "ancestor_words", "path_ends"])
def test_derived_fields_that_do_not_fit_the_parents_are_refused(field):
    def spoil(draft):
        wrong = getattr(draft.topology, field).clone()
        wrong[0, -1] += 1
        return with_topology(draft, **{field: wrong})

    refuses(f"topology.{field} is", lambda: Planted(RepeatProposer, spoil=spoil))


def test_host_lists_that_do_not_fit_the_parents_are_refused():
    def spoil(draft):
        return with_topology(draft, host_parents=[[0, 0, 0, 0]])

    refuses("topology.host_parents is", lambda: Planted(RepeatProposer, spoil=spoil))


def test_wrong_max_depth_is_refused():
    refuses(
        "topology.max_depth is 9",
        lambda: Planted(RepeatProposer, spoil=lambda draft: with_topology(draft, max_depth=9)),
    )


def test_tree_beyond_the_budget_is_refused():
    class Huge(RepeatProposer):
        def propose(self, roots, *, noise):
            parents = torch.tensor([[0, *range(70)]])
            column = parents[..., None]
            topology = TreeTopology(
                parents, parents, max_depth=70, ancestor_words=column, path_ends=column
            )
            return Draft(roots[:, None].expand(-1, 71), topology, None)

    refuses("levels deep", Huge)


def test_rows_mixed_in_a_batch_are_refused():
    def spoil(draft):
        tokens = draft.tokens.clone()
        tokens[:, 1:] = tokens[:, 1:].roll(1, 0)
        return replace(draft, tokens=tokens)

    refuses("mixed the rows of a batch", lambda: Planted(RepeatProposer, spoil=spoil))


def test_left_padding_taken_for_text_is_refused():
    class Unaware(NgramLike):
        def begin(self, prompt):
            self.inner.begin(replace(prompt, num_padding=torch.zeros_like(prompt.num_padding)))

    refuses("mixed the rows of a batch", Unaware)


def test_wrong_dtype_is_refused():
    def spoil(draft):
        return replace(draft, tokens=draft.tokens.int())

    refuses("dtype of tokens is torch.int32", lambda: Planted(RepeatProposer, spoil=spoil))


def with_node_probs(draft, node_probs):
    draft = replace(draft)
    object.__setattr__(draft, "node_probs", node_probs)  # as where no hook checks types
    return draft


def test_probabilities_that_are_no_host_lists_or_miss_nodes_are_refused():
    for node_probs, words in (
        (torch.ones(3, DEPTH + 1), "node_probs is a Tensor, expected lists"),
        ([[1.0]], r"shape of node_probs is \(1, 1\)"),
    ):
        spoil = partial(with_node_probs, node_probs=node_probs)
        refuses(words, lambda spoil=spoil: Planted(RepeatProposer, spoil=spoil))


def test_wrong_dtype_of_the_topology_is_refused():
    def spoil(draft):
        return with_topology(draft, parents=draft.topology.parents.int())

    refuses("dtype of topology.parents", lambda: Planted(RepeatProposer, spoil=spoil))


def test_wrong_device_is_refused():
    refuses(
        "device of tokens is meta",
        lambda: Planted(spoil=lambda draft: replace(draft, tokens=draft.tokens.to("meta"))),
    )
    refuses(
        "device of topology.parents is meta",
        lambda: Planted(
            spoil=lambda draft: with_topology(draft, parents=draft.topology.parents.to("meta"))
        ),
    )


def test_missing_rows_are_refused():
    refuses(
        "shape of tokens",
        lambda: Planted(
            RepeatProposer, spoil=lambda draft: Draft(draft.tokens[:1], chain(3), None)
        ),
    )
    refuses(
        "topology has 2 rows",
        lambda: Planted(
            spoil=lambda draft: Draft(
                draft.tokens[:, :1], from_parents([[0], [0]], device=torch.device("cpu")), None
            )
        ),
    )


def test_token_outside_the_vocabulary_is_refused():
    def spoil(draft):
        return replace(
            draft, tokens=torch.cat([draft.tokens[:, :-1], draft.tokens[:, -1:] + 99], 1)
        )

    refuses("tokens lie in .* expected 0 to 31", lambda: Planted(RepeatProposer, spoil=spoil))


@pytest.mark.parametrize("factor", [-1.0, float("nan"), 3.0])
def test_values_that_are_no_probabilities_are_refused(factor):
    def spoil(draft):
        return replace(draft, node_probs=[[p * factor for p in row] for row in draft.node_probs])

    refuses("node_probs lie in", lambda: Planted(RepeatProposer, spoil=spoil))


def test_siblings_whose_probabilities_sum_above_one_are_refused():
    class Unnormalised(RepeatProposer):
        def propose(self, roots, *, noise):
            tokens = torch.stack([roots, roots * 0 + 1, roots * 0 + 2], dim=1)
            topology = from_parents([[0, 0, 0]], device=roots.device)
            return Draft(tokens, topology, [[0.7] * 3 for _ in roots])

    refuses(r"siblings sum to 1\.4", Unnormalised)


def test_state_kept_between_generations_is_refused():
    class Keeps(RepeatProposer):
        def __init__(self):
            self.generations = 0

        def begin(self, prompt):
            self.generations += 1

        def propose(self, roots, *, noise):
            draft = super().propose(roots, noise=noise)
            tokens = draft.tokens.clone()
            tokens[:, 1:] = self.generations
            return replace(draft, tokens=tokens)

    refuses("kept state between generations", Keeps)


def test_state_shared_by_instances_is_refused():
    class Shares(RepeatProposer):
        instances = 0

        def __init__(self):
            Shares.instances += 1
            self.mine = Shares.instances % 7

        def propose(self, roots, *, noise):
            draft = super().propose(roots, noise=noise)
            return replace(
                draft, tokens=torch.cat([roots[:, None], draft.tokens[:, 1:] * 0 + self.mine], 1)
            )

    refuses("kept state between generations", Shares)


class NgramLike(Proposer):
    """Wraps the n-gram proposer but takes the root that it is given."""

    def __init__(self):
        self.inner = NgramProposer(min_probability=0.01)

    def begin(self, prompt):
        self.inner.begin(prompt)

    def propose(self, roots, *, noise):
        draft = self.inner.propose(roots, noise=noise)
        return replace(draft, tokens=torch.cat([roots[:, None], draft.tokens[:, 1:]], dim=1))

    def commit(self, accepted):
        self.inner.commit(accepted)


def test_ignored_commit_is_refused():
    class Deaf(NgramLike):
        def commit(self, accepted):
            pass

    refuses("ignores commit", Deaf)


def test_root_of_an_earlier_round_is_refused():
    refuses(
        "column 0 of tokens is .* expected the roots", lambda: Planted(on_commit=lambda _: None)
    )


@pytest.mark.parametrize(
    ("draw", "generator"),
    [
        (lambda: torch.rand(1), "torch"),
        (np.random.rand, "numpy"),
    ],
)
@pytest.mark.parametrize("method", ["begin", "propose", "commit"])
def test_moved_global_generator_is_refused(draw, generator, method):
    def make():
        planted = Planted()
        if method == "begin":
            planted.on_begin = lambda prompt: draw()
        elif method == "propose":
            planted.spoil = lambda draft: (draw(), draft)[1]
        else:
            planted.on_commit = lambda accepted: (planted.inner.commit(accepted), draw())
        return planted

    refuses(rf"\.{method} moved the global generator of {generator}", make)


@pytest.mark.parametrize("when", ["propose", "commit"])
def test_earlier_draft_that_changes_is_refused(when):
    class Reuses(RepeatProposer):
        def __init__(self):
            self.buffer = None

        def begin(self, prompt):
            self.buffer = torch.zeros(len(prompt.first_tokens), 2, dtype=torch.long)
            self.rounds = 0

        def propose(self, roots, *, noise):
            self.buffer[:, 0] = roots
            if when == "propose":
                self.buffer[:, 1] = self.rounds
            return Draft(self.buffer, chain(1), None)

        def commit(self, accepted):
            self.rounds += 1
            if when == "commit":
                self.buffer += 1

    refuses(rf"\.{when} mutated an earlier draft", Reuses)


@pytest.mark.parametrize("method", ["begin", "propose", "commit"])
def test_mutated_arguments_are_refused(method):
    class Mutates(NgramLike):
        def begin(self, prompt):
            super().begin(prompt)
            if method == "begin":
                prompt.tokens.zero_()

        def propose(self, roots, *, noise):
            draft = super().propose(roots, noise=noise)
            if method == "propose":
                roots += 1
            return draft

        def commit(self, accepted):
            super().commit(accepted)
            if method == "commit":
                accepted.tokens.zero_()

    refuses(rf"\.{method} mutated its arguments", Mutates)


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match="max_length is 5"):
        check_proposer(NgramProposer, max_length=5)


def test_medusa_heads_pass_on_random_hidden_states():
    base = shared_model("llama")
    heads = MedusaHeads(MedusaHeadsConfig(base.config.hidden_size, VOCAB_SIZE, num_heads=2))
    heads.init_weights_(base.get_output_embeddings().weight)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        heads.weight.copy_(0.3 * torch.randn(heads.weight.shape, generator=generator))
    check_proposer(
        lambda: MedusaProposer(heads, target=base, tree=[2, 1]),
        vocab_size=VOCAB_SIZE,
        hidden_size=base.config.hidden_size,
    )


def test_features_that_a_proposer_changes_are_caught():
    class Spoils(RepeatProposer):
        features = TargetFeatures.LAST_HIDDEN

        def begin(self, prompt):
            assert prompt.features.shape == (*prompt.tokens.shape, 32)

        def commit(self, accepted):
            accepted.features.zero_()

    refuses(r"commit mutated its arguments", Spoils)
