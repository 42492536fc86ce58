"""Tiny random models that read images next to text, and prompts for them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.families.building import is_known
from tests.models import SHAPE, WINDOW, randomise

IMAGE_TOKEN = 150
MARKERS = (152, 153)  # around an image, where a model wants some
NUM_SLOTS = 4  # of an image

_SHAPE = {**SHAPE, "head_dim": 10}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 8}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_FINE = {**_TOWER, "patch_size": 2}  # four patches make a slot
_QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 40,
    "in_channels": 3,
}
_QWEN3_TOWER = {**_QWEN_TOWER, "num_position_embeddings": 16}
_QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 151,
    "vision_start_token_id": MARKERS[0],
    "vision_end_token_id": MARKERS[1],
}


def _rope(*sections: int, **settings: object) -> dict[str, object]:
    return {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4, **settings}


CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": _CLIP,
        "vision_feature_layer": -1,
        "text_config": {**_SHAPE, "model_type": "llama"},
    },
    "llava-window": {
        "vision_config": _CLIP,
        "vision_feature_layer": -1,
        "text_config": {
            **SHAPE,
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "qwen2_vl": {
        "vision_config": {
            **_QWEN_TOWER,
            "embed_dim": 16,
            "hidden_size": 40,
            "mlp_ratio": 2,
        },
        "text_config": {**SHAPE, "rope_parameters": _rope(1, 2, 2)},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {
        "vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [0], "window_size": 8},
        "text_config": {**SHAPE, "rope_parameters": _rope(1, 2, 2)},
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "vision_config": {**_QWEN3_TOWER, "deepstack_visual_indexes": [0]},
        "text_config": {**_SHAPE, "rope_parameters": _rope(2, 2, 1)},
        **_QWEN_IDS,
    },
    "qwen3_5": {
        "vision_config": _QWEN3_TOWER,
        "text_config": {
            **SHAPE,
            "head_dim": 20,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": _rope(2, 2, 1, partial_rotary_factor=0.5),
        },
        **_QWEN_IDS,
    },
    "gemma3": {
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": NUM_SLOTS,
        "text_config": {
            **_SHAPE,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 10,
        },
    },
    "smolvlm": {
        "vision_config": _FINE,
        "scale_factor": 2,
        "text_config": {**_SHAPE, "model_type": "llama"},
    },
    "mistral3": {
        "vision_config": {**_FINE, "model_type": "pixtral", "head_dim": 8},
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": {**_SHAPE, "model_type": "mistral", "sliding_window": None},
    },
    "internvl": {
        "vision_config": {**_FINE, "image_size": [8, 8], "patch_size": [2, 2]},
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "text_config": {**SHAPE, "model_type": "qwen2"},
    },
    "paligemma": {
        "vision_config": _SIGLIP,
        "projection_dim": 40,
        "text_config": {**_SHAPE, "model_type": "gemma"},
    },
}
WRAPPERS = [name for name in CONFIGS if is_known(name.partition("-")[0])]
"""Models that the installed Transformers has."""


def build_wrapper(name: str, *, image_token: int = IMAGE_TOKEN, **text: object) -> PreTrainedModel:
    """Return a new random model; `text` is added to the settings of its language model."""
    settings = {"image_token_id": image_token, **CONFIGS[name]}
    if name in {"gemma3", "mistral3"}:
        settings["image_token_index"] = image_token
    settings["text_config"] = {**settings["text_config"], **text}
    config = AutoConfig.for_model(name.partition("-")[0], **settings)
    model = AutoModelForImageTextToText.from_config(config)
    for token in ("bos_token_id", "eos_token_id"):
        setattr(model.generation_config, token, None)
    model.generation_config.pad_token_id = 0
    is_tied = "gemma" in name  # where large embeddings repeat every token
    return randomise(model, embedding_scale=0.05 if is_tied else 1.0)


@cache
def shared_wrapper(name: str) -> PreTrainedModel:
    """Return the same model to every test, which must leave it as it is."""
    return build_wrapper(name)


def prompt(
    name: str, *rows: tuple[int, ...], seed: int = 0, image_token: int = IMAGE_TOKEN
) -> dict[str, Tensor]:
    """Return what a processor makes of text and images, padded on the left.

    Args:
        name: The model.
        *rows: For each row the lengths of its texts, with an image between two of them; equally
            many images in every row.
        seed: Of texts and images.
        image_token: Token in the slots of an image.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    has_markers = name.startswith("qwen")
    image = [image_token] * NUM_SLOTS
    if has_markers:
        image = [MARKERS[0], *image, MARKERS[1]]
    texts: list[list[int]] = []
    for lengths in rows:
        text: list[int] = []
        for index, length in enumerate(lengths):
            words = torch.randint(1, IMAGE_TOKEN, (length,), generator=generator).tolist()
            text += [*(image if index else []), *words]
        texts.append(text)
    longest = max(map(len, texts))
    padded = [[0] * (longest - len(text)) + text for text in texts]
    mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
    tokens = torch.tensor(padded)
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor(mask)}
    count = sum(len(lengths) - 1 for lengths in rows)
    if count:
        inputs |= _images(name, count, len(rows), generator)
        kinds = (tokens == image_token).long()
        if has_markers:
            inputs["mm_token_type_ids"] = kinds
        elif name == "gemma3":
            inputs["token_type_ids"] = kinds
        elif name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(kinds)
    return inputs


def _images(name: str, count: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    if name.startswith("qwen"):  # patches of two pixels squared, in a row
        patches = torch.randn(16 * count, 12, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    pixels = torch.randn(count, 3, 8, 8, generator=generator)
    if name == "smolvlm":
        return {"pixel_values": pixels.unflatten(0, (batch, -1))}
    if name == "mistral3":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 8]] * count)}
    return {"pixel_values": pixels}
