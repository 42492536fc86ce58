"""Small files that several processes read and write."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_whole(path: Path, record: Any) -> None:
    """Write JSON so that readers see all of it or nothing.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
