"""Create EAGLE heads for training: new ones or saved ones."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.errors import OptionError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.finding import find_heads
from speclm.target import TargetView, output_matrix


def new_eagle_heads(
    base: PreTrainedModel,
    *,
    kind: str,
    columns: Int[Tensor, " draft_vocab"] | None = None,
    feature_layers: tuple[int, ...] | None = None,
    num_layers: int = 1,
    seed: int = 0,
) -> EagleHeads:
    """Return untrained heads for a base, in float32 and on its device.

    The heads use the base's embeddings. The output matrix of EAGLE-3 starts as the rows of the
    base's output matrix that belong to the draft vocabulary.

    Args:
        base: The target; it decides all sizes.
        kind: ``"eagle"`` (EAGLE-1 and 2) or ``"eagle3"``.
        columns: Draft vocabulary: token ids of the target, increasing, see `choose_columns`; None
            for all.
        feature_layers: Hidden states that EAGLE-3 reads; None for the usual ones.
        num_layers: Decoder layers of the heads.
        seed: Seed of the random weights.

    Raises:
        OptionError: If the base has too few layers for the usual hidden states, or a value is out
            of range.
        UnsupportedModelError: If the base's output matrix has to be copied and is quantised or
            offloaded.
    """
    config = EagleConfig.from_model_config(
        base.config,
        kind=kind,
        draft_vocab_size=None if columns is None else len(columns),
        feature_layers=feature_layers,
        num_layers=num_layers,
    )
    view = TargetView(base)
    heads = EagleHeads(config, dtype=torch.float32, device=view.device)
    if columns is not None and config.has_draft_vocab:
        heads.set_draft_columns_(columns.to(view.device))
    generator = torch.Generator().manual_seed(seed)
    lm_weight = None if heads.lm_head is None else output_matrix(base)
    heads.init_weights_(lm_weight=lm_weight, generator=generator)
    return heads


def load_eagle_heads(
    base: PreTrainedModel, heads: str | Path, *, revision: str | None = None
) -> EagleHeads:
    """Load saved heads for further training, in float32 and on the base's device.

    They keep their sizes and their draft vocabulary. Matrices that are copies of the base's are
    dropped.

    Args:
        base: The target.
        heads: Folder or hub id.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        OptionError: If they are not EAGLE heads, or have another width than the base.
        VocabularyMismatchError: If they were made for another vocabulary.
        CheckpointError: If they are damaged or incomplete.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if revision is not None:
        options["revision"] = revision
    source = find_heads(heads, options)
    proposer = source.method.load(source, base)
    if not isinstance(proposer, EagleProposer):
        raise OptionError(
            f"heads {str(heads)!r} are those of a {type(proposer).__name__}, expected EAGLE heads; "
            "name a folder or hub id of such"
        )
    return proposer.heads.requires_grad_(requires_grad=True)
