"""Create block heads for training: new ones or saved ones."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.errors import OptionError
from speclm.methods.block.checkpoint import build_block, read_block
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.layer import BlockLayer
from speclm.methods.block.network import BlockHeads
from speclm.methods.finding import find_heads
from speclm.target import TargetView, output_matrix, stored_matrices

_log = logging.getLogger("speclm")

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MAPS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def new_block_heads(
    base: PreTrainedModel,
    *,
    kind: str,
    num_layers: int = 2,
    block_size: int = 8,
    columns: Int[Tensor, " draft_vocab"] | None = None,
    copies_layers: bool = True,
    seed: int = 0,
    **changes: Any,
) -> BlockHeads:
    """Return untrained heads for a base, in float32 and on its device.

    The heads use the base's embeddings and output matrix; with a draft vocabulary they have a copy
    of its rows.

    Args:
        base: The target; it decides all sizes.
        kind: ``"dspark"``, ``"dflash"`` or ``"jetspec"``.
        num_layers: Decoder layers of the heads.
        block_size: Positions of one pass.
        columns: Draft vocabulary: token ids of the target, increasing, see `choose_columns`; None
            for all.
        copies_layers: Whether layers start with the weights of layers of the base, where those have
            the same parts, see `copy_layers_`; otherwise all weights are random.
        seed: Seed of the random weights.
        **changes: Fields of `BlockConfig` that differ from the usual ones of the kind.

    Raises:
        OptionError: If the base has too few layers for the usual hidden states, or a value is out
            of range.
        UnsupportedModelError: If the base's output matrix has to be copied and is quantised or
            offloaded.
    """
    config = BlockConfig.from_model_config(
        base.config,
        kind=kind,
        num_layers=num_layers,
        block_size=block_size,
        draft_vocab_size=None if columns is None else len(columns),
        **changes,
    )
    view = TargetView(base)
    heads = BlockHeads(config, dtype=torch.float32, device=view.device)
    if columns is not None and config.has_draft_vocab:
        heads.set_draft_columns_(columns.to(view.device))
    generator = torch.Generator().manual_seed(seed)
    lm_weight = None if heads.lm_head is None else output_matrix(base)
    heads.init_weights_(lm_weight=lm_weight, generator=generator)
    if copies_layers and not copy_layers_(heads, base):
        _log.info("block heads start at random: layers of %s have other parts", view.name)
    return heads


@torch.no_grad()
def copy_layers_(heads: BlockHeads, base: PreTrainedModel) -> bool:
    """Start layers of heads as consecutive layers of the base, which takes fewer steps to train.

    The first of them is one whose input is among the features, and as deep as the base has layers
    enough after it. The context then gives the keys and values that this layer has in the base.

    Args:
        heads: New heads.
        base: The target.

    Returns:
        False if the base's layers have other parts or sizes; the heads are then unchanged.
    """
    view = TargetView(base)
    last = view.num_layers - heads.config.num_layers - 1
    inputs = [index for index in heads.config.feature_layers if index <= last]
    decoder: Any = cast("Any", base).get_decoder()
    layers: Any = getattr(decoder, "layers", None)
    if not inputs or layers is None or not _is_rms_norm(getattr(decoder, "norm", None)):
        return False
    first = max(inputs)
    pairs = [
        (mine, layers[first + place])
        for place, mine in enumerate(cast("Iterable[BlockLayer]", heads.layers))
    ]
    if not all(_has_same_parts(mine, theirs) for mine, theirs in pairs):
        return False
    before = layers[first].input_layernorm.weight
    for mine, theirs in pairs:
        for name in _NORMS:
            getattr(mine, name).weight.copy_(getattr(theirs, name).weight)
        for module, names in _MAPS.items():
            for name in names:
                _copy(getattr(getattr(theirs, module), name), getattr(getattr(mine, module), name))
        for part in ("q", "k"):
            norm: Any = getattr(mine.self_attn, f"{part}_norm")
            own = getattr(theirs.self_attn, f"{part}_norm", None)
            if own is None:  # the size that the states have on average where they are not normed
                weight = getattr(theirs.self_attn, f"{part}_proj").weight.float()
                scale = theirs.input_layernorm.weight.float()
                norm.weight.fill_((weight * scale).square().sum(1).mean().sqrt())
            else:
                norm.weight.copy_(own.weight)
    heads.hidden_norm.weight.copy_(before)
    heads.norm.weight.copy_(decoder.norm.weight)
    place = heads.config.feature_layers.index(first)
    heads.fc.weight.mul_(0.1)
    hidden = heads.config.hidden_size
    heads.fc.weight[:, place * hidden : (place + 1) * hidden].fill_diagonal_(1.0)
    return True


def _copy(theirs: Any, mine: Any) -> None:
    mine.weight.copy_(theirs.weight)
    if mine.bias is not None:
        mine.bias.zero_() if theirs.bias is None else mine.bias.copy_(theirs.bias)


def _is_rms_norm(norm: Any) -> bool:
    """Return whether a module divides by the root mean square and multiplies by its weight."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return False
    states = torch.linspace(-1, 2, len(weight), device=weight.device, dtype=weight.dtype)[None]
    expected = torch.rms_norm(states.float(), states.shape[1:], weight.float(), eps=1e-6)
    return torch.allclose(norm(states).float(), expected, rtol=0.02, atol=0.02)


def _has_same_parts(mine: BlockLayer, theirs: Any) -> bool:
    """Return whether a layer of the base has the parts of a layer of heads, in the same sizes."""
    if not all(_is_rms_norm(getattr(theirs, name, None)) for name in _NORMS):
        return False
    for module, names in _MAPS.items():
        for name in names:
            part = getattr(getattr(theirs, module, None), name, None)
            wanted = getattr(getattr(mine, module), name).weight
            if not isinstance(part, nn.Linear) or part.weight.shape != wanted.shape:
                return False
            if not part.weight.is_floating_point() or part.weight.is_meta:
                return False
    own = [getattr(theirs.self_attn, name, None) for name in ("q_norm", "k_norm")]
    head_dim = mine.self_attn.head_dim
    return all(
        norm is None or (_is_rms_norm(norm) and norm.weight.shape == (head_dim,)) for norm in own
    )


def load_block_heads(
    base: PreTrainedModel, heads: str | Path, *, revision: str | None = None
) -> BlockHeads:
    """Load saved heads for further training, in float32 and on the base's device.

    They keep their sizes, their block and their draft vocabulary. Matrices that are copies of the
    base's are dropped.

    Args:
        base: The target.
        heads: Folder or hub id.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        OptionError: If they are not block heads.
        CheckpointError: If they are damaged or incomplete.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    source = find_heads(heads, options)
    if source.method.name != "block" or source.folder is None:
        raise OptionError(
            f"heads {str(heads)!r} are those of the method {source.method.name!r}, expected block "
            "heads; name a folder or hub id of such"
        )
    view = TargetView(base)
    checkpoint = read_block(source.folder, num_target_layers=view.num_layers)
    checkpoint = checkpoint.share(**stored_matrices(base))
    return build_block(checkpoint, dtype=torch.float32, device=view.device)
