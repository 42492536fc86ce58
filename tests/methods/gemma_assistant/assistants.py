"""Tiny random bases of Gemma 4 and assistants that fit them."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from speclm.methods.gemma_assistant.checkpoint import shared_everywhere
from tests.models import SHAPE, VOCAB_SIZE, WINDOW, randomise

SLIDING, FULL = "sliding_attention", "full_attention"
NUM_TOKENS = 3
"""Draft tokens by the generation config of the assistants."""

ATTENTION_SCALE = 0.02
"""Of what earlier tokens change in a planted base; without any, the self-check sees nothing."""

TEXT: dict[str, Any] = {
    **SHAPE,
    "head_dim": 12,
    "global_head_dim": 20,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,  # the last layers read what the first ones have cached
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
ALONE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}


def build_base(seed: int = 0, **settings: object) -> PreTrainedModel:
    """Return a base whose layers share keys and values."""
    config = Gemma4TextConfig(**{**TEXT, **settings})
    return randomise(Gemma4ForCausalLM(config), seed=seed, embedding_scale=0.2)


def build_assistant(
    *, has_clusters: bool = False, seed: int = 1, width: int = 40, **settings: object
) -> PreTrainedModel:
    """Return an assistant for such a base, of two sliding layers and a full one.

    Args:
        has_clusters: Whether its head looks into 4 of 16 clusters of tokens.
        seed: Of the weights.
        width: Width of the base's hidden states.
        **settings: Of its text config.
    """
    own = {"hidden_size": 24, "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL]}
    text = {**TEXT, **ALONE, **own, **settings}
    text["num_kv_shared_layers"] = text["num_hidden_layers"]
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=width,
        use_ordered_embeddings=has_clusters,
        num_centroids=16,
        centroid_intermediate_top_k=4,
    )
    with shared_everywhere():
        model = randomise(Gemma4AssistantForCausalLM(config), seed=seed, embedding_scale=0.2)
    if has_clusters:
        order = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
        model.masked_embedding.token_ordering.copy_(order)
    model.generation_config.num_assistant_tokens = NUM_TOKENS
    return model


def plant(base: PreTrainedModel) -> PreTrainedModel:
    """Make a base choose by little but the last token, and return an assistant that does so too."""
    assistant = build_assistant(hidden_size=40)
    own, theirs = assistant.model, base.model
    with torch.no_grad():
        for model, scale in ((own, 0.0), (theirs, ATTENTION_SCALE)):
            for name, weight in model.named_parameters():
                if "post_attention_layernorm" in name:
                    weight.mul_(scale)
                elif "down_proj" in name or "per_layer_projection" in name:
                    weight.zero_()
        own.norm.weight.copy_(theirs.norm.weight)
        own.embed_tokens.weight.copy_(base.lm_head.weight)  # tied to the head
        assistant.pre_projection.weight.zero_()[:, :40].fill_diagonal_(1)
    return assistant


def transformers_chain(
    base: PreTrainedModel, assistant: PreTrainedModel, text: list[int]
) -> tuple[list[int], Tensor]:
    """Return the tokens and logits that Transformers drafts after a text."""
    ids, kind = torch.tensor([text]), SinglePositionMultiTokenCandidateGenerator
    given = {
        "input_ids": ids,
        "assistant_model": assistant,
        "target_model_input_embeddings": base.get_input_embeddings(),
        "generation_config": GenerationConfig(max_length=512),
        "model_kwargs": {},
    }
    # Version 5.17 takes more of them, and the hidden state of the last round's first token.
    generator = kind(**{name: given[name] for name in signature(kind).parameters if name in given})
    with torch.no_grad():
        outputs = base(ids[:, :-1], output_hidden_states=True, return_shared_kv_states=True)
        outputs.hidden_states = (outputs.hidden_states[-1][:, -1:],)
        found, logits = generator.get_candidates(
            ids, {}, outputs, is_first_iteration=False, n_last_matches=0
        )
    return found[0, len(text) :].tolist(), logits[0]
