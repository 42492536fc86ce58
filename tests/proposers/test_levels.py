import torch

from speclm.proposers._levels import assemble, row_probs
from speclm.tree.growth import GrownRow


def test_probabilities_of_nodes_are_given_their_paths():
    row = GrownRow([5, 6, 7], [0, 0, 1], [None] * 3, [-0.5, -1.5, -0.75])

    found = torch.tensor(row_probs(row)).log()

    assert torch.allclose(found, torch.tensor([-0.5, -1.5, -0.25]))


def test_a_grown_draft_has_probabilities_and_padding_none():
    rows = [GrownRow([5], [0], [None], [-0.5]), GrownRow([6, 7], [0, 1], [None] * 2, [-0.2, -0.9])]

    draft = assemble(rows, torch.tensor([1, 2]))

    assert draft.probs is not None
    expected = torch.tensor([[0.0, -0.5, -torch.inf], [0.0, -0.2, -0.7]]).exp()
    assert torch.allclose(draft.probs, expected)
