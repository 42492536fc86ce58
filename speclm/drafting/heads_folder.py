"""Folders of heads: checked, and written so that the files change together or not at all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.cards import GENERATED_MARK
from speclm.errors import (
    CheckpointError,
    TopologyError,
    TreeBudgetError,
    UnknownNameError,
    reason_of,
)
from speclm.files.atomic import write_file
from speclm.files.hub import is_hub_id, path_exists
from speclm.files.weights import FLOATS, WeightFiles, read_json, weight_files
from speclm.tree.static import RankPaths, normalize_paths

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
WEIGHTS_NAME = "model.safetensors"

_SHARED = {"embed_tokens.weight": "has_own_embeddings", "lm_head.weight": "has_own_lm_head"}
"""Matrices that heads may share with the target, and the fields that say whether they do."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# Some libraries read these instead of the weights.
_RIVALS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """Folder and names for saving heads.

    Args:
        folder: Created if it does not exist.
        base: The model that they draft for.
        repo_id: Repository on the hub that the folder is uploaded to, if any.
    """

    folder: Path
    base: PreTrainedModel
    repo_id: str | None = None

    @property
    def base_id(self) -> str | None:
        """The base's name if others can find it by that name; None for a path."""
        return hub_id(self.base.config.name_or_path)

    def card(self, text: str) -> str | None:
        """Return the text of the card, or None to keep a card that a user has written."""
        return replaceable_card(self.folder, text)


def replaceable_card(folder: Path, text: str) -> str | None:
    """Return the text of a card, or None to keep a card in the folder that a user has written."""
    path = folder / CARD_NAME
    is_generated = not path.exists() or (
        path.is_file() and GENERATED_MARK in path.read_text(encoding="utf-8", errors="replace")
    )
    return text if is_generated else None


ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, slots=True, eq=False)
class HeadsCheckpoint(Generic[ConfigT]):
    """Heads as a config and tensors.

    Args:
        config: Sizes and switches.
        tensors: By the names of the network's state dict.
        base_name_or_path: The model that the heads were trained on, if known.
        choices: Static tree that was stored with the heads.
    """

    config: ConfigT
    tensors: Mapping[str, Tensor]
    base_name_or_path: str | None = None
    choices: RankPaths | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrices; single tensors may have another."""
        return self.tensors["fc.weight"].dtype

    def share(
        self,
        *,
        embeddings: Float[Tensor, "vocab hidden"] | None = None,
        lm_weight: Float[Tensor, "vocab hidden"] | None = None,
    ) -> Self:
        """Return the checkpoint without copies of the target's embeddings and output matrix.

        Published heads often have such copies, sometimes in another dtype.

        Args:
            embeddings: The target's embeddings, if they can be compared.
            lm_weight: The target's output matrix, if it can be compared.
        """
        theirs = {"embed_tokens.weight": embeddings, "lm_head.weight": lm_weight}
        copied = {
            name
            for name, matrix in theirs.items()
            if (mine := self.tensors.get(name)) is not None
            and matrix is not None
            and not matrix.is_meta
            and mine.shape == matrix.shape
            and torch.equal(mine.to(matrix.device, matrix.dtype), matrix)
        }
        config: Any = self.config  # a dataclass
        config = replace(config, **{_SHARED[name]: False for name in copied})
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in copied}
        return replace(self, config=config, tensors=kept)


def hub_id(name: str | None) -> str | None:
    """Return a model's name if others can find it by that name; None for a path."""
    return name if name and is_hub_id(name) and not path_exists(name) else None


def read_choices(folder: Path, config: Mapping[str, Any]) -> RankPaths | None:
    """Return the static tree that a config holds, if any.

    Raises:
        CheckpointError: If it is not a tree.
    """
    own = config.get("speclm") or {}
    if not isinstance(own, Mapping):
        raise CheckpointError(
            f"{folder / 'config.json'}: speclm is a {type(own).__name__}, expected an object with "
            "what speclm has stored; remove it"
        )
    choices = own.get("choices")
    if choices is None:
        return None
    try:
        return normalize_paths(choices)
    except (TopologyError, TreeBudgetError, UnknownNameError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: speclm.choices is no tree ({error}); remove it or pass tree"
        ) from error


def store_choices(
    folder: Path, choices: RankPaths, *, notes: Mapping[str, Any], check: Callable[[Path], object]
) -> None:
    """Write a static tree into the config of saved heads, which are loaded with it from then on.

    Args:
        folder: Folder of the heads.
        choices: The tree.
        notes: Further entries next to it, such as how it was found.
        check: Reads the folder, and raises if the heads cannot be read with the tree.

    Raises:
        CheckpointError: If there is no config, or the check fails; the old config stays then.
        OSError: If the config cannot be written.
    """
    path = folder / CONFIG_NAME
    config, before = read_json(path), path.read_bytes()
    own = {**(config.get("speclm") or {}), "choices": [list(each) for each in choices], **notes}
    write_file(path, json.dumps({**config, "speclm": own}, indent=2) + "\n")
    try:
        check(folder)
    except BaseException:
        write_file(path, before)
        raise


