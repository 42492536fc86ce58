"""Download parts of repositories from the hub, upload files, and explain failures."""

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from speclm.errors import OptionError, UnknownNameError, UploadError, reason_of

# Files that a training leaves next to heads; its checkpoints are folders.
_LEFTOVERS = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*", "trainer_state*"),
    *("*optim_states*", "*model_states*", "*/*"),
)
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_MAX_NAME = 96  # characters; the hub has no longer names

_COMMIT = re.compile("[0-9a-f]{40}")
_OF_USERS = ("token", "cache_dir", "local_files_only", "force_download")

_TYPES: dict[str, Any] = {
    "revision": str | None,
    "token": str | bool | None,
    "cache_dir": str | Path | None,
    "subfolder": str,
    "local_files_only": bool,
    "force_download": bool,
}

HUB_OPTIONS = frozenset(_TYPES)
"""Names of the fields of `HubOptions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Options for files of a repository, under the names that Transformers uses.

    Args:
        revision: Branch, tag or commit; None for the main branch.
        token: Access token; True for the stored one, False for none.
        cache_dir: Where downloads are kept; None for the usual folder.
        subfolder: Folder inside the repository or folder.
        local_files_only: Whether to use the cache only.
        force_download: Whether to download files again that are in the cache.

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
            OptionError: If one has the wrong type.
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
        """The options that differ from the defaults, for ``from_pretrained``."""
        found = {option.name: getattr(self, option.name) for option in fields(self)}
        default = {option.name: option.default for option in fields(self)}
        return {name: value for name, value in found.items() if value != default[name]}


def with_base_options(
    heads_kwargs: Any,
    kwargs: Mapping[str, Any],
    *,
    heads: Any,
    base: Any,
    are_of_base: bool = False,
) -> Any:
    """Add the base's hub options to those of heads on the hub.

    Token and cache are the user's, so they hold for both; revision and subfolder are those of one
    repository, so they hold for heads in the base's own repository only.

    Args:
        heads_kwargs: Options as the user gave them; they take precedence.
        kwargs: Arguments of the base's ``from_pretrained``.
        heads: Heads as the user gave them.
        base: Base as the user gave it.
        are_of_base: Whether the heads are part of the base's own files.
    """
    are_names = isinstance(heads, str | Path) and isinstance(base, str | Path)
    is_on_hub = are_names and is_hub_id(str(heads)) and "/" in str(heads) and not path_exists(heads)
    if not (is_on_hub or are_of_base) or not isinstance(heads_kwargs, dict | None):
        return heads_kwargs
    names = _TYPES.keys() if are_of_base or str(heads) == str(base) else _OF_USERS
    return {**{name: kwargs[name] for name in names if name in kwargs}, **(heads_kwargs or {})}


def with_named_options(heads_kwargs: Any, named: Mapping[str, Any]) -> Any:
    """Add arguments ``heads_...`` that are not None to the options that they stand for.

    Args:
        heads_kwargs: Options as the user gave them.
        named: Values by the names of the options.

    Raises:
        OptionError: If an option is given twice.
    """
    given = {name: value for name, value in named.items() if value is not None}
    if not given or not isinstance(heads_kwargs, dict | None):
        return heads_kwargs
    others = heads_kwargs or {}
    for name in given.keys() & others.keys():
        raise OptionError(
            f"heads_{name} is {given[name]!r} and {name} in heads_kwargs is {others[name]!r}, "
            "expected one of them; leave the other out"
        )
    return {**others, **given}


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder in the hub's cache is of; None for any other folder."""
    parts = folder.parts
    return next(
        (
            after
            for part, after in pairwise(parts)
            if part == "snapshots" and _COMMIT.fullmatch(after)
        ),
        None,
    )


def cached_commit(name: object, options: Mapping[str, Any]) -> str | None:
    """Return the commit of a model that was just loaded from the hub by its name; None otherwise.

    Args:
        name: What it was loaded from.
        options: Arguments of its ``from_pretrained``.
    """
    if not isinstance(name, str) or path_exists(name) or not is_hub_id(name):
        return None
    known = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
    path = "/".join(filter(None, (options.get("subfolder"), "config.json")))
    found = try_to_load_from_cache(name, path, **known)
    return commit_of(Path(found)) if isinstance(found, str) else None


def path_exists(name: str | Path) -> bool:
    """Return whether a file or folder of that name exists; a name may have any length, also 0."""
    try:
        return name != "" and Path(name).exists()
    except OSError:
        return False


