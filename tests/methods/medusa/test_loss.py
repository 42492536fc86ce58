import pytest
import torch
import torch.nn.functional as F

from speclm.methods.medusa.loss import IGNORED, score_guesses, shifted_targets, weighted_loss

CLOSE = 1e-5  # float32, sums of 11 terms


def test_targets_of_a_hand_made_row():
    # positions:           0  1  2  3  4  5   and one of padding
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 0]]).bool()
    targets = shifted_targets(tokens, mask, num_heads=3)[0].tolist()
    none = IGNORED
    assert targets == [
        [none, 8, none],  # tokens 2, 3, 4; of these the assistant wrote token 3
        [8, none, 1],  # tokens 3, 4, 5
        [none, 1, none],
        [1, none, none],
        [none, none, none],
        [none, none, none],
        [none, none, none],
    ]


@pytest.mark.parametrize("num_heads", [1, 4, 9])
def test_target_of_head_i_at_t_is_token_t_plus_2_plus_i(num_heads):
    tokens = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    targets = shifted_targets(tokens, torch.ones_like(tokens).bool(), num_heads=num_heads)
    assert targets.shape == (3, 6, num_heads)
    for t in range(6):
        for head in range(num_heads):
            inside = t + 2 + head < 6
            expected = tokens[:, t + 2 + head] if inside else torch.full((3,), IGNORED)
            assert torch.equal(targets[:, t, head], expected)


@pytest.fixture
def guesses():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 11, generator=generator)
    targets = torch.randint(11, (5, 2), generator=generator)
    targets[1, 0] = targets[4, 1] = IGNORED
    return logits, targets


def test_losses_are_cross_entropies_where_there_is_a_target(guesses):
    logits, targets = guesses
    losses, _ = score_guesses(logits, targets)
    assert losses[1, 0] == losses[4, 1] == 0
    expected = -logits[2, 1].log_softmax(-1)[targets[2, 1]]
    torch.testing.assert_close(losses[2, 1], expected, atol=CLOSE, rtol=0)


def test_rank_is_the_place_among_the_best_guesses(guesses):
    logits, targets = guesses
    _, ranks = score_guesses(logits, targets)
    order = logits.argsort(-1, descending=True)
    for row in range(5):
        for head in range(2):
            if targets[row, head] == IGNORED:
                assert ranks[row, head] == -1
            else:
                assert order[row, head, ranks[row, head]] == targets[row, head]


def test_soft_targets_share_the_loss(guesses):
    logits, targets = guesses
    distribution = torch.randn(5, 2, 11, generator=torch.Generator().manual_seed(1)).softmax(-1)
    hard, _ = score_guesses(logits, targets)
    mixed, _ = score_guesses(logits, targets, soft_targets=distribution, soft_weight=0.25)
    soft = -(distribution * logits.log_softmax(-1)).sum(-1) * (targets != IGNORED)
    torch.testing.assert_close(mixed, 0.75 * hard + 0.25 * soft, atol=CLOSE, rtol=0)


def test_distribution_that_puts_all_on_the_target_is_the_hard_loss(guesses):
    logits, targets = guesses
    distribution = F.one_hot(targets.clamp(min=0), 11).float()
    hard, _ = score_guesses(logits, targets)
    soft, _ = score_guesses(logits, targets, soft_targets=distribution, soft_weight=1.0)
    torch.testing.assert_close(soft, hard, atol=CLOSE, rtol=0)


def test_heads_are_normalised_by_their_own_count_and_decayed():
    loss = weighted_loss(torch.tensor([6.0, 4.0, 9.0]), torch.tensor([3, 1, 0]), decay=0.5)
    assert loss.item() == pytest.approx(2.0 + 0.5 * 4.0 + 0.25 * 9.0)
    loss = weighted_loss(torch.tensor([6.0, 0.0]), torch.tensor([3, 0]), decay=1.0)
    assert loss.item() == pytest.approx(2.0)
