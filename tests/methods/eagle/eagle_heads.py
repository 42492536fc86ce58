"""Random EAGLE heads for tiny targets, and what they say along one path."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from tests.models import VOCAB_SIZE


def heads_for(
    model: PreTrainedModel,
    kind: str,
    *,
    layers: tuple[int, ...],
    draft_vocab_size: int | None = None,
    sliding_window: int | None = None,
) -> EagleHeads:
    """Return heads that nobody trained, whose distributions are peaked and varied."""
    config = EagleConfig.from_model_config(
        model.config,
        kind=kind,
        draft_vocab_size=draft_vocab_size,
        feature_layers=layers if kind == "eagle3" else None,
    )
    heads = EagleHeads(replace(config, sliding_window=sliding_window))
    heads.init_weights_(generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in heads.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        if heads.draft_columns is not None:
            heads.set_draft_columns_(torch.arange(0, VOCAB_SIZE, VOCAB_SIZE // draft_vocab_size))
    return heads.eval()


@torch.no_grad()
def logits_along(
    model: PreTrainedModel, heads: EagleHeads, text: Tensor, path: list[int]
) -> Tensor:
    """Return what the heads say after a text and guesses, fed one at a time.

    Args:
        model: The target.
        heads: Heads for it.
        text: Committed tokens, the root last.
        path: The target's ids of guesses below the root.
    """
    states = model(input_ids=text[None], output_hidden_states=True).hidden_states
    is_last = heads.config.kind == "eagle"
    layers = (-1,) if is_last else heads.config.layers_to_read(model.config.num_hidden_layers)
    features = torch.cat([states[layer] for layer in layers], dim=-1)[:, :-1]
    embed = model.get_input_embeddings()
    slots, cache = len(text) - 1, DynamicCache()
    hidden = heads(
        heads.fuse(features),
        embed(text[None, 1:]),
        position_ids=torch.arange(slots)[None],
        past_key_values=cache,
    )[:, -1:]
    for step, token in enumerate(path):
        hidden = heads(
            hidden,
            embed(torch.tensor([[token]])),
            position_ids=torch.tensor([[slots + step]]),
            past_key_values=cache,
        )
    lm_head = heads.among_drafted(model.get_output_embeddings())
    return heads.logits(hidden, lm_head=lm_head)[0, 0]
