"""Create block heads for training: new ones or saved ones."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.errors import OptionError
from speclm.methods.block.checkpoint import build_block, read_block
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads
from speclm.methods.registry import find_heads
from speclm.target import TargetView, output_matrix, stored_matrices


def new_block_heads(
    base: PreTrainedModel,
    *,
    kind: str,
    num_layers: int = 2,
    block_size: int = 8,
    columns: Int[Tensor, " draft_vocab"] | None = None,
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
    return heads


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
