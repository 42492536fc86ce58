"""Find heads on the hub: which method a repository's files belong to, or what was misspelt."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from speclm.errors import UnknownNameError, shown
from speclm.files.hub import HubOptions, download, is_hub_id

if TYPE_CHECKING:
    from speclm.methods.registry import Method

_HINTS = ("config.json", "*.index.json")
_HEAD_FILES = ("*.json", "*.safetensors")
_PICKLES = ("*.pt", "pytorch_model*.bin")
_SIMILAR = 0.75  # similarity from which a name without an organisation counts as a typo


def find_on_hub(
    repository: str, hub: HubOptions, methods: Mapping[str, "Method"]
) -> tuple["Method | None", Path]:
    """Return the method of the heads in a repository, and the folder of what was downloaded.

    Configs are downloaded first, and weights only if they may be those of heads.

    Args:
        repository: Hub id.
        hub: Options for the hub.
        methods: The registered methods by name, in the order in which they are tried.

    Returns:
        No method if the repository holds none of their heads; the folder has its configs then.

    Raises:
        UnknownNameError: If it is no hub id, probably a misspelt name, or cannot be downloaded.
        CheckpointError: If a file that has to be opened cannot be read.
    """
    names = sorted(name for name, method in methods.items() if method.is_named)
    _require_repository(repository, methods, names)
    patterns = (*_HINTS, *(hint for method in methods.values() for hint in method.hints))
    hints = _download(repository, replace(hub, force_download=False), patterns, names)
    for method in methods.values():
        if not method.is_likely(hints):
            continue
        folder = _download(repository, hub, _HEAD_FILES, names)
        source = method.find_weights(folder)
        if source is None or not all(file.exists() for file in source.files.values()):
            folder = _download(repository, hub, (*_HEAD_FILES, *_PICKLES), names)
        if method.find_weights(folder) is not None:
            return method, folder
    return None, hints


def _download(
    repository: str, hub: HubOptions, patterns: tuple[str, ...], names: list[str]
) -> Path:
    try:
        return download(repository, hub, patterns)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"heads {repository!r} is not a registered proposer nor a folder, and {error}; "
            f"registered are {names!r}"
        ) from error.__cause__


def _require_repository(name: str, methods: Mapping[str, "Method"], registered: list[str]) -> None:
    """Check a name without asking the hub, which is slow to answer no.

    Raises:
        UnknownNameError: If it is not a hub id, is a kind of heads, or is almost a registered name.
    """
    known = f"registered are {registered!r}"
    if not is_hub_id(name):
        raise UnknownNameError(
            f"heads {shown(name)} is not a registered proposer, nor a folder that exists, nor a "
            f"hub id such as 'org/name'; {known}"
        )
    if "/" in name:
        return
    kinds = [
        "base",
        *(kind for method in methods.values() for kind in (method.name, *method.aliases)),
    ]
    if name in kinds:
        raise UnknownNameError(
            f"heads {name!r} is a kind of heads, expected the folder or hub id of some; those that "
            f"are bundled for the bundled base are in speclm.demo.assets(); {known}"
        )
    near = difflib.get_close_matches(name, registered, n=1)
    near = near or difflib.get_close_matches(name, kinds, n=1, cutoff=_SIMILAR)
    if near:
        raise UnknownNameError(
            f"heads {name!r} is not a registered proposer nor a folder; did you mean {near[0]!r}? "
            f"{known}"
        )
