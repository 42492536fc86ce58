"""Widen block heads together with their base, without changing what they draft."""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from benchmarks.inflation.shapes import InflatedShape
from benchmarks.inflation.widening import (
    BOUND,
    HeadRows,
    fill_columns,
    fill_embeddings,
    fill_norm,
    fill_output,
    fill_rows,
    place_heads,
    prepare_output_,
    require_grown,
    require_head_room,
    share_of,
    widen_shape,
)
from speclm.errors import OptionError
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.layer import BlockAttention, BlockLayer
from speclm.methods.block.network import BlockHeads


@torch.no_grad()
def inflate_block(
    heads: BlockHeads, shape: InflatedShape, *, base: InflatedShape, seed: int = 0
) -> BlockHeads:
    """Return heads for an inflated base, with the logits of heads for the small one.

    Streams are padded with zeros, and what is added has random weights, or zeros where it would
    write into a stream or a norm. Attention, MLP and draft vocabulary keep the share of the base's
    that they have now; the ranks of small heads stay. Tokens that the draft vocabulary gains are
    tokens that the base gains, and get `EXTRA_LOGIT` by a bias on the output matrix, which
    checkpoints do not have: the heads are for measuring, not for saving.

    Args:
        heads: Heads of the small base.
        shape: What the base is inflated to.
        base: Shape of the small base.
        seed: Of the random weights.

    Raises:
        OptionError: If the shape is too small, or the heads have another width than the base.
        UnsupportedModelError: If attention heads widen and the rotation depends on their width.
    """
    config = heads.config
    if (config.hidden_size, config.vocab_size) != (base.hidden_size, base.vocab_size):
        raise OptionError(
            f"heads are {config.hidden_size} wide for {config.vocab_size} tokens, expected "
            f"{base.hidden_size} and {base.vocab_size} as the base has; pass the shape of their "
            "base"
        )
    for name in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"):
        require_grown(name, getattr(base, name), getattr(shape, name))
    old = InflatedShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        is_tied=False,
    )
    new = widen_shape(old, shape, base=base)
    rows = place_heads(old, new)
    require_head_room(old, new, rows, rope=config.rope_parameters)
    weight = heads.fc.weight
    inflated = BlockHeads(
        _wide_config(config, new, shape=shape, base=base), dtype=weight.dtype, device=weight.device
    )
    prepare_output_(inflated, heads)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for parameter in inflated.parameters():
        parameter.uniform_(-BOUND, BOUND, generator=generator)
    _fill_inputs(inflated, heads)
    for to, of in zip(inflated.layers, heads.layers, strict=True):
        _fill_layer(cast("BlockLayer", to), cast("BlockLayer", of), rows)
    _fill_outputs(inflated, heads)
    return inflated.train(heads.training)


def _wide_config(
    config: BlockConfig, new: InflatedShape, *, shape: InflatedShape, base: InflatedShape
) -> BlockConfig:
    # Layers that a base gains come after its own; its last state is read after its norm.
    layers = (shape.num_layers if i == base.num_layers else i for i in config.feature_layers)
    return replace(
        config,
        hidden_size=new.hidden_size,
        intermediate_size=new.intermediate_size,
        num_heads=new.num_heads,
        num_kv_heads=new.num_kv_heads,
        head_dim=new.head_dim,
        vocab_size=new.vocab_size,
        draft_vocab_size=share_of(config.draft_vocab_size, config.vocab_size, new.vocab_size),
        feature_layers=tuple(layers),
        rms_norm_eps=config.rms_norm_eps * config.hidden_size / new.hidden_size,
    )


def _fill_inputs(new: BlockHeads, old: BlockHeads) -> None:
    width, wide = old.config.hidden_size, new.config.hidden_size
    starts = torch.arange(len(old.config.feature_layers), device="cpu")[:, None] * wide
    rows = torch.arange(width, device="cpu")
    new.fc.weight[width:] = 0
    fill_rows(new.fc, old.fc, rows, rows, columns=(starts + rows).flatten())
    fill_norm(new.hidden_norm, old.hidden_norm)
    fill_embeddings(new, old)


def _fill_layer(new: BlockLayer, old: BlockLayer, heads: HeadRows) -> None:
    _fill_attention(new.self_attn, old.self_attn, heads)
    units = torch.arange(old.mlp.gate_proj.out_features, device="cpu")
    fill_rows(new.mlp.gate_proj, old.mlp.gate_proj, units, units)
    fill_rows(new.mlp.up_proj, old.mlp.up_proj, units, units)
    fill_columns(new.mlp.down_proj, old.mlp.down_proj, units)
    fill_norm(new.input_layernorm, old.input_layernorm)
    fill_norm(new.post_attention_layernorm, old.post_attention_layernorm)


def _fill_attention(new: BlockAttention, old: BlockAttention, heads: HeadRows) -> None:
    dim, wide = old.head_dim, new.head_dim
    # Unused entries of queries and keys would count in their norms.
    entries = torch.arange(wide, device="cpu")
    of_keys = ((heads.k_rows // wide).unique()[:, None] * wide + entries).flatten()
    k_unused = of_keys[~torch.isin(of_keys, heads.k_rows)]
    for part, unused in ((new.q_proj, heads.q_unused), (new.k_proj, k_unused)):
        part.weight[unused] = 0
        if part.bias is not None:
            part.bias[unused] = 0
    # Of the norm's sum that is added to the mean square, queries and keys need the same share.
    scale = math.sqrt(old.q_proj.in_features / new.q_proj.in_features * wide / dim)
    queries = torch.arange(old.q_proj.out_features, device="cpu")
    fill_rows(new.q_proj, old.q_proj, heads.q_rows, queries, scale=scale)
    fill_rows(new.k_proj, old.k_proj, heads.k_rows, heads.k_sources, scale=scale)
    fill_rows(new.v_proj, old.v_proj, heads.v_rows, heads.k_sources)
    fill_columns(new.o_proj, old.o_proj, heads.o_columns)
    rope = heads.k_rows[:dim]  # the first head's
    fill_norm(new.q_norm, old.q_norm, columns=rope)
    fill_norm(new.k_norm, old.k_norm, columns=rope)
    new.q_norm.weight[rope] *= heads.q_scale


def _fill_outputs(new: BlockHeads, old: BlockHeads) -> None:
    fill_norm(new.norm, old.norm)
    width, wide, rank = old.config.hidden_size, new.config.hidden_size, old.config.markov_rank
    fill_output(new, old)
    states, code = torch.arange(width, device="cpu"), torch.arange(2 * rank, device="cpu")
    after = torch.cat([states, wide + code[:rank]])  # a state, then an embedding
    if new.markov_head is not None and old.markov_head is not None:
        for name, matrix in old.markov_head.named_parameters():
            to = new.markov_head.get_parameter(name)
            if name == "gate_proj.weight":
                to[:, after] = matrix
            elif name == "joint_proj.weight":
                to[:, torch.cat([code, 2 * rank + states])] = matrix
            else:  # tokens that are added get no term
                to.zero_()
                to[: len(matrix)] = matrix
    if new.confidence_head is not None and old.confidence_head is not None:
        new.confidence_head.proj.weight[:, after] = old.confidence_head.proj.weight
        new.confidence_head.proj.bias.copy_(cast("Tensor", old.confidence_head.proj.bias))
