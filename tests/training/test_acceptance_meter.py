import pytest
import torch

from speclm.training.acceptance_meter import AcceptanceMeter, turns
from speclm.training.targets import IGNORED

CHAIN = ((0,), (0, 0))


def test_turns_are_read_from_the_hidden_state_before_each_root():
    # Token r is the root, its ranks stand at r - 1; the turn's last token is no root.
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]]).bool()
    ranks = torch.tensor([[[9, 9], [0, 1], [2, 7], [7, 7], [7, 7], [3, 7], [7, 7], [7, 7]]])
    assert list(turns(ranks, mask)) == [[[0, 1], [2, -1]], [[3, -1]]]


def test_draft_token_that_reaches_into_the_next_turn_does_not_count():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]]).bool()
    ranks = torch.zeros(1, 6, 3, dtype=torch.long)
    assert list(turns(ranks, mask)) == [[[0, -1, -1]], [[0, -1, -1]]]


def test_turn_at_the_start_of_a_row_has_no_hidden_state_before_its_first_token():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    ranks = torch.arange(4).view(1, 4, 1)
    assert list(turns(ranks, mask)) == [[[0]]]


def add(meter, *, ranks, loss_mask, differs=(), **sums):
    """Add a batch of texts that agree with the base, except at some positions of all rows."""
    tokens = torch.ones(loss_mask.shape, dtype=torch.long)
    base_tokens = tokens.masked_fill(~loss_mask, IGNORED)
    base_tokens[:, list(differs)] = 2
    meter.add(
        ranks=ranks,
        tokens=tokens,
        base_tokens=base_tokens,
        loss_mask=loss_mask,
        **{"loss_sums": torch.ones(1), "counts": torch.ones(1).long(), **sums},
    )


def test_estimated_tau_replays_rounds():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]).bool()
    ranks = torch.tensor([[[0, 0], [5, 5], [5, 5], [1, 5], [0, 5], [5, -1], [-1, -1]]])
    meter = AcceptanceMeter(CHAIN, num_drafted=2, name="head")
    sums = {"loss_sums": torch.tensor([6.0, 4.0]), "counts": torch.tensor([6, 4])}
    add(meter, ranks=ranks, loss_mask=mask, **sums)
    figures = meter.drain()
    # From the root 1 two draft tokens and the bonus token lead to 4, whose draft fails; then 5.
    assert figures["estimated_tau"] == pytest.approx(5 / 3)
    assert (figures["head0_loss"], figures["head1_loss"]) == (1.0, 1.0)
    assert figures["head0_top1"] == pytest.approx(2 / 6)
    assert figures["head0_top2"] == pytest.approx(3 / 6)
    assert figures["base_agreement"] == 1.0


def test_chain_ends_where_the_text_leaves_what_the_base_writes():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    ranks = torch.zeros(1, 8, 2, dtype=torch.long)
    # Roots 1 and 4; 1, 3 and 6; 1, 3 and 5; and 1 and 4, where the token that differs is the last.
    for differs, rounds in (((), 2), ([2], 3), ([2, 4, 6], 3), ([3], 2)):
        meter = AcceptanceMeter(CHAIN, num_drafted=2, name="head")
        add(meter, ranks=ranks, loss_mask=mask, differs=differs)
        figures = meter.drain()
        assert figures["estimated_tau"] == 6 / rounds
        assert figures["base_agreement"] == pytest.approx(1 - len(differs) / 7)
        assert figures["head0_top1"] == 1.0


def test_figures_start_anew_after_they_are_read():
    meter = AcceptanceMeter(CHAIN, num_drafted=1, name="head")
    ranks = torch.tensor([[[0], [-1], [-1]]])
    mask = torch.tensor([[0, 1, 1]]).bool()
    for _ in range(2):
        add(meter, ranks=ranks, loss_mask=mask)
        assert meter.drain()["head0_top1"] == 1.0
    assert meter.drain() == {}


def test_sums_of_all_processes_are_added():
    meter = AcceptanceMeter(CHAIN, num_drafted=1, name="head")
    add(
        meter,
        loss_sums=torch.tensor([3.0]),
        ranks=torch.tensor([[[0], [-1]]]),
        loss_mask=torch.tensor([[False, True]]),
    )
    figures = meter.drain(lambda sums: sums * 2)
    assert figures == {
        "head0_loss": 3.0,
        "head0_top1": 1.0,
        "head0_top2": 1.0,
        "head0_top3": 1.0,
        "base_agreement": 1.0,
    }  # no root: the answer is one token


def test_draft_tokens_that_are_not_trained_are_measured_all_the_same():
    meter = AcceptanceMeter(CHAIN, num_drafted=2, name="step")
    add(
        meter,
        loss_sums=torch.tensor([3.0]),
        counts=torch.tensor([2]),  # one target less than there are ranks, outside the columns
        ranks=torch.tensor([[[0, 2], [1, 0], [4, -1], [-1, -1], [-1, -1]]]),
        loss_mask=torch.tensor([[False, True, True, True, True]]),
    )
    figures = meter.drain()
    assert figures["step0_loss"] == pytest.approx(3 / 2)
    assert figures["step0_top1"] == pytest.approx(1 / 3)
    assert (figures["step1_top1"], figures["step1_top3"]) == (0.5, 1.0)
    assert "step1_loss" not in figures
    assert figures["estimated_tau"] == pytest.approx(3 / 2)  # the rounds end with 2 and 1 tokens


def test_estimated_tau_of_trees_replays_their_accepted_lengths():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]).bool()
    lengths = torch.tensor([[2, 5, 5, 0, 1, -1, -1], [-1, -1, 0, -1, -1, -1, -1]])
    meter = AcceptanceMeter(CHAIN, num_drafted=1, name="position")
    add(
        meter,
        ranks=torch.zeros(2, 7, 1, dtype=torch.long),
        loss_mask=mask,
        tree_lengths=lengths,
    )
    # Roots 1, 4 and 5 emit 3, 1 and 1 tokens, and the one root of the other turn emits 1.
    assert meter.drain()["estimated_tree_tau"] == pytest.approx(6 / 4)
    assert meter.drain() == {}


def test_figures_may_be_those_of_the_first_draft_tokens_only():
    meter = AcceptanceMeter(CHAIN, num_drafted=2, name="token", num_named=1)
    meter.add(
        loss_sums=torch.ones(1),
        counts=torch.tensor([1]),
        ranks=torch.zeros(1, 4, 2, dtype=torch.long),
        tokens=torch.ones(1, 4, dtype=torch.long),
        base_tokens=torch.tensor([[IGNORED, 1, 1, 1]]),
        loss_mask=torch.tensor([[False, True, True, True]]),
    )
    figures = meter.drain()
    assert {"estimated_tau", "token0_loss", "token0_top1"} <= set(figures)
    assert "token1_top1" not in figures
