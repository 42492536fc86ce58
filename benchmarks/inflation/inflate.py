"""Widen a small trained model to a large shape without changing what it computes.

A model of random weights has the cost of a large model but accepts nothing, and a small trained
model accepts but costs nothing. An inflated model has both: the tokens and the acceptance of the
small model, and every weight of the large shape is stored, read and multiplied.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.inflation.shapes import InflatedShape, require_llama
from benchmarks.inflation.widening import (
    BOUND,
    EXTRA_LOGIT,
    HeadRows,
    fill_columns,
    fill_norm,
    fill_rows,
    place_heads,
    require_grown,
    require_head_room,
)
from speclm.errors import OptionError
from speclm.methods.block.network import BlockHeads
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.medusa.network import MedusaHeads

_CHANNEL = 100.0  # SiLU returns it unchanged, and bfloat16 holds it exactly


@torch.no_grad()
def inflate_llama(
    model: PreTrainedModel, shape: InflatedShape, *, seed: int = 0
) -> LlamaForCausalLM:
    """Return a larger Llama with the logits of a small one, on its device and in its dtype.

    The residual stream is padded with zeros. Extra heads, MLP units and layers have random
    weights, and zeros where they would write into the stream. Extra tokens get a logit of about
    `EXTRA_LOGIT`, by a bias on the output layer that Llama checkpoints do not have: the model is
    for measuring, not for saving. In float32 the logits are equal up to rounding; in bfloat16
    the scaled norms round anew, so that outputs are those of the small model only nearly.

    Args:
        model: A Llama.
        shape: What it is widened to; nothing may shrink. `head_dim` grows by whole factors.
        seed: Of the random weights.

    Raises:
        UnsupportedModelError: If the model is no Llama, or its rope cannot be spread.
        OptionError: If the shape is too small for the model.
    """
    source = require_llama(model)
    old = InflatedShape.of(source)
    heads = place_heads(old, shape)
    _require_room(source, old, shape, heads)
    target = _allocate(source, shape)
    generator = torch.Generator(source.device).manual_seed(seed)
    for parameter in target.parameters():
        parameter.uniform_(-BOUND, BOUND, generator=generator)
    width = old.hidden_size
    embedding = target.model.embed_tokens.weight
    embedding[:, width:] = 0
    embedding[: old.vocab_size, :width] = source.model.embed_tokens.weight
    if not shape.is_tied:
        target.lm_head.weight[: old.vocab_size, :width] = source.lm_head.weight
    if target.lm_head.bias is not None:
        target.lm_head.bias[: old.vocab_size] = 0
        target.lm_head.bias[old.vocab_size :] = EXTRA_LOGIT
    fill_norm(target.model.norm, source.model.norm)
    for index, layer in enumerate(target.model.layers):
        here = cast("LlamaDecoderLayer", layer)
        if index < old.num_layers:
            _fill_layer(here, cast("LlamaDecoderLayer", source.model.layers[index]), heads)
        else:
            _silence_layer(here)
    return target


@torch.no_grad()
def inflate_medusa(heads: MedusaHeads, shape: InflatedShape, *, seed: int = 0) -> MedusaHeads:
    """Return heads for an inflated base, with the logits of heads for the small one.

    The final norm of an inflated base gives the hidden state of the small one followed by zeros,
    and the residual layers keep those zeros. Heads with an output matrix of their own write a
    constant into the first extra entry, from which extra tokens get `EXTRA_LOGIT`; with the
    base's output layer, that layer's bias sees to it.

    Args:
        heads: Heads of the small base.
        shape: What the base is inflated to.
        seed: Of the random weights.

    Raises:
        OptionError: If the shape is too small for the heads, or adds tokens to an own output
            matrix without making it wider.
    """
    config = heads.config
    width, num_tokens = config.hidden_size, config.vocab_size
    require_grown("hidden_size", width, shape.hidden_size)
    require_grown("vocab_size", num_tokens, shape.vocab_size)
    needs_channel = config.has_own_lm_head and shape.vocab_size > num_tokens
    if needs_channel and shape.hidden_size == width:
        raise OptionError(
            f"shape adds tokens to heads with an output matrix but keeps hidden_size {width}, "
            "expected a larger one; widen both"
        )
    wide = replace(
        config,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        has_bias=config.has_bias or needs_channel,
    )
    weight = heads.weight
    inflated = MedusaHeads(wide, dtype=weight.dtype, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for parameter in inflated.parameters():
        parameter.uniform_(-BOUND, BOUND, generator=generator)
    inflated.weight[..., width:, :width] = 0
    inflated.weight[..., :width, :width] = weight
    if inflated.bias is not None:
        inflated.bias.zero_()
        if heads.bias is not None:
            inflated.bias[..., :width] = heads.bias
    if inflated.lm_weight is not None:
        assert heads.lm_weight is not None
        inflated.lm_weight[:, :num_tokens, :width] = heads.lm_weight
    if needs_channel:
        assert inflated.bias is not None
        assert inflated.lm_weight is not None
        inflated.bias[0, :, width] = _CHANNEL
        inflated.weight[1:, :, :, width] = 0
        inflated.lm_weight[:, :num_tokens, width] = 0
        inflated.lm_weight[:, num_tokens:, width] = EXTRA_LOGIT / _CHANNEL
    return inflated


def bytes_read(
    module: PreTrainedModel | MedusaHeads | EagleHeads | BlockHeads,
    *,
    base: PreTrainedModel,
    num_heads: int | None = None,
) -> int:
    """Return the bytes of weights that one forward of a base, draft model or heads reads.

    Rows that are looked up, but those of a tied embedding, are left out; a base's output
    layer is counted for heads that use it. Keys and values are not counted. Of EAGLE-3, the map of
    the base's features is read in the first forward of a round alone, and counted.

    Args:
        module: What is counted.
        base: The base, whose output layer heads may use.
        num_heads: Medusa heads that are computed, as many as the tree is deep; None for all.
    """
    if isinstance(module, PreTrainedModel):
        weights = list(module.parameters())  # a shared matrix comes once
        if not module.config.tie_word_embeddings:
            embedding = module.get_input_embeddings().get_parameter("weight")
            weights = [weight for weight in weights if weight is not embedding]
        return _num_bytes(weights)
    if isinstance(module, EagleHeads | BlockHeads):
        looked_up = ("embed_tokens.weight", "markov_head.markov_w1.weight")
        named = module.named_parameters()
        own = _num_bytes(weight for name, weight in named if name not in looked_up)
        has_output = module.lm_head is not None
    else:
        used = module.num_heads if num_heads is None else num_heads
        own = _num_bytes(module.parameters()) // module.num_heads * used
        has_output = module.lm_weight is not None
    if has_output:
        return own
    output = cast("nn.Module", base.get_output_embeddings())  # type: ignore[no-untyped-call]
    return own + _num_bytes(output.parameters())


def _num_bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _fill_layer(new: LlamaDecoderLayer, old: LlamaDecoderLayer, heads: HeadRows) -> None:
    """Write a layer of the small model into one of random weights."""
    to, of = new.self_attn, old.self_attn
    width = of.q_proj.in_features
    to.q_proj.weight[heads.q_unused, :width] = 0
    if to.q_proj.bias is not None:
        to.q_proj.bias[heads.q_unused] = 0
    all_queries = torch.arange(of.q_proj.out_features, device="cpu")
    fill_rows(to.q_proj, of.q_proj, heads.q_rows, all_queries, scale=heads.q_scale)
    fill_rows(to.k_proj, of.k_proj, heads.k_rows, heads.k_sources)
    fill_rows(to.v_proj, of.v_proj, heads.v_rows, heads.k_sources)
    fill_columns(to.o_proj, of.o_proj, heads.o_columns)
    units = torch.arange(old.mlp.gate_proj.out_features, device="cpu")
    fill_rows(new.mlp.gate_proj, old.mlp.gate_proj, units, units)
    fill_rows(new.mlp.up_proj, old.mlp.up_proj, units, units)
    fill_columns(new.mlp.down_proj, old.mlp.down_proj, units)
    fill_norm(new.input_layernorm, old.input_layernorm)
    fill_norm(new.post_attention_layernorm, old.post_attention_layernorm)


def _silence_layer(layer: LlamaDecoderLayer) -> None:
    """Let a layer of random weights add nothing to the stream."""
    for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
        for parameter in output.parameters():
            parameter.zero_()
    layer.input_layernorm.weight.fill_(1)
    layer.post_attention_layernorm.weight.fill_(1)


def _allocate(source: LlamaForCausalLM, shape: InflatedShape) -> LlamaForCausalLM:
    """Return a Llama of the shape whose weights are not written yet."""
    config = copy.deepcopy(source.config)
    config.hidden_size = shape.hidden_size
    config.intermediate_size = shape.intermediate_size
    config.num_hidden_layers = shape.num_layers
    config.num_attention_heads = shape.num_heads
    config.num_key_value_heads = shape.num_kv_heads
    config.head_dim = shape.head_dim
    config.vocab_size = shape.vocab_size
    config.tie_word_embeddings = shape.is_tied
    config.rms_norm_eps = source.config.rms_norm_eps * source.config.hidden_size / shape.hidden_size
    device, dtype = source.device, source.dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        model.to(dtype=dtype)  # type: ignore[call-arg]  # wrapped by Transformers
        has_extra_tokens = shape.vocab_size > source.config.vocab_size
        head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=has_extra_tokens, dtype=dtype)
    if shape.is_tied:
        model.lm_head = nn.Identity()  # to_empty would allocate the shared matrix twice
        model.to_empty(device=device)
        head.weight = model.model.embed_tokens.weight
        if head.bias is not None:
            head.bias = nn.Parameter(torch.empty_like(head.bias, device=device))
    else:
        model.lm_head = head
        model.to_empty(device=device)
    model.lm_head = head
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffers are no weights
    model.generation_config = copy.deepcopy(source.generation_config)
    model.train(mode=False)
    return model


def _require_room(
    source: LlamaForCausalLM, old: InflatedShape, new: InflatedShape, heads: HeadRows
) -> None:
    for name in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"):
        require_grown(name, getattr(old, name), getattr(new, name))
    require_head_room(old, new, heads, rope=dict(source.config.rope_parameters or {}))
    if new.is_tied and not old.is_tied:
        raise OptionError(
            "is_tied is True, the model's embedding and output matrix differ; pass is_tied=False"
        )
