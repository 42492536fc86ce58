"""What several rounds committed, joined for one draft."""

import torch

from speclm.acceptance import Accepted
from speclm.drafting.committed import CommittedRounds


def accepted(emitted):
    """Return a round whose features are its tokens."""
    padded = [row + [-1] * (4 - len(row)) for row in emitted]
    made = Accepted.from_host([[] for _ in emitted], emitted, device=torch.device("cpu"))
    made.features = torch.tensor(padded)[:, :, None].float()
    return made


def test_rounds_are_joined_row_by_row_and_short_rows_keep_their_state():
    rounds = CommittedRounds()
    assert rounds.take() is None
    for emitted in ([[1, 2], [7]], [[], []], [[3], [8, 9, 4]], [[], [5]]):
        rounds.add(accepted(emitted))
    new = rounds.take()
    assert rounds.take() is None
    assert new.counts == [3, 5]
    assert new.tokens[0, :3].tolist() == [1, 2, 3]
    assert new.tokens[1].tolist() == [7, 8, 9, 4, 5]
    assert new.features[1, :, 0].tolist() == [7, 8, 9, 4, 5]
    assert new.newest(new.features, None)[:, 0].tolist() == [3, 5]
    rounds.add(accepted([[], [6]]))
    waiting = rounds.take()
    before = torch.tensor([[3.0], [5.0]])
    assert waiting.newest(waiting.features, before)[:, 0].tolist() == [3, 6]
