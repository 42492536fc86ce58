"""What a training leaves next to its heads: its recipe, its log, and curves of the log."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speclm.drafting.heads_folder import hub_id
from speclm.errors import CheckpointError, reason_of, shown
from speclm.files.atomic import read_json, write_file, write_json
from speclm.files.weights import weights_digest
from speclm.plots import Line, Panel, draw_panels, has_plots
from speclm.target.loading import hub_commit

if TYPE_CHECKING:  # it imports Transformers' Trainer, which readers of a history do not need
    from transformers import PreTrainedModel

    from speclm.training.heads_trainer import HeadsTrainer

HISTORY_NAME = "training.json"
CURVES_NAME = "curves.png"

_log = logging.getLogger("speclm")

_KIND = "speclm training"
_EVALUATION, _TAU, _TOP1 = "eval_", "estimated_tau", "_top1"
_SUMMARY = "train_loss"  # in the last entry, which is in no checkpoint
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """A training: what it was given, and what it logged.

    Args:
        recipe: Name of the recipe, the command after ``speclm train``.
        options: Options of the recipe; None where a local path was given.
        version: Version of speclm.
        base: Hub id of the base; None for a local one.
        data: Number of examples under ``examples``, and the hash of their tokens and masks under
            ``sha256``; None where the data is a stream.
        weights: Hash of the files of the heads, see `weights_digest`.
        arguments: The training arguments that matter for the result.
        steps: Steps of the optimizer.
        log: What `Trainer` logged, in order.
        base_commit: Commit of the base on the hub, if it was loaded from there.
    """

    recipe: str
    options: Mapping[str, Any]
    version: str
    base: str | None
    data: Mapping[str, Any]
    weights: str
    arguments: Mapping[str, Any]
    steps: int
    log: Sequence[Mapping[str, Any]]
    base_commit: str | None = None

    @property
    def facts(self) -> dict[str, object]:
        """The recipe for a model card, by name."""
        given, found = self.arguments, self.data
        options = ", ".join(
            f"{name}={value}" for name, value in self.options.items() if value is not None
        )
        batch = [given.get(name) or 1 for name in _BATCH]
        facts = {
            "command": f"`speclm train {self.recipe}`, speclm {self.version}",
            "options": options or "the defaults",
            "commit of the base": self.base_commit,
            "examples": found.get("examples"),
            "SHA-256 of their tokens": found.get("sha256"),
            "steps": self.steps,
            "epochs": next((log["epoch"] for log in reversed(self.log) if "epoch" in log), None),
            "examples of a step": batch[0] * batch[1] * batch[2],
            "learning rate": f"{given.get('learning_rate')}, {given.get('lr_scheduler_type')}",
            "seed": given.get("seed"),
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def estimated_tau(self) -> dict[str, float]:
        """The last estimates of tau, by the data that they are for."""
        kinds = {"evaluation data": _EVALUATION + _TAU, "training data": _TAU}
        found = {
            kind: [log[name] for log in self.log if isinstance(log.get(name), float)]
            for kind, name in kinds.items()
        }
        return {kind: values[-1] for kind, values in found.items() if values}


def write_history(trainer: "HeadsTrainer", *, base: "PreTrainedModel", recipe: str) -> None:
    """Write `HISTORY_NAME` next to the heads, and `CURVES_NAME` if matplotlib is installed.

    Only the first of several processes writes.

    Args:
        trainer: A trainer that has trained, and written its heads.
        base: The model that the heads draft for; the path of a local one is not written.
        recipe: Name of the recipe.

    Raises:
        OSError: If a file cannot be written.
    """
    if not trainer.is_world_process_zero():
        return
    folder, record = Path(str(trainer.args.output_dir)), trainer.record()
    log = [
        {name: _plain(value) for name, value in entry.items()} for entry in _log_of(trainer, folder)
    ]
    write_json(
        folder / HISTORY_NAME,
        {
            "kind": _KIND,
            "recipe": recipe,
            "options": {name: _public(value) for name, value in record.options.items()},
            "version": record.version,
            "base": hub_id(base.config.name_or_path),
            "base_commit": hub_commit(base),
            "data": {"examples": record.num_examples, "sha256": record.data},
            "weights": weights_digest(folder),
            "arguments": record.arguments,
            "steps": trainer.state.global_step,
            "log": log,
        },
    )
    if has_plots():
        write_file(folder / CURVES_NAME, draw_curves(log))
    else:
        _log.info("no curves are drawn: matplotlib is not installed, the extra plots has it")


def read_history(folder: Path) -> TrainingHistory | None:
    """Return the history of the training that wrote the heads in a folder; None if none is there.

    Raises:
        CheckpointError: If the file is damaged or of another kind.
    """
    path = folder / HISTORY_NAME
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({reason_of(error)}), expected the history of a training; "
            "remove it, or train again"
        ) from error
    kinds: dict[str, type] = dict.fromkeys(("recipe", "version", "weights"), str)
    kinds |= {"steps": int, "log": list}
    kinds |= dict.fromkeys(("options", "data", "arguments"), dict)
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        raise CheckpointError(
            f"{path}: found {shown(found)}, expected the history that speclm train writes; remove "
            "the file, or train again"
        )
    named = {name: found.get(name) for name in kinds}
    wrong = [name for name, kind in kinds.items() if not isinstance(named[name], kind)]
    if not wrong and not all(isinstance(entry, dict) for entry in found["log"]):
        wrong = ["log"]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]!r} is {shown(found.get(wrong[0]))}, expected that of a history "
            "which speclm train writes; remove the file, or train again"
        )
    texts = {name: found.get(name) for name in ("base", "base_commit")}
    named |= {name: text if isinstance(text, str) else None for name, text in texts.items()}
    return TrainingHistory(**named)  # type: ignore[arg-type]  # checked above


def draw_curves(log: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the curves of a training as a PNG file: loss, accuracy and estimated tau by step.

    Figures of evaluations are dashed. The accuracies are those of evaluations, if there were
    several.

    Args:
        log: ``trainer.state.log_history``, or ``log_history`` of a ``trainer_state.json``.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    num_evaluations = sum(f"{_EVALUATION}loss" in entry for entry in log)
    prefix = _EVALUATION if num_evaluations > 1 else ""
    names = dict.fromkeys(
        name
        for entry in log
        for name in entry
        if name.endswith(_TOP1) and name.startswith(_EVALUATION) == bool(prefix)
    )
    accuracies = [
        Line(name.removeprefix(prefix).removesuffix(_TOP1), _points(log, name), bool(prefix))
        for name in names
    ]
    return draw_panels(
        [
            Panel("Loss", "step", _both(log, "loss")),
            Panel("Accuracy of the first candidate", "step", accuracies),
            Panel("Estimated tau", "step", _both(log, _TAU)),
        ]
    )


def _both(log: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
    """Return the lines of a figure in training and in evaluations, as far as they exist."""
    lines = [
        Line("training", _points(log, name)),
        Line("evaluation", _points(log, _EVALUATION + name), is_dashed=True),
    ]
    return [line for line in lines if line.points]


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(entry["step"]), entry[name])
        for entry in log
        if isinstance(entry.get(name), float) and isinstance(entry.get("step"), int)
    ]


def _log_of(trainer: "HeadsTrainer", folder: Path) -> list[Mapping[str, Any]]:
    """Return the log; a training that had ended before it was resumed keeps its last entry."""
    found: list[Mapping[str, Any]] = [*trainer.state.log_history]
    if trainer.has_new_steps:
        return found
    try:
        earlier = read_history(folder)
    except CheckpointError:  # it is written anew
        return found
    if earlier is None or earlier.steps != trainer.state.global_step:
        return found
    last = [entry for entry in earlier.log if _SUMMARY in entry]
    return [*(entry for entry in found if _SUMMARY not in entry), *last]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


def _public(value: Any) -> Any:
    """Return an option for others to read: a path of this machine is left out."""
    is_path = isinstance(value, str) and {*value} & {*"/\\"}
    return hub_id(value) if is_path else value
