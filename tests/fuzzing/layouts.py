"""Tiny valid folders in the layouts that others publish: one function for each layout.

A folder is the content of each of its files by name. Whoever adds a layout adds a function to
`LAYOUTS`; its files are damaged like all others.
"""

import json
from collections.abc import Callable
from io import BytesIO

import torch
from safetensors.torch import save

from tests import block_tables, eagle_tables

Files = dict[str, bytes]

MEDUSA = {
    f"{head}.{part}": shape
    for head in range(2)
    for part, shape in {
        "0.linear.weight": (4, 4),
        "0.linear.bias": (4,),
        "1.weight": (9, 4),
    }.items()
}
MEDUSA_CONFIG = {
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "vocab_size": 9,
    "base_model_name_or_path": "org/base",
    "speclm": {"choices": [[0], [0, 1]]},
}


def folder(tables, table, config, *, name="model.safetensors", legacy=False) -> Files:
    state = tables.tensors(table)
    if name.endswith(".safetensors"):
        content = save(state)
    else:
        written = BytesIO()
        torch.save(state, written, _use_new_zipfile_serialization=not legacy)
        content = written.getvalue()
    return {"config.json": json.dumps(config).encode(), name: content}


def sharded(files: Files, tables, table) -> Files:
    """Return a folder with its tensors in two files and an index."""
    state = tables.tensors(table)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    shards = {
        name: save({key: state[key] for key in state if names[key] == name})
        for name in set(names.values())
    }
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": names}).encode()
    config = {"config.json": files["config.json"]}
    return {**config, **shards, "model.safetensors.index.json": index}


def medusa(name="medusa_lm_head.safetensors", *, keys=lambda key: key, legacy=False, more=()):
    table = {keys(key): shape for key, shape in MEDUSA.items()} | dict(more)
    return folder(eagle_tables, table, MEDUSA_CONFIG, name=name, legacy=legacy)


def medusa_without_matrices() -> Files:
    table = {key: shape for key, shape in MEDUSA.items() if "linear" in key}
    return folder(eagle_tables, table, MEDUSA_CONFIG, name="medusa_lm_head.safetensors")


def medusa_of_vllm() -> Files:
    table = {}
    for key, shape in MEDUSA.items():
        head, part = key.split(".", 1)
        is_matrix = part == "1.weight"
        name = part.replace("0.linear", "layers.0")
        table[f"lm_heads.{head}.weight" if is_matrix else f"blocks.{head}.{name}"] = shape
    return folder(eagle_tables, table, MEDUSA_CONFIG)


def merged() -> Files:
    more = {"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}
    return medusa("model.safetensors", keys=lambda key: f"medusa_head.{key}", more=more)


def eagle(version=1, **options) -> Files:
    table = eagle_tables.EAGLE1 if version == 1 else eagle_tables.EAGLE3
    config = eagle_tables.EAGLE1_CONFIG if version == 1 else eagle_tables.EAGLE3_CONFIG
    return folder(eagle_tables, table, config, **options)


def eagle_with_map() -> Files:
    written = BytesIO()
    torch.save(eagle_tables.DRAFTED, written)
    return {**eagle(), "freq_5.pt": written.getvalue()}


def eagle_of_vllm() -> Files:
    table = {
        f"model.{key}" if key.startswith("layers") else key: shape
        for key, shape in eagle_tables.EAGLE1.items()
    }
    config = {"model_type": "eagle", "model": eagle_tables.EAGLE1_CONFIG}
    return folder(eagle_tables, table, config)


def eagle3_of_layers() -> Files:
    table = eagle_tables.renamed(eagle_tables.EAGLE3, "midlayer.", "layers.0.")
    table["input_norm.weight"] = (24,)
    return folder(eagle_tables, table, eagle_tables.SPECULATORS_CONFIG)


def block(layout: str) -> Files:
    table, config = block_tables.LAYOUTS[layout]
    return folder(block_tables, table, config)


def p_eagle() -> Files:
    table = {**eagle_tables.EAGLE3, "mask_hidden": (1, 1, 24)}
    config = {**eagle_tables.EAGLE3_CONFIG, "parallel_drafting": True}
    return folder(eagle_tables, table, config)


def mtp() -> Files:
    table = {**block_tables.DFLASH, "mtp.fc.weight": (8, 16)}
    return folder(block_tables, table, block_tables.ZLAB_CONFIG)


LAYOUTS: dict[str, Callable[[], Files]] = {
    "medusa": medusa,
    "medusa, pickled": lambda: medusa("medusa_lm_head.pt"),
    "medusa, old pickle": lambda: medusa("medusa_lm_head.pt", legacy=True),
    "medusa without matrices": medusa_without_matrices,
    "medusa of vLLM": medusa_of_vllm,
    "medusa, merged": merged,
    "eagle": eagle,
    "eagle, pickled": lambda: eagle(name="pytorch_model.bin"),
    "eagle, old pickle": lambda: eagle(name="pytorch_model.bin", legacy=True),
    "eagle of vLLM": eagle_of_vllm,
    "eagle with a token map": eagle_with_map,
    "eagle3": lambda: eagle(3),
    "eagle3, pickled": lambda: eagle(3, name="pytorch_model.bin"),
    "eagle3 of speculators": eagle3_of_layers,
    "eagle3, sharded": lambda: sharded(eagle(3), eagle_tables, eagle_tables.EAGLE3),
    "P-EAGLE": p_eagle,
    "MTP": mtp,
    **{name: lambda name=name: block(name) for name in block_tables.LAYOUTS},
}
REFUSED = ("P-EAGLE", "MTP")
"""Layouts of methods that are recognised and refused by name."""
