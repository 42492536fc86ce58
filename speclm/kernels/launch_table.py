"""Sizes of the launches of tree attention: a table by GPU, type, width of a key and rows."""

from dataclasses import dataclass

from speclm.errors import KernelError

BLOCK_KEYS = (16, 32, 64)
"""Keys that a tile may have: the bits of a word cover it."""

_DEFAULT = "default"
_MOST = 2**16  # of what only has to be positive
_FIXED_KEYS = 1024  # of a split in deterministic calls


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Sizes of one launch of tree attention.

    Args:
        block_rows: Rows (nodes with their heads) of a program; a power of two from 16.
        block_keys: Keys of a tile; 16, 32 or 64.
        num_warps: Warps of a program; a power of two.
        num_stages: Tiles of keys that are loaded ahead.
        programs: Programs that a multiprocessor runs at once; with it the number of splits is set.
        min_tiles: Fewest tiles that are worth a split.
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
            if not 1 <= getattr(self, name) <= _MOST:
                raise KernelError(
                    f"{name} is {getattr(self, name)!r}, expected at least 1 and at most {_MOST}"
                )


@dataclass(frozen=True, slots=True)
class CallSize:
    """What sizes are looked up by.

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
        max_rows: Most rows (nodes with their heads) of a call; None for any number.
        max_key_bytes: Most bytes of one key; None for any number.
        is_float32: Whether it is for float32; else it is for types of two bytes.
    """

    config: LaunchConfig
    max_rows: int | None = None
    max_key_bytes: int | None = None
    is_float32: bool = False

    def takes(self, size: CallSize) -> bool:
        """Whether the row is for calls of a size."""
        return (
            size.is_float32 == self.is_float32
            and (self.max_rows is None or size.rows <= self.max_rows)
            and (self.max_key_bytes is None or size.key_bytes <= self.max_key_bytes)
        )


LaunchTable = dict[str, tuple[LaunchRow, ...]]
"""Rows by architecture, such as ``"sm_90"`` or ``"gfx942"``; the first that takes a call counts."""


def find_config(table: LaunchTable, architecture: str, size: CallSize) -> LaunchConfig | None:
    """Return the sizes for a call from the first row that takes it; None where no row does."""
    rows = table.get(architecture, ())
    return next((row.config for row in rows if row.takes(size)), None)


def built_in_rows(architecture: str) -> tuple[LaunchRow, ...]:
    """Return our rows; GPUs that we do not know get those that fit into all we do."""
    return TABLE.get(architecture, TABLE[_DEFAULT])


def built_in_config(architecture: str, size: CallSize) -> LaunchConfig:
    """Return our sizes for a call."""
    return next(row.config for row in built_in_rows(architecture) if row.takes(size))


def _row(
    *limits: int | None, block: tuple[int, int], warps: int, stages: int, programs: int
) -> LaunchRow:
    """A row for types of two bytes, from its limits of rows and of bytes of a key."""
    max_rows, max_key_bytes = limits
    config = LaunchConfig(
        *block, warps, stages, programs=programs, fixed_tiles=_FIXED_KEYS // block[1]
    )
    return LaunchRow(config, max_rows, max_key_bytes)


# Float32 is multiplied without matrix units (but on AMD), and all operands are held in registers.
_FLOAT32 = LaunchRow(
    LaunchConfig(32, 16, 8, 2, programs=2, fixed_tiles=_FIXED_KEYS // 16), is_float32=True
)

# Matrix instructions of warp groups take 64 rows, to which fewer are padded. A tile of rows reads
# all keys, so that more rows than 128 read them again, from L2. Two programs of 64 rows share
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
"""Our sizes. They are chosen so that no call of a row spills registers or lacks shared memory."""
