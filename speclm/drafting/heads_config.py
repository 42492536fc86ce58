"""What the configs of heads have in common: read, compared with tensors, and written back."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speclm.drafting.decoder import read_rope
from speclm.errors import CheckpointError, shown
from speclm.files.weights import MAX_COUNT

_log = logging.getLogger("speclm")

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor, by our names."""

_MAX_NUMBER = 1e30  # of anything but counts
_MAX_TEXT = 1000  # characters of a name


def merge_objects(
    path: Path, config: Mapping[str, Any], parts: tuple[str | None, ...]
) -> dict[str, Any]:
    """Return the values of a config and of objects in it, flattened and without nulls.

    Args:
        path: The file, for messages.
        config: Its content.
        parts: Names of objects, the strongest last; None is the config itself.

    Raises:
        CheckpointError: If a part is not an object.
    """
    hints: dict[str, Any] = {}
    for name in parts:
        part = config if name is None else config.get(name) or {}
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{path}: {name} is {shown(part)}, expected an object; correct it"
            )
        hints |= {key: value for key, value in part.items() if value is not None}
    return hints


def require_types(
    path: Path, hints: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]
) -> None:
    """Check the types of those values that are present, and that numbers are of a usual size.

    Raises:
        CheckpointError: If one has the wrong type.
    """
    for name, allowed in types.items():
        value = hints.get(name)
        is_wrong = not isinstance(value, allowed) or (
            isinstance(value, bool) and bool not in allowed
        )
        most = MAX_COUNT if allowed == (int,) else _MAX_NUMBER
        expected = None
        if value is not None and is_wrong:
            expected = allowed[-1].__name__
        elif isinstance(value, int | float) and not abs(value) <= most:
            expected = f"a number up to {most}"
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            expected = f"up to {_MAX_TEXT} characters"
        elif name == "layer_types" and any(not isinstance(kind, str) for kind in value or ()):
            expected = "strings"
        if expected is not None:
            raise CheckpointError(
                f"{path}: {name} is {shown(value)}, expected {expected}; correct it"
            )


def matrix_shape(path: Path, shapes: Shapes, name: str) -> tuple[int, int]:
    """Return the shape of a tensor that has to be a matrix."""
    shape = shapes.get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise CheckpointError(
            f"{path}: key {name!r} {found}, expected a matrix; download the file again"
        )
    return shape[0], shape[1]


def width_of_heads(
    path: Path, shapes: Shapes, hints: Mapping[str, Any], rows: tuple[int, int]
) -> int:
    """Return the width of a head, from its norm, the config, or queries / heads."""
    normed = shapes.get("layers.0.self_attn.q_norm.weight")
    num_heads, named = hints.get("num_attention_heads"), hints.get("head_dim")
    if normed:
        head_dim = normed[0]
    elif named and num_heads and named * num_heads != rows[0]:
        raise CheckpointError(
            f"{path}: queries are {rows[0]} wide, expected {named * num_heads} since config.json "
            f"names {num_heads} heads of head_dim {named}; correct config.json"
        )
    elif not (named or num_heads):
        raise CheckpointError(
            f"{path}: config.json names neither num_attention_heads nor head_dim, and queries "
            f"{rows[0]} wide do not show them; add one to config.json"
        )
    else:
        head_dim = named or max(1, rows[0] // hints["num_attention_heads"])
    if not head_dim or any(row % head_dim for row in rows):
        raise CheckpointError(
            f"{path}: queries and keys are {rows[0]} and {rows[1]} wide, expected multiples of "
            f"{head_dim}, the width of a head; correct num_attention_heads or head_dim in "
            "config.json"
        )
    return int(head_dim)


def vocabularies(path: Path, shapes: Shapes, hints: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width of the target's logits and that of the heads'."""
    lists = [shapes[name] for name in ("t2d", "embed_tokens.weight") if shapes.get(name)]
    columns = [shapes[name] for name in ("lm_head.weight", "d2t") if shapes.get(name)]
    vocab_size = lists[0][0] if lists else hints.get("vocab_size")
    if vocab_size is None:
        vocab_size = columns[0][0] if columns and "d2t" not in shapes else None
    if vocab_size is None:
        raise CheckpointError(
            f"{path}: neither config.json nor a tensor shows vocab_size, the width of the target's "
            "logits; add it to config.json"
        )
    return vocab_size, columns[0][0] if columns else vocab_size


def count_layers(path: Path, shapes: Shapes) -> int:
    """Return how many layers have tensors, without looping up to a number named in a key."""
    indices = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    missing = next((index for index in range(len(indices)) if index not in indices), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: key 'layers.{missing}.self_attn.q_proj.weight' is missing, found parts of "
            f"{len(indices)} layers up to number {max(indices)}, expected numbers from 0 without "
            "gaps; download the file again"
        )
    return len(indices)


def log_differences(path: Path, hints: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Log the values of the config that differ from the tensors."""
    wrong = [
        f"{name} {hint!r} (found {number})"
        for name, number in config.items()
        if (hint := hints.get(name, number)) != number
    ]
    if wrong:
        _log.warning("%s goes by its tensors; config.json says %s", path, ", ".join(wrong))


def base_name(hints: Mapping[str, Any]) -> str | None:
    """Return the base that a config names for its heads, if any."""
    verifier = hints.get("speculators_config", {}).get("verifier")
    named = verifier.get("name_or_path") if isinstance(verifier, Mapping) else None
    found = named or hints.get("base_model_name_or_path")
    return found if isinstance(found, str) and len(found) <= _MAX_TEXT else None


def require_same_config(path: Path, written: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that the values of a config read back as they were written.

    Raises:
        CheckpointError: If one does not.
    """
    for name, value in written.items():
        if found[name] != value:
            raise CheckpointError(
                f"{path}: {name} reads back as {found[name]!r}, expected {value!r} as it was "
                "written, the old files are kept; report it with these numbers"
            )


def saved_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rotation as Transformers 4 wrote it, which all libraries read."""
    rope = read_rope({"rope_parameters": parameters})
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    if rope_type == "default":
        return {"rope_theta": theta}
    # The code of EAGLE's authors accepts only these two keys.
    key = "type" if rope_type in ("linear", "dynamic") and len(rope) == 1 else "rope_type"
    return {"rope_theta": theta, "rope_scaling": {key: rope_type, **rope}}
