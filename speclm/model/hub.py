"""Where heads and draft models lie: in a folder, or in a repository on the hub."""

import difflib
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from speclm.drafting.registry import registered_proposers
from speclm.errors import OptionError, UnknownNameError, reason_of, shown
from speclm.files.atomic import read_json
from speclm.methods.eagle.checkpoint import find_eagle
from speclm.methods.medusa.checkpoint import find_medusa

# What shows whether a repository holds heads, and what heads consist of: no code is downloaded.
_HINTS = ("config.json", "*.index.json", "medusa_lm_head.*")
_HEAD_FILES = ("*.json", "*.safetensors")
_PICKLES = ("*.pt", "pytorch_model*.bin")
# What a training leaves next to heads; its checkpoints are folders.
_LEFTOVERS = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*", "trainer_state*"),
    *("*optim_states*", "*model_states*", "*/*"),
)
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_MAX_NAME = 96  # characters; the hub has none longer
_KINDS = ("base", "draft", "draft_model", "medusa", "eagle", "eagle2", "eagle3")
_SIMILAR = 0.75  # above which a name without an organisation is taken for a typo

_TYPES: dict[str, Any] = {
    "revision": str | None,
    "token": str | bool | None,
    "cache_dir": str | Path | None,
    "subfolder": str,
    "local_files_only": bool,
    "force_download": bool,
}

