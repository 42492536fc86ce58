"""Files of memories: written and read safely, and tied to the model that filled them."""

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Int32, Int64
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from transformers import PreTrainedModel

from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.atomic import write_file
from speclm.files.weights import reading
from speclm.target import TargetView, stored_matrices

MAX_CANDIDATES = 64
"""Maximum candidates that a memory keeps of each position."""

LOWEST_LOG_PROB = -60000.0
"""Stands for lower log-probabilities, which float16 does not have."""

_KIND, _VERSION = "speclm candidate memory", "1"
_DTYPES = {
    "tokens": "I32",
    "token_ids": "I32",
    "token_log_probs": "F16",
    "pairs": "I64",
    "pair_ids": "I32",
    "pair_log_probs": "F16",
}
_REMEDY = "fill a new memory with speclm warm"
_EXPECTED = f"a whole memory; it is truncated or damaged, {_REMEDY}"
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_NUM_SAMPLED = 16  # rows, and numbers of each row


@dataclass(frozen=True, slots=True, eq=False)
class StoredMemory:
    """A memory as its file has it.

    Args:
        tokens: Single tokens whose candidates are known, ascending.
        token_ids: Their candidates, best first.
        token_log_probs: Those of the candidates.
        pairs: ``previous * vocab_size + token`` of each pair, the least recently used first.
        pair_ids: Their candidates, best first.
        pair_log_probs: Those of the candidates.
    """

    tokens: Int32[np.ndarray, " tokens"]
    token_ids: Int32[np.ndarray, "tokens candidates"]
    token_log_probs: Float16[np.ndarray, "tokens candidates"]
    pairs: Int64[np.ndarray, " pairs"]
    pair_ids: Int32[np.ndarray, "pairs candidates"]
    pair_log_probs: Float16[np.ndarray, "pairs candidates"]


def write_memory(path: Path, stored: StoredMemory, *, vocab_size: int, fingerprint: str) -> None:
    """Write a memory as a safetensors file, which appears whole or not at all.

    Raises:
        OptionError: If it cannot be written; an old file stays.
    """
    tensors = {
        field.name: np.ascontiguousarray(getattr(stored, field.name)) for field in fields(stored)
    }
    about = {
        "kind": _KIND,
        "version": _VERSION,
        "vocab_size": str(vocab_size),
        "fingerprint": fingerprint,
    }
    try:
        write_file(path, save(tensors, about))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise OptionError(
            f"memory {str(path)!r} cannot be written ({error}); name a file in a folder that you "
            "may write to"
        ) from error


def read_memory(path: Path, *, vocab_size: int, fingerprint: str, max_pairs: int) -> StoredMemory:
    """Read a memory's file, which anybody may have written.

    What is read is bounded by `vocab_size` and `max_pairs`, whatever the file holds.

    Args:
        path: The file.
        vocab_size: Width of the target's logits.
        fingerprint: Of the target, from `memory_fingerprint`.
        max_pairs: Maximum pairs to read, the most recently used ones.

    Raises:
        CheckpointError: If it is no memory, damaged, or another model's.
    """
    with reading(path, _EXPECTED):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, expected a memory; {_REMEDY}")
        with safe_open(path, framework="numpy") as file:
            _require_own(path, file.metadata() or {}, vocab_size, fingerprint)
            _require_shapes(path, file, vocab_size)
            stored = StoredMemory(
                **{
                    name: _last_rows(file, name, max_pairs if "pair" in name else vocab_size)
                    for name in _DTYPES
                }
            )
        _require_values(path, stored, vocab_size)
        return stored


@torch.no_grad()
def memory_fingerprint(model: PreTrainedModel) -> str:
    """Return what identifies a model's weights and vocabulary: equal for equal models.

    It is a hash of a few sizes of the config, and of numbers from the embeddings, the head and two
    layers. These are rounded to bfloat16, so that weights loaded in bfloat16 and in float32 are
    equal; float16 may differ, since it lacks very small numbers. Device, folder and versions do
    not matter. Quantised weights are left out, and models offloaded to disk differ from those in
    memory. Syncs once for each matrix.
    """
    target, config = TargetView(model), model.config.get_text_config()
    sizes: list[Any] = [
        target.vocab_size,
        *(getattr(config, name, None) for name in _CONFIG_FIELDS),
    ]
    digest = hashlib.sha256(json.dumps(sizes, default=str).encode())
    chosen = {target.num_layers // 3, 2 * target.num_layers // 3}
    inner = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if (layer := _LAYER.search(name))
        and int(layer[1]) in chosen
        and parameter.dim() <= 2  # releases differ in whether they stack the weights of experts
        and "experts" not in name
    ]
    for weight in (*stored_matrices(model).values(), *(weight for _, weight in sorted(inner))):
        if weight is not None and weight.is_floating_point() and weight.device.type != "meta":
            digest.update(_sample(weight.detach()))
    return digest.hexdigest()[:32]


