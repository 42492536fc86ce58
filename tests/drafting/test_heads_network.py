from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speclm.drafting.decoder import unscaled_rope
from speclm.drafting.heads_network import HeadsNetwork, copy_tensors
from speclm.errors import OptionError

CPU = torch.device("cpu")


class Network(HeadsNetwork):
    def _add_parts(self):
        self._add_embeddings()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.RMSNorm(6)
        self._add_output()

    def _starts_at_zero(self, name):
        return "fc" in name


def network(**changes) -> Network:
    sizes = {"hidden_size": 6, "vocab_size": 9, "draft_vocab_size": 4, "head_dim": 2}
    rope = {"rope_parameters": unscaled_rope(), "max_position_embeddings": 32}
    own = {"has_draft_vocab": True, "has_own_embeddings": True, "has_own_lm_head": True}
    return Network(SimpleNamespace(**(sizes | rope | own | changes)))


def test_new_network_is_zero_but_for_its_norms_and_columns():
    made = network()
    assert made.norm.weight.tolist() == [1] * 6
    assert made.draft_columns.tolist() == [0, 1, 2, 3]
    assert all(not p.any() for name, p in made.named_parameters() if "norm" not in name)


def test_output_starts_as_the_targets_rows_of_the_draft_vocabulary():
    made, lm_weight = network(), torch.randn(9, 6)
    made.set_draft_columns_(torch.tensor([1, 3, 4, 8]))
    made.init_weights_(lm_weight=lm_weight, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.lm_head.weight, lm_weight[[1, 3, 4, 8]])
    assert made.embed_tokens.weight.any()
    assert not made.fc.weight.any()
    assert made.target_ids(torch.tensor([3, 0])).tolist() == [8, 1]


def test_embeddings_of_the_target_are_looked_up_if_there_are_no_own():
    table = torch.randn(9, 6)
    found = network(has_own_embeddings=False).embed(torch.tensor([2]), embedding=lambda t: table[t])
    assert torch.equal(found, table[[2]])


def test_frequencies_are_not_rounded_with_the_weights():
    made = network().to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert made.rotary.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("columns", [[0, 1, 2], [0, 2, 1, 3], [0, 1, 2, 9], [-1, 0, 1, 2]])
def test_columns_that_are_no_draft_vocabulary_are_refused(columns):
    with pytest.raises(OptionError, match="columns"):
        network().set_draft_columns_(torch.tensor(columns))


def test_copies_keep_the_dtype_of_integers_only():
    tensors = {"weight": torch.ones(2), "draft_columns": torch.arange(2)}
    found = copy_tensors(tensors, dtype=torch.bfloat16, device=CPU)
    assert found["weight"].dtype == torch.bfloat16
    assert found["draft_columns"].dtype == torch.int64
    found["draft_columns"].zero_()
    assert tensors["draft_columns"].tolist() == [0, 1]


def test_logits_are_spread_over_the_targets_tokens():
    made = network()
    made.set_draft_columns_(torch.tensor([1, 3, 5, 8]))
    found = made.spread(torch.ones(1, 1, 4)).softmax(-1)[0, 0]
    assert found.nonzero()[:, 0].tolist() == [1, 3, 5, 8]


SCALED = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [unscaled_rope(), SCALED])
def test_rotations_cut_from_a_table_are_those_of_the_positions(rope):
    made = network(rope_parameters=rope, head_dim=4)
    for start, num in ((5, 3), (900, 200), (2000, 1), (7, 2000), (0, 4)):
        expected = made.rotation(torch.arange(start, start + num)[None])
        for part, wanted in zip(made.rotation_from(start, num), expected, strict=True):
            assert torch.equal(part.expand_as(wanted), wanted)
    assert made.to(torch.bfloat16).rotation_from(1, 2)[0].dtype == torch.bfloat16


def test_columns_are_on_the_host_in_either_form_of_the_weights():
    made = network()
    made.set_draft_columns_(torch.tensor([1, 3, 4, 8]))
    assert made.host_columns == made.eval().fuse_().host_columns == [1, 3, 4, 8]
    assert network(has_draft_vocab=False).host_columns is None
