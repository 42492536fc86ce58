"""The record in an exported folder: how the base is loaded with its proposer."""

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from speclm._version import __version__
from speclm.drafting.heads_folder import hub_id
from speclm.drafting.package import EXPORT_NAME
from speclm.errors import CheckpointError, OptionError, reason_of, shown
from speclm.files.atomic import write_json
from speclm.files.hub import HUB_OPTIONS, HubOptions, download, path_exists
from speclm.files.weights import read_json
from speclm.methods.registry import HeadsSource, heads_names
from speclm.model import SpecModel
from speclm.model.call import AUTO
from speclm.tree.plan import TreePlan

_log = logging.getLogger("speclm")

FORMAT = "server"
HEADS_FOLDER = "heads"
OPTION_FILES = "heads_options"
"""Folder of the files that options of the heads name, such as a corpus."""

_MARKED = 2**20  # bytes at both ends of a file that identify it
_MAX_NAME = 255  # characters of a file's name
_SETTINGS: dict[str, Any] = {
    "heads": str | None,
    "heads_kwargs": dict,
    "files": dict,
    "num_draft_tokens": int | None,
    "tree": dict | str | None,
    "engine": str,
}


def heads_settings(source: HeadsSource) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return which heads are loaded and with which options, and the files that the options name.

    Raises:
        OptionError: If an option cannot be stored.
    """
    options: dict[str, Any] = {}
    names: dict[str, str] = {}
    files: dict[str, Path] = {}
    for option, value in source.options.items():
        path = None if option == "memory" else _option_file(value, source.folder)
        if path is None:
            options[option] = value
            if isinstance(value, Path) or not _is_storable((option, value)):
                what = f"the path {str(value)!r}" if isinstance(value, Path) else "a value"
                raise OptionError(
                    f"{option} in heads_kwargs is {what} that an exported folder cannot hold, "
                    "expected a file that exists, or a number or name; correct it, or leave it out"
                )
        else:
            names[option] = f"{len(names)}-{path.name}"
            files[names[option]] = path
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"heads_kwargs is {shown(options)}, expected what JSON holds "
            f"({reason_of(error)}); leave the others out"
        ) from error
    heads = str(source.given) if source.folder is None else None  # those in the folder
    return {"heads": heads, "heads_kwargs": options, "files": names}, files


def _option_file(value: object, heads: Path | None) -> Path | None:
    """Return the file outside of a folder of heads that an option names, if it names one."""
    if not isinstance(value, str | Path):
        return None
    path = Path(value)
    is_inside = heads is not None and not path.is_absolute() and path_exists(heads / path)
    return path if path_exists(path) and path.is_file() and not is_inside else None


def write_record(
    folder: Path, source: HeadsSource, settings: Mapping[str, Any], base: Mapping[str, Any]
) -> None:
    """Write where base and heads come from, and the arguments of `SpecModel.from_pretrained`.

    Args:
        folder: The folder, which holds the base.
        source: The heads.
        settings: The arguments by name, as JSON holds them; ``heads`` is None for those that the
            folder holds, and ``files`` has the names of files in `OPTION_FILES` by option.
        base: Name and commit of the base, and the names of its files of weights.
    """
    record = {
        "speclm_version": __version__,
        "format": FORMAT,
        "method": source.method.name,
        "base": {**base, "weights": {name: _mark(folder / name) for name in base["weights"]}},
        "source": {"name": hub_id(str(source.given)), "commit": source.commit},
        "settings": dict(settings),
    }
    write_json(folder / EXPORT_NAME, record)


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported one; a damaged record is none."""
    path = folder / EXPORT_NAME
    with suppress(CheckpointError):
        return path.is_file() and read_json(path).get("format") == FORMAT
    return False


