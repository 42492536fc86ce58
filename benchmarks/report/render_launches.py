"""Write the table of launch sizes of the kernels' page from the table that the code reads.

It stands between ``<!-- launches:ARCHITECTURES -->``, names joined by commas, and
``<!-- /launches -->``.

    python benchmarks/report/render_launches.py          # rewrites the table
    python benchmarks/report/render_launches.py --check  # fails if it is out of date
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import markers
from speclm.kernels.launch_table import TABLE, LaunchRow

PAGES = ("docs/kernels.md",)
GPUS = {
    "sm_80": "A100",
    "sm_86": "RTX 30, A10",
    "sm_89": "RTX 40, L4, L40",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_103": "B300",
    "sm_120": "RTX 50",
    "sm_121": "GB10",
    "gfx90a": "MI200",
    "gfx942": "MI300",
    "gfx950": "MI350",
}
"""What GPUs an architecture stands for, for readers."""
HEADER = (
    "| GPU | type | rows | bytes of a key | rows x keys of a tile | warps | stages | "
    "programs on a multiprocessor |\n"
)


def row(names: Sequence[str], launch: LaunchRow) -> str:
    """Return a line of the table; names stand in the first line of an architecture."""
    config, kind = launch.config, "float32" if launch.is_float32 else "float16, bfloat16"
    limits = ("any" if most is None else f"to {most}" for most in launch_limits(launch))
    cells = (
        ", ".join(f"{name} ({GPUS[name]})" for name in names),
        kind,
        *limits,
        f"{config.block_rows} x {config.block_keys}",
        str(config.num_warps),
        str(config.num_stages),
        str(config.programs),
    )
    return f"| {' | '.join(cells)} |\n"


def launch_limits(launch: LaunchRow) -> tuple[int | None, int | None]:
    return launch.max_rows, launch.max_key_bytes


def render(architectures: str, _: Mapping[str, str]) -> str:
    """Return the table of the named architectures; those with equal rows share them.

    Raises:
        ValueError: If there is no such architecture.
    """
    together: dict[tuple[LaunchRow, ...], list[str]] = {}
    for name in architectures.split(","):
        if name not in TABLE:
            raise ValueError(f"{name} is not in the table, expected some of {sorted(TABLE)}")
        together.setdefault(TABLE[name], []).append(name)
    lines = [
        row(names if index == 0 else (), launch)
        for launches, names in together.items()
        for index, launch in enumerate(launches)
    ]
    return HEADER + "| --- " * (HEADER.count("|") - 1) + "|\n" + "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    def rewrite(text: str, _: Path) -> str:
        return markers.rewrite(text, "launches", render)

    return markers.write_pages(
        PAGES,
        rewrite,
        script="benchmarks/report/render_launches.py",
        description=__doc__.splitlines()[0],
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
