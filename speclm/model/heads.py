"""Load the base and the proposer from ``base`` and ``heads``, and save heads."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from speclm.drafting.base_parts import BaseParts
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.heads_folder import Destination
from speclm.drafting.interface import Proposer
from speclm.errors import OptionError, UnsupportedModelError, suggest
from speclm.files.hub import UploadOptions, upload, with_base_options
from speclm.methods.finding import find_heads
from speclm.methods.registry import method_of, no_heads, reads_base_files
from speclm.model.exporting import find_format, write_format
from speclm.target.loading import load_causal_lm, without_adapter

OPTIONS_OF_LOADING = (
    *("heads", "heads_revision", "heads_subfolder", "heads_kwargs", "num_draft_tokens"),
    *("adaptive", "tree", "engine"),
)
"""Parameters of `SpecModel.from_pretrained` itself."""

Heads = str | Path | nn.Module | Proposer
"""Argument for one proposer; a module is a draft model, PEFT models included."""


def unwrap(base: Any, wrapper: type) -> Any:
    """Return the Transformers model inside a `SpecModel` (`wrapper`) or a PEFT model."""
    return base.base if issubclass(type(base), wrapper) else without_adapter(base)


def load_base(base: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model that `base` stands for.

    Args:
        base: Folder, hub id or loaded model.
        options: Arguments of its ``from_pretrained``.

    Raises:
        UnsupportedModelError: If it is none of these.
        OptionError: If there are options for a loaded model, or the model does not take one.
        CheckpointError: If a file is damaged.
    """
    if isinstance(base, str | Path):
        return load_causal_lm(base, options, owner="base", known=OPTIONS_OF_LOADING)
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"base is a {type(base).__name__}, expected a folder, a hub id or a Transformers "
            "PreTrainedModel; load one with AutoModelForCausalLM.from_pretrained"
        )
    if options:
        raise OptionError(
            f"base is a loaded model and {sorted(options)!r} would have no effect; "
            f"{suggest(next(iter(options)), OPTIONS_OF_LOADING)}, or pass it where the model is "
            "loaded"
        )
    return base


def options_with_base(
    heads: object, options: Any, *, base: object, kwargs: Mapping[str, Any]
) -> Any:
    """Return options of heads with those of the base that apply to them; see `with_base_options`.

    Args:
        heads: Heads as the user gave them.
        options: Their options.
        base: Base as the user gave it.
        kwargs: Arguments of its ``from_pretrained``.
    """
    are_of_base = reads_base_files(heads, options)
    return with_base_options(options, kwargs, heads=heads, base=base, are_of_base=are_of_base)


def load_proposer(
    heads: Heads | list[Heads] | tuple[Heads, ...] | None,
    base: PreTrainedModel,
    *,
    heads_kwargs: dict[str, Any] | None,
    num_draft_tokens: int | None,
    with_base: Callable[[object, Any], Any] = lambda _, options: options,
) -> Proposer | None:
    """Return the proposer that `heads` stands for.

    Args:
        heads: Name of a method, folder, hub id, loaded draft model, proposer, or None; or a list
            of these, whose drafts are merged.
        base: The target, with which the proposer shares its vocabulary.
        heads_kwargs: Options of the method that is loaded, and those of `HubOptions`.
        num_draft_tokens: Maximum draft tokens per round; None for the proposer's default.
        with_base: Adds options of the base to those of heads, or of each part of a list.

    Raises:
        UnknownNameError: If a string is neither a name nor a folder, and is not on the hub.
        OptionError: If the method does not take an option, or the object is already built.
        VocabularyMismatchError: If a draft model or heads have another vocabulary.
        UnsupportedModelError: If a draft model fails the tree self-check.
        CheckpointError: If heads are damaged or incomplete.
    """
    found = with_base(heads, heads_kwargs)
    heads_kwargs = {} if found is None else found
    given: Any = heads_kwargs  # anything, without type checks
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise OptionError(
            f"heads_kwargs is {heads_kwargs!r}, expected a dictionary of options by name; pass for "
            "example {'min_probability': 0.1}"
        )
    size = {} if num_draft_tokens is None else {"num_draft_tokens": num_draft_tokens}
    if isinstance(heads, list | tuple):
        if heads_kwargs:
            raise OptionError(
                f"heads are {len(heads)} proposers and heads_kwargs {sorted(heads_kwargs)!r} would "
                "have no clear owner; pass proposers that are built with their options"
            )
        parts = [
            load_proposer(part, base, heads_kwargs=with_base(part, None), num_draft_tokens=None)
            for part in heads
        ]
        return CombinedProposer([part for part in parts if part is not None], **size)
    options = {**heads_kwargs, **size}
    if heads is None or isinstance(heads, Proposer):
        if options:
            raise OptionError(
                f"heads is {heads!r} and {sorted(options)!r} would have no effect; pass them where "
                "the proposer is built"
            )
        return heads
    source = find_heads(heads, options)
    proposer = source.method.load(source, base)
    proposer.hub_commit = source.commit
    return proposer


def save_heads(
    folder: str | Path, proposer: Proposer | None, base: PreTrainedModel, *, to: str | None
) -> None:
    """Write the heads of a proposer, its tree and a model card into a folder.

    Args:
        folder: Created if it does not exist. A card that somebody has written is kept.
        proposer: What to save.
        base: The model that it drafts for; the path of a local one is not written.
        to: Checkpoint format of other software; None for our own, with the tree.

    Raises:
        OptionError: If the proposer has no heads.
        UnknownNameError: If the method has no such format.
        CheckpointError: If the folder holds something else, or the format cannot hold the heads.
    """
    _save(proposer, Destination(Path(folder), base), to)


def push_heads(
    repo_id: str,
    proposer: Proposer | None,
    base: PreTrainedModel,
    *,
    to: str | None,
    private: bool | None,
    token: str | None,
) -> str:
    """Upload the heads of a proposer, its tree and a model card to the hub.

    Args:
        repo_id: Repository; created if it does not exist.
        proposer: What to upload.
        base: The model that it drafts for; the path of a local one is not published.
        to: Checkpoint format of other software; None for our own, with the tree.
        private: Whether a new repository is private; None for the account's default.
        token: Access token; None for the stored one.

    Returns:
        The address of the commit.

    Raises:
        OptionError: If the proposer has no heads; nothing is sent then.
        UploadError: If the upload fails; the message says what to do.
    """
    with TemporaryDirectory() as folder:
        _save(proposer, Destination(Path(folder), base, repo_id), to)
        files: dict[str, Path | bytes] = {path.name: path for path in Path(folder).iterdir()}
        options = UploadOptions(message="Upload draft heads", private=private, token=token)
        return upload(repo_id, files, options)


def _save(proposer: Proposer | None, destination: Destination, to: str | None) -> None:
    method = None if proposer is None else method_of(proposer)
    if proposer is None or method is None:
        raise no_heads(proposer)
    if to is None:
        method.save(proposer, destination)
        return
    base = BaseParts.of_model(destination.base)
    if destination.repo_id is not None:
        base = replace(base, name=destination.base_id or "")  # no path is published
    write_format(
        destination.folder,
        method.checkpoint(proposer, destination),
        find_format(method, to),
        method=method,
        base=base,
        source={"name": None, "format": "speclm"},
        repo_id=destination.repo_id,
    )