def load_served(base: PreTrainedModel, *, commit: str | None = None) -> SpecModel:
    """Return a base with the proposer that lies next to it, in the folder or repository it is from.

    Args:
        base: The base, as Transformers loaded it.
        commit: Commit on the hub that it is from; None for a folder.

    Raises:
        CheckpointError: If it was loaded from elsewhere than an exported folder, or the settings or
            heads are damaged.
    """
    name = str(base.name_or_path)
    is_here = path_exists(name)
    commit = None if is_here else commit  # a folder may have the name of a commit
    hub = HubOptions(revision=commit)
    folder = Path(name) if is_here else download(name, hub, (EXPORT_NAME,))
    settings, weights = _read_record(folder)
    if any(_mark(folder / file) != mark for file, mark in weights.items()):
        _log.warning(
            "%s: the weights are not those that the heads were exported with, so few drafts may be "
            "accepted; export the folder again with speclm export-server",
            folder,
        )
    if settings["heads"] is None:
        settings |= {"heads": name, "heads_subfolder": HEADS_FOLDER, "heads_revision": commit}
    if files := settings.pop("files"):
        found = folder / OPTION_FILES
        if not is_here:
            found = download(name, replace(hub, subfolder=OPTION_FILES), tuple(files.values()))
        paths = {option: str((found / file).absolute()) for option, file in files.items()}
        settings["heads_kwargs"] = {**settings["heads_kwargs"], **paths}
    if isinstance(settings["tree"], dict):
        try:
            settings["tree"] = TreePlan(**settings["tree"])
        except TypeError as error:
            raise _damaged(folder / EXPORT_NAME, settings) from error
    return SpecModel.from_pretrained(base, **settings)


def _read_record(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings and the marks of the weights of an exported folder.

    What the folder is trusted with is its own files: names of others are refused, and so are heads
    on the hub and options for it.

    Raises:
        CheckpointError: If there are none, or they are damaged.
    """
    path = folder / EXPORT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path}: found no such file next to the base, expected that of speclm export-server; "
            "serve the folder that it wrote, or export this base"
        )
    record = read_json(path)
    settings, base = record.get("settings"), record.get("base")
    weights = base.get("weights") if isinstance(base, dict) else None
    if (
        record.get("format") != FORMAT
        or not isinstance(settings, dict)
        or settings.keys() != _SETTINGS.keys()
        or not all(isinstance(settings[key], kind) for key, kind in _SETTINGS.items())
        or not (settings["tree"] in (None, AUTO) or isinstance(settings["tree"], dict))
        or not isinstance(weights, dict)
        or not all(map(_is_file_name, (*weights, *settings["files"].values())))
        or not all(map(_is_storable, settings["heads_kwargs"].items()))
    ):
        raise _damaged(path, record)
    if settings["heads"] not in (None, *heads_names()):
        raise CheckpointError(
            f"{path}: heads is {shown(settings['heads'])}, expected null for those in the folder, "
            f"or one of {heads_names()!r}; export the folder again, or import what registers it"
        )
    return settings, weights


def _is_file_name(name: object) -> bool:
    is_short = isinstance(name, str) and 0 < len(name) <= _MAX_NAME
    return is_short and Path(str(name)).name == name and "\0" not in str(name)


def _is_storable(option: tuple[str, Any]) -> bool:
    """Return whether an option of heads may come from a folder that somebody else has made.

    Options for the hub may not, nor paths out of the folder, nor other files than the base's, nor a
    file that the memory of n-grams is written to.
    """
    name, value = option
    is_outside = isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts)
    is_written = name == "memory" and value not in ("model", "call")
    return name not in (*HUB_OPTIONS, "heads_path") and not is_outside and not is_written


def _damaged(path: Path, found: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: found {shown(found)}, expected the settings that speclm export-server writes; "
        "export the folder again"
    )


def _mark(path: Path) -> str:
    """Return a hash of the size and both ends of a file; empty if there is no such file."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MARKED))
        file.seek(max(size - _MARKED, 0))
        digest.update(file.read(_MARKED))
    return digest.hexdigest()
