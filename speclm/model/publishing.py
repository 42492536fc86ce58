"""Publish heads or a trained draft model on the hub: checked files, a card, charts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speclm.cards import CHARTS, GENERATED_MARK, REPORT_NAME, HeadsCard
from speclm.drafting.heads_folder import CARD_NAME, CONFIG_NAME, read_choices
from speclm.errors import CheckpointError, DataError, OptionError, shown
from speclm.files.atomic import read_json
from speclm.files.hub import UploadOptions, fetch_existing, is_hub_id, upload
from speclm.files.weights import read_text, weights_digest
from speclm.methods.finding import find_heads
from speclm.methods.registry import Method
from speclm.training.history import CURVES_NAME, HISTORY_NAME, read_history

REPORT_FOLDER = "report"
"""Folder of a report inside a folder of heads, and of its charts in a repository."""

# What a training that changes the base too writes next to the heads.
_TUNED = {
    "adapter/adapter_config.json": (
        "an adapter of the base",
        "merge the adapter into the base and ",
    ),
    "base/config.json": ("a tuned base", ""),
}
_SAFE = ".safetensors"
_TIMES = ("latency", "plain_latency")


@dataclass(frozen=True, slots=True)
class Publication:
    """What is uploaded for a folder of heads.

    Args:
        repository: Hub id.
        method: Method of the heads.
        files: Path or content of each file, by its name in the repository.
        is_own_card: Whether the card is one that a user has written.
    """

    repository: str
    method: Method
    files: Mapping[str, Path | bytes]
    is_own_card: bool

    @property
    def card(self) -> str:
        """Text of the card."""
        return self._content(CARD_NAME).decode("utf-8", errors="replace")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def _content(self, name: str) -> bytes:
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()


def prepare_publication(
    folder: str | Path,
    repository: str,
    *,
    base: str | None = None,
    report: str | Path | None = None,
) -> Publication:
    """Check a folder of heads by reading them completely, and collect what is uploaded.

    These are the config, the weights, the card, the curves of the training and the charts of a
    report, and of a draft model its tokenizer; nothing else of the folder.

    Args:
        folder: Folder of heads or of a draft model, as a training or ``save_pretrained`` writes it.
        repository: Hub id of the repository.
        base: Hub id of the base model, for heads that do not record it.
        report: Folder of a report of ``speclm bench --report``; by default `REPORT_FOLDER` inside
            the heads' folder, if there is one.

    Raises:
        OptionError: If the repository or the base has an impossible name, the heads record
            another base, the folder has no heads, or the report is of other heads.
        CheckpointError: If the heads or the history of the training are damaged, or the weights
            are pickled.
        DataError: If the report cannot be read.
    """
    for option, name in (("repository", repository), ("base", base)):
        if name is not None and not (is_hub_id(name) and "/" in name):
            raise OptionError(
                f"{option} is {shown(name)}, expected a hub id such as 'org/name'; correct it"
            )
    folder = Path(folder)
    if not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is no folder, expected one of heads; correct the path")
    method = find_heads(folder).method
    files = _weights(folder, method)
    card = replace(method.card(folder), repo_id=repository)
    if base is not None and card.base not in {None, base}:
        raise OptionError(
            f"base is {base!r}, and the heads in {str(folder)!r} record {card.base!r}; leave it out"
        )
    digest = weights_digest(folder)
    card, figures = _with_history(folder, files, replace(card, base=card.base or base), digest)
    figures |= _calibration(folder)
    found = folder / REPORT_FOLDER if report is None else Path(report)
    if report is not None or (found / REPORT_NAME).is_file():
        figures |= _read_report(found, drafting_digest(folder))
        charts = {name: f"{REPORT_FOLDER}/{file}" for name, file in CHARTS.items()}
        files |= {charts[name]: found / file for name, file in CHARTS.items()}
        card = replace(card, charts=charts)
    return _with_card(folder, repository, method, files, replace(card, figures=figures))


def drafting_digest(folder: Path) -> str | None:
    """Return a hash of how heads in a folder draft: weights, and the stored tree if there is one.

    Returns:
        None without weights in safetensors.
    """
    digest, path = weights_digest(folder), folder / CONFIG_NAME
    choices = read_choices(folder, read_json(path)) if path.is_file() else None
    if digest is None or choices is None:
        return digest
    return hashlib.sha256(f"{digest} {choices}".encode()).hexdigest()


def publish(publication: Publication, options: UploadOptions) -> str:
    """Upload a publication in one commit, and return the address of it or of the pull request.

    A card that a user has changed in the repository is kept.

    Raises:
        OptionError: If the repository holds another model.
        UploadError: If the upload fails; the message says what to do.
    """
    name, method, files = publication.repository, publication.method, dict(publication.files)
    existing = fetch_existing(name, options, (CARD_NAME, CONFIG_NAME, "*.index.json"))
    if existing is not None:
        if (existing / CONFIG_NAME).is_file() and not method.is_likely(existing):
            raise OptionError(
                f"{name!r} on the hub holds another model than heads of {method.name}; choose "
                "another repository, or a branch with --revision"
            )
        theirs = read_text(existing / CARD_NAME)
        if theirs and GENERATED_MARK not in theirs and not publication.is_own_card:
            del files[CARD_NAME]
    return upload(name, files, options)


def _weights(folder: Path, method: Method) -> dict[str, Any]:
    """Return config and weight files by name."""
    source = method.find_weights(folder)
    if source is None:
        raise OptionError(
            f"{str(folder)!r} holds no heads and no draft model that was trained here, expected "
            "the folder of speclm train or save_pretrained; upload another model with: hf upload"
        )
    for name, (found, remedy) in _TUNED.items():
        if (folder / name).is_file():
            raise OptionError(
                f"{folder / name}: found {found}, which the heads draft for, expected heads for "
                f"the base as it is; {remedy}upload both together with: hf upload"
            )
    paths = {source.path, *source.files.values()}
    pickled = sorted(path.name for path in source.files.values() if path.suffix != _SAFE)
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: found pickled weights, expected safetensors, because pickles "
            "can run code; load the heads and write them anew with save_pretrained"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder}: found no {CONFIG_NAME}, expected one next to the weights; load the heads "
            "and write them anew with save_pretrained"
        )
    paths |= {folder / CONFIG_NAME, *method.companions(folder)}
    return {path.name: path for path in sorted(paths)}


def _with_history(
    folder: Path, files: dict[str, Any], card: HeadsCard, digest: str | None
) -> tuple[HeadsCard, dict[str, str]]:
    """Add recipe and curves of the training that wrote the heads; return its figures too.

    Raises:
        CheckpointError: If the history is damaged, or of other heads.
    """
    history = read_history(folder)
    if history is None:
        return card, {}
    if history.weights != digest:
        raise CheckpointError(
            f"{folder / HISTORY_NAME}: the history is of other weights than those in the folder, "
            f"expected that of their training; remove it and {CURVES_NAME}"
        )
    card = replace(card, recipe=history.facts, base=card.base or history.base)
    if (folder / CURVES_NAME).is_file():
        files[CURVES_NAME] = folder / CURVES_NAME
        card = replace(card, curves=CURVES_NAME)
    estimates = history.estimated_tau.items()
    return card, {f"estimated tau, {kind}": f"{tau:.2f}" for kind, tau in estimates}


def _with_card(
    folder: Path, repository: str, method: Method, files: dict[str, Any], card: HeadsCard
) -> Publication:
    """Add the card, or that of the folder if a user has written it."""
    own = read_text(folder / CARD_NAME)
    is_own = bool(own) and GENERATED_MARK not in own
    files[CARD_NAME] = folder / CARD_NAME if is_own else card.render().encode()
    return Publication(repository, method, dict(sorted(files.items())), is_own)


def _calibration(folder: Path) -> dict[str, str]:
    """Return the tau of the stored tree and of the trees without it, as speclm tune found them."""
    own = read_json(folder / CONFIG_NAME).get("speclm") or {}
    match own.get("calibration"):
        case {"tau": float(tau), "default_tau": float(default), "setting": str(setting)}:
            return {
                f"tau of the stored tree, {setting}": f"{tau:.2f}, as decoded when it was chosen",
                f"tau of the default trees, {setting}": f"{default:.2f}, on the same prompts",
            }
    return {}


def _read_report(folder: Path, digest: str | None) -> dict[str, str]:
    """Return the figures of a report, without dates and paths."""
    path = folder / REPORT_NAME
    try:
        report = read_json(path)
        records = report["records"]
        whole = [record for record in records if "category" not in record["settings"]]
        found = [record for record in whole if record["settings"]["method"] == "speclm"]
        figures = [figure for record in found for figure in _figures(record).items()]
        measured = {record["settings"].get("heads_sha256") for record in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read as a report ({type(error).__name__}: {error}), expected one "
            "of speclm bench --report; write it again"
        ) from error
    if measured != {digest}:
        raise OptionError(
            f"{path}: the report is of other heads, or of these before they were trained or tuned "
            "again; measure the heads with speclm bench --heads FOLDER --report FOLDER/report"
        )
    missing = [file for file in CHARTS.values() if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder / missing[0]}: found no chart; write the report again")
    return dict(figures)


def _figures(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what a record says about heads, by the settings that it was measured with."""
    settings, machine = record["settings"], record["machine"]
    device = ", ".join(machine["gpus"]) if settings["device"] != "cpu" else machine["cpu"]
    where = f"{settings['setting']}, batch {settings['batch']}"
    fixed = (
        f"{settings['num_prompts']} prompts of {settings['prompts']}, at most "
        f"{settings['max_new_tokens']} new tokens, {settings['dtype']}, {device}"
    )
    times = [1e3 * record[name][part] for name in _TIMES for part in ("mean", "p90")]
    spread = f"{record['lower_quartile']:.2f} to {record['upper_quartile']:.2f}"
    return {
        "measured on": fixed,
        f"tau as decoded, {where}": f"{record['tau']:.2f}",
        f"speed-up, {where}": f"{record['median']:.2f} (quartiles {spread})",
        f"ms of a call, {where}": f"mean {times[0]:.0f}, P90 {times[1]:.0f}; regular generation "
        f"mean {times[2]:.0f}, P90 {times[3]:.0f}",
        f"same tokens as regular generation, {where}": f"{record['num_identical']} of "
        f"{record['n']} calls",
    }
