"""Fixed storage: what is written where, and which slots a node sees."""

import torch

from speclm.cache.fixed import FixedLayer, seen_slots


def test_keys_and_values_are_written_to_the_slots_and_all_are_returned():
    keys, values = torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6, 4)
    layer = FixedLayer(keys, values, torch.tensor([2, 3]))
    found = layer.update(torch.ones(1, 2, 2, 3), torch.full((1, 2, 2, 4), 2.0))
    assert found[0] is keys
    assert found[1] is values
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert values[0, 1, :, 3].tolist() == [0, 0, 2, 2, 0, 0]
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(2) == (6, 0)
    assert layer.get_max_length() == 6


def test_nodes_see_their_ancestors_and_committed_slots_within_a_window():
    depths = torch.tensor([[0, 1, 1]])
    ancestors = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    lengths, padding = torch.tensor([4, 3]), torch.tensor([1, 0])

    def seen(window):
        both = depths.expand(2, -1), ancestors.expand(2, -1, -1)
        return seen_slots(*both, lengths, padding, capacity=8, window=window)[:, 0].int().tolist()

    assert seen(None) == [
        [[0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 1, 0]],
        [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0, 1, 0]],
    ]
    assert seen(2) == [
        [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 1, 0]],
        [[0, 0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 1, 0]],
    ]
