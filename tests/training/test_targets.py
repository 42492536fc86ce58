import pytest
import torch

from speclm.training.targets import (
    IGNORED,
    count_shifted,
    find_sources,
    next_targets,
    place_after,
    shifted_targets,
    until_first_difference,
)


def test_targets_of_a_hand_made_row():
    # positions:           0  1  2  3  4  5   and one of padding
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 0]]).bool()
    targets = shifted_targets(tokens, mask, num_drafted=3)[0].tolist()
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


@pytest.mark.parametrize("num_drafted", [1, 4, 9])
def test_target_of_draft_token_i_at_t_is_token_t_plus_2_plus_i(num_drafted):
    tokens = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    targets = shifted_targets(tokens, torch.ones_like(tokens).bool(), num_drafted=num_drafted)
    assert targets.shape == (3, 6, num_drafted)
    for t in range(6):
        for index in range(num_drafted):
            inside = t + 2 + index < 6
            expected = tokens[:, t + 2 + index] if inside else torch.full((3,), IGNORED)
            assert torch.equal(targets[:, t, index], expected)


def test_sources_are_the_positions_from_which_a_counted_token_is_drafted():
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    sources = find_sources(tokens, mask, num_steps=2)
    # Row 0 drafts token 3 at step 0 of position 1 and at step 1 of position 0.
    assert sources.indices.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert sources.targets.tolist() == [
        [[-100, 4], [4, -100], [-100, -100]],
        [[8, 9], [9, 0], [0, -100]],
    ]


def test_batch_without_any_counted_token_has_one_source_without_target():
    sources = find_sources(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3).bool(), num_steps=1)
    assert sources.targets.tolist() == [[[-100]]]


def test_counts_are_those_of_the_shifted_targets():
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()
    tokens = torch.ones_like(mask).long()
    targets = shifted_targets(tokens, mask, num_drafted=6)
    expected = (targets != IGNORED).sum((0, 1))
    assert count_shifted(mask, num_drafted=6).tolist() == expected.tolist()
    following = (next_targets(tokens, mask) != IGNORED).sum()
    assert count_shifted(mask, num_drafted=1, first=1).tolist() == [following]


def test_tokens_of_the_base_stand_after_the_positions_that_they_were_chosen_at():
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    placed = place_after(torch.tensor([7, 8, 9, 6]), torch.tensor([0, 1, 2, 6]), mask)
    none = IGNORED
    assert placed.tolist() == [[none, 7, none, 9], [none, none, none, 6]]


def test_tokens_of_the_base_count_up_to_the_first_that_the_text_lacks():
    base, text = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), torch.tensor([[5, 6, 9, 8]] * 2)
    found = until_first_difference(base, text).tolist()
    assert found == [[5, 6, 7, IGNORED], [1, IGNORED, IGNORED, IGNORED]]