def is_hub_id(name: str) -> bool:
    """Return whether a name is a possible repository on the hub, without asking the hub."""
    has_form = len(name) <= _MAX_NAME and _REPOSITORY.fullmatch(name) is not None
    return has_form and ".." not in name and "--" not in name


def download(repository: str, hub: HubOptions, patterns: tuple[str, ...]) -> Path:
    """Download files of a repository, and return their folder.

    Args:
        repository: Hub id.
        hub: Revision, subfolder and other options.
        patterns: Patterns of file names; leftovers of a training are skipped.

    Raises:
        UnknownNameError: If the download fails; the message explains the usual causes.
    """
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
        raise UnknownNameError(_explain(error, repository, hub)) from error
    return Path(root, hub.subfolder)


def _explain(error: Exception, repository: str, hub: HubOptions) -> str:
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
                "HF_HUB_OFFLINE forbids downloads: allow them, or name the right cache_dir"
            )
        case LocalEntryNotFoundError():
            return (
                f"the hub cannot be reached for {repository!r} ({reason_of(error)}), which is not "
                "in the cache: check the network"
            )
        case _:
            return f"{repository!r} cannot be downloaded from the hub ({reason_of(error)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadOptions:
    """How files are uploaded.

    Args:
        message: Summary of the commit.
        private: Whether a new repository is private; None for the account's default.
        revision: Branch, made if it does not exist; None for the main branch.
        create_pr: Whether to open a pull request in place of a commit on the branch.
        token: Access token; None for the stored one.
    """

    message: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | None = field(default=None, repr=False)


def fetch_existing(
    repository: str, options: UploadOptions, patterns: tuple[str, ...]
) -> Path | None:
    """Return a folder with some files of a repository before an upload; None if it is new.

    Raises:
        UploadError: If the hub denies access or cannot be reached.
    """
    hub = HubOptions(revision=options.revision, token=options.token)
    try:
        return download(repository, hub, patterns)
    except UnknownNameError as error:
        cause: Any = error.__cause__
        is_gated = isinstance(cause, GatedRepoError)
        if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError) and not is_gated:
            return None
        raise UploadError(_explain_upload(cause, repository)) from cause


def upload(repository: str, files: Mapping[str, Path | bytes], options: UploadOptions) -> str:
    """Upload files in one commit; make the repository and the branch if they do not exist.

    Args:
        repository: Hub id.
        files: Path or content of each file, by its name in the repository.
        options: How they are uploaded.

    Returns:
        The address of the commit or the pull request.

    Raises:
        UploadError: If the upload fails, and no commit was made; the message says what to do.
    """
    api = HfApi(token=options.token)
    try:
        made = api.create_repo(repository, private=options.private, exist_ok=True).repo_id
        if options.revision is not None and not options.create_pr:
            _make_branch(api, made, options.revision)
        commit = api.create_commit(
            made,
            [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in files.items()
            ],
            commit_message=options.message,
            revision=options.revision,
            create_pr=options.create_pr,
        )
    except Exception as error:
        raise UploadError(_explain_upload(error, repository)) from error
    return str(commit.pr_url or commit.commit_url)


def _make_branch(api: HfApi, repository: str, branch: str) -> None:
    try:
        api.repo_info(repository, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repository, branch=branch, exist_ok=True)


def _explain_upload(error: Exception, repository: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = reason_of(error)
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE forbids an upload to {repository!r}: unset it"
    match status:
        case 401:
            return (
                f"the hub does not know you ({reason}): run hf auth login, or set HF_TOKEN to an "
                "access token with the permission to write"
            )
        case 403:
            return (
                f"you may not write to {repository!r} on the hub ({reason}): name a repository of "
                "your own or of your organisation, use a token with the permission to write, or "
                "open a pull request with --create-pr"
            )
        case 404:
            return (
                f"the hub has no repository {repository!r} that you may see ({reason}): check the "
                "spelling, and log in with hf auth login"
            )
        case 409 | 412:
            return (
                f"{repository!r} on the hub has changed, or the name is taken ({reason}): try "
                "again, or choose another name"
            )
        case None:
            return (
                f"the upload to {repository!r} failed ({reason}): check the network and try again; "
                "no commit was made"
            )
        case _:
            return (
                f"the hub refuses the upload to {repository!r} ({reason}): correct what it names, "
                "or try again later; no commit was made"
            )
