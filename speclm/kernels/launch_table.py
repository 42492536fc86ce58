"""Launch sizes of tree attention by GPU, type, key width and rows: built-in table, and files.

A JSON file named by the environment variable ``SPECLM_KERNEL_CONFIGS`` precedes the table. It
holds a list of rows for each architecture; a row has the fields of `LaunchRow` and of its
`LaunchConfig`::

    {"sm_90": [{"max_rows": 16, "max_key_bytes": 256, "is_float32": false, "block_rows": 16,
                "block_keys": 64, "num_warps": 4, "num_stages": 4, "programs": 2, "min_tiles": 2,
                "fixed_tiles": 16}]}
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from speclm.errors import KernelError, shown
from speclm.files.atomic import read_json, write_json

VARIABLE = "SPECLM_KERNEL_CONFIGS"
"""Environment variable that names a file of rows."""

BLOCK_KEYS = (16, 32, 64)
"""Allowed numbers of keys per tile: the bits of a word cover them."""

_DEFAULT = "default"
_MAX = 2**16  # of numbers that only have to be positive
_FIXED_KEYS = 1024  # of a split in deterministic calls
_ARCHITECTURE = re.compile(r"sm_\d+|gfx[0-9a-f]+|interpreter")


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Sizes of one launch of tree attention.

    Args:
        block_rows: Rows (nodes with their heads) of a program; a power of two from 16.
        block_keys: Keys of a tile; 16, 32 or 64.
        num_warps: Warps of a program; a power of two.
        num_stages: Key tiles that are loaded ahead.
        programs: Programs that one multiprocessor runs at once; decides the number of splits.
        min_tiles: Minimum number of tiles of a split.
        fixed_tiles: Tiles of a split in deterministic calls.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs: int = 1
    min_tiles: int = 2
    fixed_tiles: int = 16

    def __post_init__(self) -> None:
        """Check the sizes, which may come from a file."""
        if self.block_keys not in BLOCK_KEYS:
            raise KernelError(f"block_keys is {self.block_keys!r}, expected one of {BLOCK_KEYS!r}")
        for name, least, most in (("block_rows", 16, 256), ("num_warps", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise KernelError(
                    f"{name} is {value!r}, expected a power of two from {least} to {most}"
                )
        for name in ("num_stages", "programs", "min_tiles", "fixed_tiles"):
            if not 1 <= getattr(self, name) <= _MAX:
                raise KernelError(
                    f"{name} is {getattr(self, name)!r}, expected at least 1 and at most {_MAX}"
                )


@dataclass(frozen=True, slots=True)
class CallSize:
    """Size of a call, by which launch sizes are looked up.

    Args:
        rows: Rows (nodes with their heads) of a call.
        key_bytes: Bytes of one key.
        is_float32: Whether keys are float32; else their type has two bytes.
    """

    rows: int
    key_bytes: int
    is_float32: bool


@dataclass(frozen=True, slots=True)
class LaunchRow:
    """A row of the table: sizes, and the calls that they are for.

    Args:
        config: The sizes.
        max_rows: Maximum rows (nodes with their heads) of a call; None for any number.
        max_key_bytes: Maximum bytes of one key; None for any number.
        is_float32: Whether it is for float32; else it is for types of two bytes.
    """

    config: LaunchConfig
    max_rows: int | None = None
    max_key_bytes: int | None = None
    is_float32: bool = False

    def takes(self, size: CallSize) -> bool:
        """Return whether the row is for calls of a size."""
        return (
            size.is_float32 == self.is_float32
            and (self.max_rows is None or size.rows <= self.max_rows)
            and (self.max_key_bytes is None or size.key_bytes <= self.max_key_bytes)
        )


LaunchTable = dict[str, tuple[LaunchRow, ...]]
"""Rows by architecture, such as ``"sm_90"``; the first that takes a call applies."""


def find_config(table: LaunchTable, architecture: str, size: CallSize) -> LaunchConfig | None:
    """Return the sizes for a call from the first row that takes it; None if no row does."""
    rows = table.get(architecture, ())
    return next((row.config for row in rows if row.takes(size)), None)


def built_in_rows(architecture: str) -> tuple[LaunchRow, ...]:
    """Return the built-in rows for a GPU; an unknown GPU gets rows that fit all known ones."""
    return TABLE.get(architecture, TABLE[_DEFAULT])


def built_in_config(architecture: str, size: CallSize) -> LaunchConfig:
    """Return the built-in sizes for a call."""
    return next(row.config for row in built_in_rows(architecture) if row.takes(size))


def _row(
    *limits: int | None, block: tuple[int, int], warps: int, stages: int, programs: int
) -> LaunchRow:
    """Return a row for types of two bytes, from its limits of rows and of bytes of a key."""
    max_rows, max_key_bytes = limits
    config = LaunchConfig(
        *block, warps, stages, programs=programs, fixed_tiles=_FIXED_KEYS // block[1]
    )
    return LaunchRow(config, max_rows, max_key_bytes)


# Float32 is multiplied without matrix units (except on AMD), and registers hold all operands.
_FLOAT32 = LaunchRow(
    LaunchConfig(32, 16, 8, 2, programs=2, fixed_tiles=_FIXED_KEYS // 16), is_float32=True
)

# Matrix instructions of warp groups take 64 rows; fewer rows are padded. A tile of rows reads all
# keys, so more than 128 rows read them again, from L2. Two programs of 64 rows share
# 228 KiB.
_HOPPER = (
    _row(16, 128, block=(16, 64), warps=4, stages=3, programs=3),
    _row(16, 160, block=(16, 32), warps=4, stages=4, programs=3),  # 80 is 64 + 16: 64 keys spill
    _row(16, 256, block=(16, 64), warps=4, stages=3, programs=3),
    _row(64, 256, block=(64, 64), warps=4, stages=3, programs=2),
    _row(None, 256, block=(128, 64), warps=8, stages=3, programs=1),
    _row(16, None, block=(16, 32), warps=4, stages=3, programs=2),
    _row(32, None, block=(32, 32), warps=4, stages=3, programs=2),
    _row(64, 384, block=(64, 32), warps=4, stages=3, programs=2),
    _row(64, None, block=(64, 32), warps=8, stages=3, programs=1),  # 4 warps spill
    _row(None, None, block=(128, 32), warps=8, stages=3, programs=1),
    _FLOAT32,
)

# Sums in tensor memory pass through registers: 128 rows of the widest heads spill with masks.
_BLACKWELL = (
    *_HOPPER[:-2],
    _row(None, 384, block=(128, 32), warps=8, stages=3, programs=1),
    _row(None, None, block=(64, 32), warps=8, stages=3, programs=1),
    _FLOAT32,
)

# Scores and queries are held in registers, of which 64 rows by 64 keys leave none for masks.
_AMPERE = (
    _row(16, 256, block=(16, 64), warps=4, stages=3, programs=2),
    _row(64, 256, block=(64, 32), warps=4, stages=3, programs=2),
    _row(None, 256, block=(128, 32), warps=8, stages=3, programs=1),
    _row(16, None, block=(16, 32), warps=4, stages=3, programs=2),
    _row(None, 384, block=(64, 16), warps=8, stages=4, programs=1),  # 32 keys spill
    _row(None, None, block=(64, 32), warps=8, stages=3, programs=1),  # 128 rows spill
    _FLOAT32,
)

# As above, with 99 KiB of shared memory.
_SMALL_MEMORY = (
    _row(16, 128, block=(16, 64), warps=4, stages=2, programs=2),
    _row(16, 160, block=(16, 32), warps=4, stages=3, programs=2),
    _row(16, 256, block=(16, 64), warps=4, stages=2, programs=2),
    _row(64, 256, block=(64, 32), warps=4, stages=2, programs=2),
    _row(None, 256, block=(128, 32), warps=8, stages=2, programs=1),
    _row(16, None, block=(16, 32), warps=4, stages=2, programs=2),
    _row(None, 384, block=(64, 16), warps=8, stages=3, programs=1),
    _row(None, None, block=(64, 32), warps=8, stages=2, programs=1),
    _FLOAT32,
)

# Up to 512 registers of 64 threads each, but 64 KiB of shared memory for all programs.
_AMD = (
    _row(16, 128, block=(16, 64), warps=4, stages=2, programs=2),
    _row(16, 160, block=(16, 32), warps=4, stages=2, programs=2),  # Triton 3.6 lacks 64 keys
    _row(16, 256, block=(16, 64), warps=4, stages=2, programs=2),
    _row(64, 256, block=(64, 32), warps=4, stages=2, programs=2),
    _row(None, 256, block=(128, 16), warps=8, stages=2, programs=1),
    _row(16, None, block=(16, 32), warps=4, stages=2, programs=2),
    _row(None, None, block=(64, 16), warps=4, stages=2, programs=2),
    _FLOAT32,
)

TABLE: LaunchTable = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL_MEMORY,
    "sm_89": _SMALL_MEMORY,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    "sm_120": _SMALL_MEMORY,
    "sm_121": _SMALL_MEMORY,
    "gfx90a": _AMD,
    "gfx942": _AMD,
    "gfx950": _AMD,
    # Small enough to be interpreted quickly, and for tests to need several tiles and splits.
    "interpreter": (
        LaunchRow(LaunchConfig(16, 16, 4, 2, fixed_tiles=4)),
        LaunchRow(LaunchConfig(16, 16, 4, 2, fixed_tiles=4), is_float32=True),
    ),
    _DEFAULT: (_row(None, None, block=(32, 16), warps=4, stages=1, programs=1), _FLOAT32),
}
"""Built-in sizes, chosen so that no call of a row spills registers or lacks shared memory."""

_SIZES = tuple(field.name for field in fields(LaunchConfig))
_LIMITS = ("max_rows", "max_key_bytes")
_FIELDS = (*_LIMITS, "is_float32", *_SIZES)


@cache
def read_table_once(path: str) -> LaunchTable:
    """Read a file of rows, once per process."""
    return read_table(path)


def read_table(path: str) -> LaunchTable:
    """Read a file of rows.

    Raises:
        KernelError: If the file cannot be read, or a row is invalid.
    """
    try:
        found = read_json(Path(path))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be read ({error.strerror or error}); correct or unset {VARIABLE}"
        ) from error
    except ValueError as error:
        raise KernelError(
            f"{path} is not JSON ({error}); write it anew with speclm kernels --tune"
        ) from error
    if not isinstance(found, dict):
        raise KernelError(
            f"{path} holds a {type(found).__name__}, expected an object of rows by architecture"
        )
    return {name: _parse_rows(path, name, rows) for name, rows in found.items()}


def write_table(path: Path, table: LaunchTable) -> None:
    """Write a file for `read_table`, which appears whole or not at all."""
    lines = {name: [_to_json(row) for row in rows] for name, rows in sorted(table.items())}
    write_json(path, lines)


def _parse_rows(path: str, architecture: str, rows: Any) -> tuple[LaunchRow, ...]:
    if _ARCHITECTURE.fullmatch(architecture) is None:
        raise KernelError(
            f'{path} has rows for {shown(architecture)}, expected an architecture such as "sm_90" '
            'or "gfx942"; correct the name'
        )
    if not isinstance(rows, list):
        raise KernelError(
            f"{path} holds a {type(rows).__name__} for {architecture}, expected a list of rows"
        )
    return tuple(
        _parse_row(f"{path}: row {index} of {architecture}", row) for index, row in enumerate(rows)
    )


def _parse_row(where: str, row: Any) -> LaunchRow:
    if not isinstance(row, dict) or sorted(row) != sorted(_FIELDS):
        names = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise KernelError(f"{where} has {shown(names)}, expected the fields {sorted(_FIELDS)!r}")
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


def _to_json(row: LaunchRow) -> Mapping[str, int | None]:
    limits = {name: getattr(row, name) for name in (*_LIMITS, "is_float32")}
    return limits | asdict(row.config)
