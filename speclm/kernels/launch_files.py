"""Files of launch sizes, in JSON: rows that go before those of our table.

A file holds a list of rows for each architecture; a row has the fields of `LaunchRow` and of its
`LaunchConfig`, side by side::

    {"sm_90": [{"max_rows": 16, "max_key_bytes": 256, "is_float32": false, "block_rows": 16,
                "block_keys": 64, "num_warps": 4, "num_stages": 4, "programs": 2, "min_tiles": 2,
                "fixed_tiles": 16}]}
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from speclm.errors import KernelError
from speclm.files.atomic import read_json, write_json
from speclm.kernels.launch_table import LaunchConfig, LaunchRow, LaunchTable

VARIABLE = "SPECLM_KERNEL_CONFIGS"
"""Environment variable that names a file of rows."""

_ARCHITECTURE = re.compile(r"sm_\d+|gfx[0-9a-f]+|interpreter")
_SIZES = tuple(field.name for field in fields(LaunchConfig))
_LIMITS = ("max_rows", "max_key_bytes")
_FIELDS = (*_LIMITS, "is_float32", *_SIZES)


@cache
def read_table_once(path: str) -> LaunchTable:
    """Read a file of rows, as `read_table` does; later changes of it are not seen."""
    return read_table(path)


def read_table(path: str) -> LaunchTable:
    """Read a file of rows.

    Raises:
        KernelError: If the file is not there, or a row cannot be launched with.
    """
    try:
        found = read_json(Path(path))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be read ({error.strerror or error}); correct or unset {VARIABLE}"
        ) from error
    except ValueError as error:
        raise KernelError(
            f"{path} is not JSON ({error}); write it anew with speclm.kernels.tuning"
        ) from error
    if not isinstance(found, dict):
        raise KernelError(
            f"{path} holds a {type(found).__name__}, expected an object of rows by architecture"
        )
    return {name: _rows(path, name, rows) for name, rows in found.items()}


def write_table(path: Path, table: LaunchTable) -> None:
    """Write rows to a file that `read_table` reads; whoever reads it sees all of them or none."""
    lines = {name: [_fields(row) for row in rows] for name, rows in sorted(table.items())}
    write_json(path, lines)


def _rows(path: str, architecture: str, rows: Any) -> tuple[LaunchRow, ...]:
    if _ARCHITECTURE.fullmatch(architecture) is None:
        raise KernelError(
            f'{path} has rows for {architecture!r}, expected an architecture such as "sm_90" or '
            '"gfx942"; correct the name'
        )
    if not isinstance(rows, list):
        raise KernelError(
            f"{path} holds a {type(rows).__name__} for {architecture}, expected a list of rows"
        )
    return tuple(
        _row(f"{path}: row {index} of {architecture}", row) for index, row in enumerate(rows)
    )


def _row(where: str, row: Any) -> LaunchRow:
    if not isinstance(row, dict) or sorted(row) != sorted(_FIELDS):
        names = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise KernelError(f"{where} has {names!r}, expected the fields {sorted(_FIELDS)!r}")
    for name in (*_LIMITS, *_SIZES):
        is_open = name in _LIMITS and row[name] is None
        if not is_open and type(row[name]) is not int:
            raise KernelError(f"{where}: {name} is {row[name]!r}, expected a whole number")
    if type(row["is_float32"]) is not bool:
        raise KernelError(f"{where}: is_float32 is {row['is_float32']!r}, expected true or false")
    try:
        config = LaunchConfig(**{name: row[name] for name in _SIZES})
    except KernelError as error:
        raise KernelError(f"{where}: {error}") from error
    limits = {name: row[name] for name in _LIMITS}
    return LaunchRow(config, **limits, is_float32=row["is_float32"])


def _fields(row: LaunchRow) -> Mapping[str, int | None]:
    limits = {name: getattr(row, name) for name in (*_LIMITS, "is_float32")}
    return limits | asdict(row.config)
