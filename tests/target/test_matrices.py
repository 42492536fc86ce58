"""Sizes and matrices of heads and embeddings, of whatever kind they are."""

import pytest
import torch
from torch import nn

from speclm.errors import UnsupportedModelError
from speclm.target.matrices import embedding_matrix, head_shape, output_matrix, stored_matrices
from tests.models import VOCAB_SIZE, build_model, shared_model

HIDDEN = 40


class Coded(nn.Module):
    """A head of codes, as quantisation makes it."""

    def __init__(self, linear, **sizes):
        super().__init__()
        self.register_buffer("qweight", (20 * linear.weight).round().to(torch.int8))
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, states):
        return nn.functional.linear(states, self.qweight.to(states.dtype) / 20)


class CodedWithMethod(Coded):
    def weight(self):
        return self.qweight


@pytest.mark.parametrize("kind", [Coded, CodedWithMethod])
@pytest.mark.parametrize("sizes", [{}, {"out_features": VOCAB_SIZE, "in_features": HIDDEN}])
def test_shape_of_a_head_without_a_matrix_is_what_it_or_the_config_says(kind, sizes):
    model = build_model("llama")
    model.lm_head = kind(model.lm_head, **sizes)
    assert head_shape(model) == (VOCAB_SIZE, HIDDEN)
    assert stored_matrices(model)["lm_weight"] is None
    with pytest.raises(UnsupportedModelError, match=rf"output embeddings .* {kind.__name__}, quan"):
        output_matrix(model)


def test_shape_of_a_head_is_that_of_its_matrix():
    model = build_model("llama")
    model.config.vocab_size = 1
    assert head_shape(model) == (VOCAB_SIZE, HIDDEN)


def test_shape_of_a_head_in_a_wrapper_without_sizes_is_the_configs():
    model = build_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    assert head_shape(model) == (VOCAB_SIZE, HIDDEN)


def test_matrices_are_those_of_the_model():
    model = shared_model("llama")
    found = stored_matrices(model)
    assert found["embeddings"] is embedding_matrix(model) is model.model.embed_tokens.weight
    assert found["lm_weight"] is output_matrix(model) is model.lm_head.weight


def test_matrices_that_are_elsewhere_are_refused():
    with torch.device("meta"):
        model = build_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"embeddings .* Embedding, offloaded.*own"):
        embedding_matrix(model)
