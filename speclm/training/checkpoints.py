"""Finds the checkpoint from which a training that was killed goes on."""

import json
import logging
import re
from pathlib import Path

_log = logging.getLogger("speclm")

_FOLDER = re.compile(r"checkpoint-(\d+)")
_WRITTEN_LAST = "trainer_state.json"


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


def _is_complete(path: Path, step: int) -> bool:
    try:
        state = json.loads((path / _WRITTEN_LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step
