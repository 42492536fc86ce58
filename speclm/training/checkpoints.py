"""Finds and reads the checkpoint from which a training that was killed goes on."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from speclm.errors import CheckpointError, SpeclmError, reason_of, shown
from speclm.files.atomic import read_json

_log = logging.getLogger("speclm")

_FOLDER = re.compile(r"checkpoint-(\d+)")
_WRITTEN_LAST = "trainer_state.json"
_MOST_STEPS = 2**31 - 1


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; None if there is none.

    `Trainer` writes its state after everything else, so a checkpoint whose state is missing, cut
    off or of another step was being written when the process ended. It is passed over with a log
    line.

    Args:
        folder: The output folder of the training.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := _FOLDER.fullmatch(path.name))
    }
    for step in sorted(found, reverse=True):
        if _is_complete(found[step], step):
            return found[step]
        _log.warning("%s was not written to its end; going on from an older one", found[step])
    return None


@contextmanager
def reading_checkpoint(folder: str | Path) -> Iterator[None]:
    """Turn what Python raises while `Trainer` reads a checkpoint into a `CheckpointError`."""
    try:
        yield
    except (SpeclmError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be read ({reason_of(error)}), expected one as the "
            "training wrote it; resume from an older one, or begin anew"
        ) from error


def require_state(folder: str | Path) -> None:
    """Check that the state of a checkpoint can be gone on from.

    Raises:
        CheckpointError: If it is not there, or says something else than a training writes.
    """
    path = Path(folder) / _WRITTEN_LAST
    with reading_checkpoint(folder):
        state: Any = TrainerState(**read_json(path))
    is_usable = (
        type(state.global_step) is int
        and 0 <= state.global_step <= _MOST_STEPS
        and isinstance(state.best_model_checkpoint, str | None)
        and isinstance(state.stateful_callbacks, dict)
    )
    if not is_usable:
        raise CheckpointError(
            f"{path}: global_step is {shown(state.global_step)} and best_model_checkpoint "
            f"{shown(state.best_model_checkpoint)}, expected a number of steps and a folder or "
            "null; resume from an older checkpoint"
        )


def _is_complete(path: Path, step: int) -> bool:
    try:
        state = read_json(path / _WRITTEN_LAST)
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step
