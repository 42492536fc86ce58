"""Random block heads for tiny targets, and what they say along one path."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads, block_masks
from tests.models import VOCAB_SIZE

LAYERS = (1, 2)

HEADS: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "dspark", "has_confidence": True},
    "rnn": {"kind": "dspark", "markov": "rnn", "draft_vocab_size": 40},
    "gated in place": {
        "kind": "dspark",
        "markov": "gated",
        "predicts_next": False,
        "is_causal": (True, False),
        "windows": (6, None),
    },
    "both ways": {"kind": "dflash", "num_layers": 1},
    "window": {"kind": "jetspec", "windows": (6, 9), "draft_vocab_size": 40},
}
"""Heads that differ in what a node depends on, and in what a position sees."""


def heads_for(
    model: PreTrainedModel, kind: str, *, layers: tuple[int, ...] = LAYERS, **changes: Any
) -> BlockHeads:
    """Return heads that nobody trained, whose distributions are peaked and varied."""
    settings = {"block_size": 5, **HEADS[kind], **changes}
    heads = BlockHeads(
        BlockConfig.from_model_config(model.config, feature_layers=layers, **settings)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            scale = 1.0 if "markov" in name else 0.2
            drawn = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + drawn if "norm" in name else drawn)
        if heads.draft_columns is not None:
            step = VOCAB_SIZE // heads.config.draft_vocab_size
            heads.set_draft_columns_(torch.arange(0, VOCAB_SIZE, step))
    return heads.eval()


@torch.no_grad()
def states_at(model: PreTrainedModel, heads: BlockHeads, text: Tensor) -> Tensor:
    """Return the heads' states ``[anchors, drafts, hidden]``, all from one pass as in training.

    Args:
        model: The target.
        heads: Heads for it.
        text: Committed tokens; every one of them is an anchor.
    """
    states = model(input_ids=text[None], output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in heads.config.feature_layers], dim=-1)
    positions, size = torch.arange(len(text)), heads.config.block_size
    keys, values = heads.context(features, heads.rotation(positions[None]))
    masks = block_masks(
        heads.config,
        (positions < positions[:, None])[None],
        context_positions=positions[None],
        anchors=positions[None],
        num_positions=size,
    )
    embeds = heads.embed_blocks(
        text[None], num_positions=size, embedding=model.get_input_embeddings()
    )
    blocks = (positions[:, None] + torch.arange(size)).flatten()[None]
    hidden = heads(embeds, heads.rotation(blocks), keys, values, masks, num_blocks=len(text))
    return hidden[0].unflatten(0, (len(text), -1))


@torch.no_grad()
def logits_along(
    model: PreTrainedModel, heads: BlockHeads, states: Tensor, root: int, path: list[int]
) -> Tensor:
    """Return the logits after a path, token by token.

    Args:
        model: The target.
        heads: Heads for it.
        states: Their states at an anchor, ``[drafts, hidden]``.
        root: Token of the anchor.
        path: The target's ids below it.
    """
    logits = heads.logits(states, lm_head=model.get_output_embeddings())[len(path)]
    state = None
    if heads.markov_head is not None:
        for hidden, token in zip(states, [root, *path], strict=False):
            code, state = heads.markov_head.code(torch.tensor([token]), hidden[None], state)
        logits = logits + heads.markov_head.markov_w2(code)[0]
    return logits
