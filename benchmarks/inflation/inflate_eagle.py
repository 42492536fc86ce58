"""Widen EAGLE heads together with their base, without changing what they draft."""

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
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.layer import EagleLayer
from speclm.methods.eagle.network import EagleHeads


@torch.no_grad()
def inflate_eagle(
    heads: EagleHeads, shape: InflatedShape, *, base: InflatedShape, seed: int = 0
) -> EagleHeads:
    """Return heads for an inflated base, with the logits of heads for the small one.

    Streams are padded with zeros, and what is added has random weights, or zeros where it would
    write into a stream. Attention, MLP and draft vocabulary keep the share of the base's that they
    have now. Tokens that the draft vocabulary gains are tokens that the base gains, and get
    `EXTRA_LOGIT` by a bias on the output matrix, which checkpoints do not have: the heads are for
    measuring, not for saving. The hidden states that are read are those that the small base has
    at the same depth: layers that a base gains come after its own.

    Args:
        heads: Heads of the small base.
        shape: What the base is inflated to.
        base: Shape of the small base.
        seed: Of the random weights.

    Raises:
        OptionError: If the shape is too small, or the heads have another width than the base or
            norm their queries.
        UnsupportedModelError: If attention heads widen and the rotation depends on their width.
    """
    config = heads.config
    _require_widenable(config, shape, base)
    old = InflatedShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        is_tied=False,
    )
    new = widen_shape(old, shape, base=base)
    rows = place_heads(old, new)
    require_head_room(old, new, rows, rope=config.rope_parameters)
    weight = heads.fc.weight
    inflated = EagleHeads(_wide_config(config, new, base), dtype=weight.dtype, device=weight.device)
    prepare_output_(inflated, heads)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for parameter in inflated.parameters():
        parameter.uniform_(-BOUND, BOUND, generator=generator)
    _fill_inputs(inflated, heads)
    for to, of in zip(inflated.layers, heads.layers, strict=True):
        _fill_layer(cast("EagleLayer", to), cast("EagleLayer", of), rows, heads.config)
    _fill_outputs(inflated, heads)
    return inflated.train(heads.training)


def _require_widenable(config: EagleConfig, shape: InflatedShape, base: InflatedShape) -> None:
    widths = {config.hidden_size, config.target_hidden_size}
    if widths != {base.hidden_size} or config.vocab_size != base.vocab_size:
        raise OptionError(
            f"heads are {config.hidden_size} wide and read {config.target_hidden_size} values of "
            f"{config.vocab_size} tokens, expected {base.hidden_size}, {base.hidden_size} and "
            f"{base.vocab_size} as the base has; pass the shape of their base"
        )
    if config.has_qk_norm:
        raise OptionError(
            "has_qk_norm is on, expected off: norms of queries and keys depend on head_dim; choose "
            "other heads"
        )
    for name in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"):
        require_grown(name, getattr(base, name), getattr(shape, name))


def _wide_config(config: EagleConfig, new: InflatedShape, base: InflatedShape) -> EagleConfig:
    draft_vocab_size = share_of(config.draft_vocab_size, config.vocab_size, new.vocab_size)
    is_eagle3 = config.kind == "eagle3"
    return replace(
        config,
        hidden_size=new.hidden_size,
        target_hidden_size=new.hidden_size,
        intermediate_size=new.intermediate_size,
        num_attention_heads=new.num_heads,
        num_key_value_heads=new.num_kv_heads,
        head_dim=new.head_dim,
        vocab_size=new.vocab_size,
        draft_vocab_size=draft_vocab_size,
        feature_layers=config.layers_to_read(base.num_layers) if is_eagle3 else None,
        rms_norm_eps=config.rms_norm_eps * config.hidden_size / new.hidden_size,
    )


def _fill_inputs(new: EagleHeads, old: EagleHeads) -> None:
    """Write what joins the inputs, each of which is followed by zeros."""
    width, wide = old.config.hidden_size, new.config.hidden_size
    columns = _blocks(old.fc.in_features // width, width, wide)
    rows = torch.arange(width, device="cpu")
    new.fc.weight[width:] = 0
    if new.fc.bias is not None:
        new.fc.bias.zero_()
    fill_rows(new.fc, old.fc, rows, rows, columns=columns)
    for to, of in zip(new.feature_norms, old.feature_norms, strict=True):
        fill_norm(to, of)
    if new.feature_norm is not None and old.feature_norm is not None:
        fill_norm(new.feature_norm, old.feature_norm, columns=columns)
    fill_embeddings(new, old)


def _fill_layer(new: EagleLayer, old: EagleLayer, heads: HeadRows, config: EagleConfig) -> None:
    to, of = new.self_attn, old.self_attn
    width, wide = config.hidden_size, new.mlp.gate_proj.in_features
    columns = _blocks(of.q_proj.in_features // width, width, wide)
    to.q_proj.weight[heads.q_unused[:, None], columns] = 0
    if to.q_proj.bias is not None:
        to.q_proj.bias[heads.q_unused] = 0
    queries = torch.arange(of.q_proj.out_features, device="cpu")
    fill_rows(to.q_proj, of.q_proj, heads.q_rows, queries, scale=heads.q_scale, columns=columns)
    fill_rows(to.k_proj, of.k_proj, heads.k_rows, heads.k_sources, columns=columns)
    fill_rows(to.v_proj, of.v_proj, heads.v_rows, heads.k_sources, columns=columns)
    fill_columns(to.o_proj, of.o_proj, heads.o_columns)
    units = torch.arange(old.mlp.gate_proj.out_features, device="cpu")
    fill_rows(new.mlp.gate_proj, old.mlp.gate_proj, units, units)
    fill_rows(new.mlp.up_proj, old.mlp.up_proj, units, units)
    fill_columns(new.mlp.down_proj, old.mlp.down_proj, units)
    for name, norm in old.named_children():
        if name.endswith("norm"):
            fill_norm(new.get_submodule(name), norm)


def _fill_outputs(new: EagleHeads, old: EagleHeads) -> None:
    if new.norm is not None and old.norm is not None:
        fill_norm(new.norm, old.norm)
    fill_output(new, old)


def _blocks(count: int, width: int, wide: int) -> Tensor:
    """Return where several streams lie side by side once each is padded."""
    starts = torch.arange(count, device="cpu")[:, None] * wide
    return (starts + torch.arange(width, device="cpu")).flatten()
