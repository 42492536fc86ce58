"""Logits from hidden states, and the sizes, matrices and devices of models of any kind."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedModel

from speclm.errors import UnsupportedModelError
from speclm.target import TargetView
from speclm.target.logits import (
    device_of,
    embedding_map,
    embedding_matrix,
    find_decoder,
    head_shape,
    logits_from,
    logits_map,
    output_matrix,
    product_weight,
    stored_matrices,
)
from tests.families import FAMILIES, ONCE, build_type, shared_family
from tests.models import VOCAB_SIZE, build_model, prompts, shared_model

TOLERANCE = 1e-4  # of logits whose spread is about 3, in float32
HIDDEN = 40


@torch.no_grad()
def require_own_logits(model: PreTrainedModel) -> None:
    """Compare with the model's logits those from what its decoder returned."""
    read: list[torch.Tensor] = []
    hook = find_decoder(model).register_forward_hook(lambda *seen: read.append(seen[2][0]))
    expected = model(input_ids=prompts(5)["input_ids"]).logits
    hook.remove()
    assert torch.allclose(logits_from(model, read[0]), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES, scope=ONCE)
def test_logits_from_the_decoders_output_are_the_models(name):
    require_own_logits(shared_family(name))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES, scope=ONCE)
def test_where_a_head_only_multiplies_the_product_has_its_logits(name):
    model = shared_family(name)
    weight = product_weight(model)
    if weight is not None:
        hidden = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        product = hidden.to(weight.dtype) @ weight.T
        assert torch.allclose(product, logits_from(model, hidden), atol=TOLERANCE)


def test_heads_that_do_more_than_multiply_have_no_product():
    assert product_weight(build_type("llama", {})) is not None
    assert product_weight(build_type("gemma2", {})) is None  # it caps its logits
    watched, replaced, biased, wrapped = (build_model("llama") for _ in range(4))
    watched.lm_head.register_forward_hook(lambda *_: None)
    replaced.lm_head.forward = lambda hidden: hidden
    biased.lm_head.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    assert [product_weight(model) for model in (watched, replaced, biased, wrapped)] == [None] * 4


def test_decoder_is_found_where_the_head_has_its_name():
    model = build_type("modernbert-decoder", {"bos_token_id": 1, "eos_token_id": 2})
    assert model.get_decoder() is model.get_output_embeddings()
    assert find_decoder(model) is model.model


def test_model_that_is_one_with_its_head_is_refused(monkeypatch):
    model = shared_model("llama")
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    monkeypatch.setattr(type(model), "children", lambda self: iter(()))
    with pytest.raises(UnsupportedModelError, match=r"no decoder next to its head.* n-grams"):
        find_decoder(model)
    with TargetView(model).decoding():
        pass  # it generates all the same, where nobody asks for hidden states


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


def test_device_of_an_offloaded_model_is_where_its_modules_run():
    model = cpu_offload(build_model("llama"))
    assert model._hf_hook.execution_device is None
    assert model.device == torch.device("meta")
    assert device_of(model) == torch.device("cpu")
    add_hook_to_module(model.model.embed_tokens, ModelHook(), append=True)  # now two in a row
    assert device_of(model) == torch.device("cpu")


def test_device_of_weights_that_are_nowhere_is_meta():
    with torch.device("meta"):
        model = build_model("llama")
    assert device_of(model) == torch.device("meta")


@torch.no_grad()
@pytest.mark.parametrize("family", ["arcee", "granite"])  # the latter's logits are scaled
def test_maps_that_are_made_once_compute_the_same(family):
    model = shared_family(family)
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_map(model)(hidden), logits_from(model, hidden))
    tokens = torch.tensor([[3, 9]])
    assert torch.equal(embedding_map(model)(tokens), model.get_input_embeddings().weight[tokens])