def read_columns(
    path: Path, offsets: Tensor, is_drafted: Tensor | None, *, vocab_size: int, num_columns: int
) -> Int[Tensor, " draft_vocab"]:
    """Return the target's id of each token of the draft vocabulary.

    Args:
        path: The file, for messages.
        offsets: ``d2t``: for each draft token, the target's id minus the draft id.
        is_drafted: ``t2d``: whether each of the target's tokens is in the draft vocabulary.
        vocab_size: Tokens of the target.
        num_columns: Tokens of the draft vocabulary.

    Raises:
        CheckpointError: If a list has another length, or they contradict each other.
    """
    _require_list(path, "d2t", offsets, num_columns, "columns of the logits")
    columns = offsets.to(torch.int64) + torch.arange(num_columns, device="cpu")
    outside = (columns < 0) | (columns >= vocab_size)
    if outside.any():
        token = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft token {token} to {int(columns[token])}, expected a token "
            f"from 0 to {vocab_size - 1}; the file belongs to another vocabulary, or holds ids in "
            "place of offsets: export the heads again"
        )
    falls = columns[1:] <= columns[:-1]
    if falls.any():
        token = int(falls.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft tokens {token} and {token + 1} to {int(columns[token])} and "
            f"{int(columns[token + 1])}, expected increasing tokens; export the heads again with a "
            "sorted vocabulary"
        )
    if is_drafted is not None:
        _require_list(path, "t2d", is_drafted, vocab_size, "tokens of the target")
        expected = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
        expected[columns] = True
        differs = (is_drafted != 0) != expected
        if differs.any():
            token = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{path}: 't2d' holds {bool(is_drafted[token])} for token {token}, expected "
                f"{bool(expected[token])} as 'd2t' says ({int(differs.sum())} such tokens); one of "
                "them is of another run, export the heads again"
            )
    return columns


def _require_list(path: Path, key: str, found: Tensor, length: int, of: str) -> None:
    if found.shape != (length,) or found.dtype not in _INTEGERS:
        raise CheckpointError(
            f"{path}: {key!r} is {found.dtype} of shape {list(found.shape)}, expected whole "
            f"numbers of shape [{length}], the {of}; export the heads again"
        )


def draft_lists(
    columns: Int[Tensor, " draft_vocab"] | None, *, vocab_size: int
) -> dict[str, Tensor]:
    """Return both lists of a draft vocabulary; None stands for a complete one."""
    if columns is None:
        columns = torch.arange(vocab_size, device="cpu")
    columns = columns.cpu()
    is_drafted = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
    is_drafted[columns] = True
    return {"d2t": columns - torch.arange(len(columns), device="cpu"), "t2d": is_drafted}


def require_folder(folder: Path) -> None:
    """Check that a path is a folder or does not exist.

    Raises:
        CheckpointError: If it is a file, or no path at all.
    """
    try:
        folder.resolve()
    except (ValueError, RuntimeError) as error:  # a zero byte, a loop of links
        raise CheckpointError(
            f"{str(folder)!r}: found no path ({reason_of(error)}), expected that of a folder; "
            "correct it"
        ) from error
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: found a file, expected a folder; choose another place")


def require_replaceable(
    folder: Path, *, is_mine: Callable[[WeightFiles], bool], owner: str
) -> None:
    """Check that heads in `WEIGHTS_NAME` can be written without destroying anything.

    Args:
        folder: Where they go.
        is_mine: Whether weights are heads of the same method, which may be replaced.
        owner: What is saved, for the message.

    Raises:
        CheckpointError: If it is a file, or holds another model or weights that are read instead.
    """
    require_folder(folder)
    for name in _RIVALS:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: found weights that are read in place of {WEIGHTS_NAME}, "
                "expected none; save the heads into a folder of their own"
            )
    weights = folder / WEIGHTS_NAME
    is_taken = (folder / CONFIG_NAME).is_file() or weights.is_file()
    mine = (source for source in weight_files(folder) if source.path == weights)
    if is_taken and not any(map(is_mine, mine)):
        raise CheckpointError(
            f"{folder}: found the config or weights of another model, expected none or those of "
            f"{owner}; save the heads into a folder of their own"
        )


def require_shapes(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    keys: Mapping[str, str],
    *,
    owner: str,
) -> None:
    """Check that all tensors of heads are there, no others, and that each has its shape.

    Args:
        path: The file, for messages.
        tensors: Tensors by our names.
        expected: Shapes by our names.
        keys: Key in the file of each tensor.
        owner: What heads they are, for the message.

    Raises:
        CheckpointError: If one is missing, unexpected, not of floating numbers or has another
            shape.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(
                f"{path}: key {name!r} is missing, found {len(tensors)} other parts of {owner}; "
                "download the file again"
            )
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {keys[name]!r} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"expected floating numbers of shape {list(shape)} as the other tensors say; "
                "export the heads again"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(
            f"{path}: found key {keys[extra[0]]!r}, expected none such in {owner}; remove it, or "
            "export the heads again"
        )


def require_whole(
    folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that tensors to be written have the shapes that their config says.

    Raises:
        CheckpointError: If one is missing, unexpected or has another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {found.get(name)}, expected {expected.get(name)} "
            "as the numbers of the heads say; pass the numbers that the tensors were made with"
        )
