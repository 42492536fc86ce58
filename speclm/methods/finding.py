"""Find the method and the files that a `heads` argument stands for: by name, folder or hub id."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from speclm.errors import CheckpointError, OptionError, UnknownNameError, shown
from speclm.files.atomic import read_json
from speclm.files.hub import HubOptions, download, is_hub_id, path_exists
from speclm.methods.registry import HeadsSource, Method, heads_names, registered_methods

_HINTS = ("config.json", "*.index.json")
_HEAD_FILES = ("*.json", "*.safetensors")
_PICKLES = ("*.pt", "pytorch_model*.bin")
_SIMILAR = 0.75  # similarity from which a name without an organisation counts as a typo
_FALLBACK = "draft_model"  # loads what no other method recognises
# Drafts of other kinds, by a part of the names of classes or types in their configs.
_FOREIGN = {
    "mlpspeculator": "an MLP speculator",
    "peagle": "P-EAGLE",
    "hydra": "Hydra",
    "mtp": "multi-token prediction (MTP)",
    "nextn": "multi-token prediction (MTP)",
    "assistant": "an assistant of another family than Gemma 4",
}


def find_heads(heads: object, options: Mapping[str, Any] | None = None) -> HeadsSource:
    """Recognise a `heads` argument, and download its files if necessary.

    Only the config of a language model on the hub is downloaded here.

    Raises:
        UnknownNameError: If it is neither a name nor a folder and cannot be downloaded.
        OptionError: If no method takes the object, or a folder comes with options for the hub.
        CheckpointError: If a file that has to be opened cannot be read.
    """
    options = dict(options or {})
    methods = registered_methods()
    taker = next((method for method in methods.values() if method.takes(heads)), None)
    if taker is not None:
        return HeadsSource(taker, heads, options=options)
    if not isinstance(heads, str | Path):
        raise OptionError(
            f"heads is a {type(heads).__name__}, expected a name, folder, hub id, draft model, "
            "Proposer, list of these or None; a network of heads goes into its proposer"
        )
    named = methods.get(str(heads))
    if named is not None and named.is_named:
        return HeadsSource(named, heads, options=options)
    hub, options = HubOptions.split(options)
    if path_exists(heads):
        method, folder = _find_in_folder(Path(heads), hub)
    else:
        method, folder = _find_on_hub(str(heads), hub)
    return HeadsSource(method, heads, folder, hub.given, options)


def _find_in_folder(heads: Path, hub: HubOptions) -> tuple[Method, Path]:
    unused = sorted(hub.given.keys() & {"revision", "force_download"})
    if unused:
        raise OptionError(
            f"heads {str(heads)!r} is a folder and {unused!r} in heads_kwargs would have no "
            "effect; leave them out, or pass a hub id"
        )
    folder = heads / hub.subfolder
    if not folder.is_dir():
        raise UnknownNameError(
            f"heads {str(heads)!r} has no subfolder {hub.subfolder!r}, expected that of heads or a "
            "draft model; correct subfolder in heads_kwargs"
            if hub.subfolder
            else f"heads {str(heads)!r} is a file, expected a folder, hub id or registered name; "
            "pass the folder that it lies in"
        )
    methods = registered_methods()
    for method in methods.values():
        if method.is_declared(folder) or method.find_weights(folder) is not None:
            return method, folder
    _require_known(folder)
    return methods[_FALLBACK], folder


def _require_known(folder: Path) -> None:
    """Check that a folder's config does not declare drafts of a kind that speclm does not have.

    Raises:
        CheckpointError: If it does; the message names the kind.
    """
    try:
        config = read_json(folder / "config.json")
        declared = [config.get("model_type"), config.get("speculators_model_type")]
        text = " ".join(map(str, [*declared, *(config.get("architectures") or ())])).lower()
    except (OSError, ValueError, AttributeError, TypeError):
        return  # whoever loads it says what is wrong
    for sign, kind in _FOREIGN.items():
        if sign in text.replace("_", "").replace("-", ""):
            raise CheckpointError(
                f"{folder / 'config.json'}: these are heads of {kind}, expected those of Medusa, "
                "EAGLE or block drafters, an assistant of Gemma 4, or a draft model; speclm does "
                "not load that kind from a folder of its own, choose other heads, or pass "
                "heads='mtp' if the base's own files have MTP layers"
            )


def _find_on_hub(repository: str, hub: HubOptions) -> tuple[Method, Path]:
    _require_repository(repository)
    methods = registered_methods()
    patterns = (*_HINTS, *(hint for method in methods.values() for hint in method.hints))
    hints = _download(repository, replace(hub, force_download=False), patterns)
    for method in methods.values():
        if not method.is_likely(hints):
            continue
        folder = _download(repository, hub, _HEAD_FILES)
        source = method.find_weights(folder)
        if source is None or not all(file.exists() for file in source.files.values()):
            folder = _download(repository, hub, (*_HEAD_FILES, *_PICKLES))
        if method.find_weights(folder) is not None:
            if method.extras:  # later, because a pickle without others would count as weights
                folder = _download(repository, hub, method.extras)
            return method, folder
    _require_known(hints)
    return methods[_FALLBACK], hints


def _download(repository: str, hub: HubOptions, patterns: tuple[str, ...]) -> Path:
    try:
        return download(repository, hub, patterns)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"heads {repository!r} is not a registered proposer nor a folder, and {error}; "
            f"registered are {heads_names()!r}"
        ) from error.__cause__


def _require_repository(name: str) -> None:
    """Check a name without asking the hub, which is slow to answer no.

    Raises:
        UnknownNameError: If it is not a hub id, is a kind of heads, or is almost a registered name.
    """
    registered = heads_names()
    known = f"registered are {registered!r}"
    if not is_hub_id(name):
        raise UnknownNameError(
            f"heads {shown(name)} is not a registered proposer, nor a folder that exists, nor a "
            f"hub id such as 'org/name'; {known}"
        )
    if "/" in name:
        return
    methods = registered_methods().values()
    kinds = ["base", *(kind for method in methods for kind in (method.name, *method.aliases))]
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