def _sample(weight: Tensor) -> bytes:
    """Return some numbers of a vector or matrix, evenly spread, rounded to bfloat16."""
    for dim, size in enumerate(weight.shape):
        spread = [size * index // _NUM_SAMPLED for index in range(_NUM_SAMPLED)] if size else []
        indices = torch.tensor(spread, dtype=torch.long, device=weight.device)
        weight = weight.index_select(dim, indices)
    rounded = weight.to(torch.bfloat16).contiguous().view(torch.int16).cpu()
    return bytes(rounded.numpy().tobytes())


def _require_own(path: Path, about: dict[str, str], vocab_size: int, fingerprint: str) -> None:
    """Check what a file says of itself."""
    found = (about.get("kind"), about.get("version"))
    if found != (_KIND, _VERSION):
        raise CheckpointError(
            f"{path}: found kind {shown(found[0])} of version {shown(found[1])}, expected "
            f"{_KIND!r} of version {_VERSION!r}; {_REMEDY}"
        )
    if about.get("vocab_size") != str(vocab_size):
        raise CheckpointError(
            f"{path}: a memory of a vocabulary of {shown(about.get('vocab_size'))} tokens, "
            f"expected the model's {str(vocab_size)!r}; name the memory of this model, or {_REMEDY}"
        )
    if about.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path}: a memory of the model with fingerprint {shown(about.get('fingerprint'))}, "
            f"expected {fingerprint!r}; name the memory of this model, or {_REMEDY}"
        )


def _require_shapes(path: Path, file: Any, vocab_size: int) -> None:
    """Check names, types and shapes before anything is read."""
    found = {}
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        part = file.get_slice(name)
        found[name] = (part.get_dtype(), tuple(part.get_shape()))
    shape = found.get("token_ids", ("", ()))[1]
    width = shape[1] if len(shape) == 2 else 0
    num_tokens, num_pairs = (
        (found.get(name, ("", ()))[1] or (-1,))[0] for name in ("tokens", "pairs")
    )
    expected = {
        name: (dtype, (count, width) if name.endswith(("ids", "probs")) else (count,))
        for name, dtype in _DTYPES.items()
        for count in [num_pairs if "pair" in name else num_tokens]
    }
    if found != expected or not 0 <= num_tokens <= vocab_size or not 1 <= width <= MAX_CANDIDATES:
        raise CheckpointError(
            f"{path}: found tensors {shown(found)}, expected {list(_DTYPES)!r} of at most "
            f"{vocab_size} tokens and {MAX_CANDIDATES} candidates; it is damaged, {_REMEDY}"
        )


def _last_rows(file: Any, name: str, most: int) -> Any:
    part = file.get_slice(name)
    count = part.get_shape()[0]
    if count <= most:
        return file.get_tensor(name)
    return part[count - most :] if most else part[:1][:0]


def _require_values(path: Path, stored: StoredMemory, vocab_size: int) -> None:
    """Check every number of a file."""
    tokens, pairs = stored.tokens, stored.pairs
    problem = None
    if not _are_within(tokens, vocab_size) or (np.diff(tokens) <= 0).any():
        problem = "tokens that are not ascending within the vocabulary"
    elif not _are_within(pairs, vocab_size**2) or len(np.unique(pairs)) < len(pairs):
        problem = "pairs that occur twice or are not of the vocabulary"
    for ids, log_probs in (
        (stored.token_ids, stored.token_log_probs),
        (stored.pair_ids, stored.pair_log_probs),
    ):
        if not _are_within(ids, vocab_size) or (np.diff(np.sort(ids, axis=1)) == 0).any():
            problem = "candidates that occur twice or are not of the vocabulary"
        elif not ((log_probs <= 0) & (log_probs >= LOWEST_LOG_PROB)).all():
            problem = "log-probabilities that are none"
    if problem is not None:
        raise CheckpointError(
            f"{path}: found {problem}, expected a memory of {vocab_size} tokens as speclm writes "
            f"it; it is damaged, {_REMEDY}"
        )


def _are_within(numbers: Any, end: int) -> bool:
    return bool(((numbers >= 0) & (numbers < end)).all())