Kind = Literal["medusa", "eagle", "draft model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Which files of a repository are taken, and how; the names are those of Transformers.

    Args:
        revision: Branch, tag or commit; None for the main branch.
        token: Access token; True for the one that is logged in with, False for none.
        cache_dir: Where downloads are kept; None for the usual folder.
        subfolder: Folder inside the repository or folder.
        local_files_only: Whether nothing is downloaded.
        force_download: Whether files are downloaded that are in the cache already.

    Raises:
        OptionError: If the subfolder is outside of the repository.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    subfolder: str = ""
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        parts = Path(self.subfolder).parts
        if ".." in parts or Path(self.subfolder).is_absolute():
            raise OptionError(
                f"subfolder in heads_kwargs is {self.subfolder!r}, expected a folder inside the "
                "repository; correct it"
            )
        object.__setattr__(self, "subfolder", "/".join(parts))

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Return the options of this class, and the others.

        Raises:
            OptionError: If one is of another type.
        """
        mine = {name: value for name, value in options.items() if name in _TYPES}
        for name, value in mine.items():
            if not isinstance(value, _TYPES[name]):
                raise OptionError(
                    f"{name} in heads_kwargs is a {type(value).__name__}, expected "
                    f"{_TYPES[name]}; correct it"
                )
        return cls(**mine), {name: v for name, v in options.items() if name not in mine}

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not the defaults, for ``from_pretrained``."""
        found = {option.name: getattr(self, option.name) for option in fields(self)}
        default = {option.name: option.default for option in fields(self)}
        return {name: value for name, value in found.items() if value != default[name]}


def with_base_options(
    heads_kwargs: Any, kwargs: Mapping[str, Any], *, heads: Any, base: str | Path
) -> Any:
    """Return `heads_kwargs`, with the base's options of the hub where both are one repository.

    Args:
        heads_kwargs: As the user gave them; they go before the base's.
        kwargs: Arguments of the base's ``from_pretrained``.
        heads: As the user gave them.
        base: Folder or hub id of the base.
    """
    is_same = isinstance(heads, str | Path) and str(heads) == str(base) and not _is_there(base)
    if not is_same or not isinstance(heads_kwargs, dict | None):
        return heads_kwargs
    return {**{name: kwargs[name] for name in _TYPES if name in kwargs}, **(heads_kwargs or {})}


def find_heads(heads: str | Path, hub: HubOptions) -> tuple[Kind, Path]:
    """Return what a name stands for, and its folder, downloaded if need be.

    Of a draft model only the small files are downloaded.

    Raises:
        UnknownNameError: If it is no folder and cannot be had from the hub; the message says why.
        OptionError: If it is a folder and options are given that only a repository has.
        CheckpointError: If a file that would have to be looked into cannot be read.
    """
    if not _is_there(heads):
        return _find_on_hub(str(heads), hub)
    unused = sorted(hub.given.keys() & {"revision", "force_download"})
    if unused:
        raise OptionError(
            f"heads {str(heads)!r} is a folder and {unused!r} in heads_kwargs would have no "
            "effect; leave them out, or pass a hub id"
        )
    folder = Path(heads) / hub.subfolder
    if not folder.is_dir():
        raise UnknownNameError(
            f"heads {str(heads)!r} has no subfolder {hub.subfolder!r}, expected that of heads or a "
            "draft model; correct subfolder in heads_kwargs"
            if hub.subfolder
            else f"heads {str(heads)!r} is a file, expected a folder, hub id or registered name; "
            "pass the folder that it lies in"
        )
    if folder.is_dir() and find_medusa(folder):
        return "medusa", folder
    # A config may say that its weights are EAGLE heads though they are damaged.
    if _is_named_eagle(folder / "config.json") or (folder.is_dir() and find_eagle(folder)):
        return "eagle", folder
    return "draft model", folder


def _find_on_hub(repository: str, hub: HubOptions) -> tuple[Kind, Path]:
    _require_repository(repository)
    hints = _download(repository, replace(hub, force_download=False), _HINTS)
    kinds: list[tuple[Kind, bool, Any]] = [
        ("medusa", _looks_like_medusa(hints), find_medusa),
        ("eagle", _looks_like_eagle(hints / "config.json"), find_eagle),
    ]
    for kind, is_likely, find in kinds:
        if not is_likely:
            continue
        folder = _download(repository, hub, _HEAD_FILES)
        source = find(folder)
        if source is None or not all(file.exists() for file in source.files.values()):
            folder = _download(repository, hub, (*_HEAD_FILES, *_PICKLES))
        if find(folder):
            return kind, folder
    return "draft model", hints


def _is_there(heads: str | Path) -> bool:
    try:
        return Path(heads).exists()
    except OSError:  # such as a name that is too long
        return False


def _require_repository(name: str) -> None:
    """Check a name without asking the hub, which takes long to say no.

    Raises:
        UnknownNameError: If it is no hub id, a kind of heads, or nearly a registered name.
    """
    registered = sorted(registered_proposers())
    known = f"registered are {registered!r}"
    is_long = len(name) > _MAX_NAME
    if is_long or not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise UnknownNameError(
            f"heads {shown(name)} is not a registered proposer, nor a folder that exists, nor a "
            f"hub id such as 'org/name'; {known}"
        )
    if "/" in name:
        return
    if name in _KINDS:
        raise UnknownNameError(
            f"heads {name!r} is a kind of heads, expected the folder or hub id of some; those that "
            f"are bundled for the bundled base are in speclm.demo.assets(); {known}"
        )
    near = difflib.get_close_matches(name, registered, n=1)
    near = near or difflib.get_close_matches(name, _KINDS, n=1, cutoff=_SIMILAR)
    if near:
        raise UnknownNameError(
            f"heads {name!r} is not a registered proposer nor a folder; did you mean {near[0]!r}? "
            f"{known}"
        )


def _download(repository: str, hub: HubOptions, patterns: tuple[str, ...]) -> Path:
    prefix = f"{glob.escape(hub.subfolder)}/" if hub.subfolder else ""
    options = {name: value for name, value in hub.given.items() if name != "subfolder"}
    try:
        root = snapshot_download(
            repository,
            allow_patterns=[prefix + pattern for pattern in patterns],
            ignore_patterns=[prefix + pattern for pattern in _LEFTOVERS],
            **options,
        )
    except Exception as error:
        raise UnknownNameError(
            f"heads {repository!r} is not a registered proposer nor a folder, and "
            f"{_explain(error, repository, hub)}; registered are {sorted(registered_proposers())!r}"
        ) from error
    return Path(root, hub.subfolder)


def _explain(error: Exception, repository: str, hub: HubOptions) -> str:
    """Say which of the usual reasons it was, and what to do."""
    revision = hub.revision or "main"
    match error:
        case GatedRepoError():
            return (
                f"access to {repository!r} on the hub is restricted: accept its terms there, and "
                "log in or pass heads_kwargs={'token': ...}"
            )
        case RepositoryNotFoundError():
            return (
                f"the hub has no repository {repository!r}, or a private one: check the spelling, "
                "and for a private one log in or pass heads_kwargs={'token': ...}"
            )
        case RevisionNotFoundError():
            return f"{repository!r} on the hub has no revision {revision!r}: choose another"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"the hub denies access to {repository!r} ({reason_of(error)}): log in, or pass "
                "another heads_kwargs={'token': ...}"
            )
        case LocalEntryNotFoundError() if hub.local_files_only or constants.HF_HUB_OFFLINE:
            return (
                f"revision {revision!r} of {repository!r} is not in the cache in "
                f"{str(hub.cache_dir or constants.HF_HUB_CACHE)!r}, while local_files_only or "
                "HF_HUB_OFFLINE forbids to download it: allow it, or name the right cache_dir"
            )
        case LocalEntryNotFoundError():
            return (
                f"the hub cannot be reached for {repository!r} ({reason_of(error)}), which is not "
                "in the cache: check the network"
            )
        case _:
            return f"{repository!r} cannot be had from the hub ({reason_of(error)})"


def _looks_like_medusa(folder: Path) -> bool:
    """Return whether a repository holds Medusa heads, from its small files and their names."""
    return (
        any(folder.glob("medusa_lm_head.*"))
        or '"medusa' in _text(folder / "config.json")
        or any('"medusa_head' in _text(index) for index in folder.glob("*.index.json"))
    )


def _looks_like_eagle(config: Path) -> bool:
    """Return whether a repository may hold EAGLE heads, from its config.

    The first heads were published with the config of a Llama of one layer, and nothing else.
    """
    text = _text(config)
    return "eagle" in text.lower() or re.search(r'"num_hidden_layers": *1\b', text) is not None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_named_eagle(config: Path) -> bool:
    """Return whether a config says that its weights are EAGLE heads, not that they may be."""
    try:
        found = read_json(config)
        return any("eagle" in name.lower() for name in found["architectures"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
