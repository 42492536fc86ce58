"""Run damaged folders: each loads or ends in one of speclm's errors, in time and memory."""

import faulthandler
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from speclm.errors import SpeclmError
from speclm.methods.block.checkpoint import build_block, read_block
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.network import build_eagle
from speclm.methods.finding import find_heads
from speclm.methods.medusa.checkpoint import read_medusa
from tests.fuzzing.layouts import LAYOUTS, files_of
from tests.fuzzing.mutations import CANARY, MUTATIONS, Folder

SECONDS, MEGABYTES = 2.0, 200
HANG = 20  # until a call that no signal interrupts ends the process
READERS = {
    "medusa": read_medusa,
    "eagle": lambda folder: build_eagle(read_eagle(folder)),
    "block": lambda folder: build_block(read_block(folder)),
}


class TimeOut(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Case:
    """A damaged folder, made again from its number."""

    number: int
    layout: str
    names: tuple[str, ...]
    folder: Folder


def make_case(number: int) -> Case:
    """Return the case of a number."""
    draw = random.Random(number)
    layout = draw.choice(sorted(LAYOUTS))
    folder = Folder(dict(files_of(layout)))
    chosen = draw.choices(MUTATIONS, k=draw.randint(1, 3))
    for mutate in chosen:
        mutate(draw, folder)
    return Case(number, layout, tuple(mutate.__name__ for mutate in chosen), folder)


def read_folder(place: Path) -> None:
    """Do what loading does before it needs a base."""
    source = find_heads(str(place))
    reader = READERS.get(source.method.name)
    if reader is not None:
        reader(place)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TimeOut


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(case: Case, place: Path) -> str:
    """Run a case and return "loaded" or "refused"; any other word is a fault."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    canary = place / "canary"
    os.environ[CANARY] = str(canary)
    allowed = MEGABYTES + case.folder.write(place / "heads") / 2**20
    before, start = _peak(), time.monotonic()
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        read_folder(place / "heads")
        found = "loaded"
    except SpeclmError as error:
        message = str(error)
        is_plain = "\n" not in message and len(message) < 2000 + 2 * len(str(place))
        found = "refused" if is_plain else f"message of {len(message)} characters: {message[:200]}"
    except TimeOut:
        found = f"time-out {traceback.format_exc()[-600:]}"
    except BaseException:  # noqa: BLE001 - this is what is looked for
        found = f"crash {traceback.format_exc()[-1200:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.monotonic() - start, _peak() - before
    if canary.exists():
        return "execution"
    if found in ("loaded", "refused") and seconds > SECONDS:
        return f"time-out after {seconds:.1f} s"
    if found in ("loaded", "refused") and grown > allowed:
        return f"memory of {grown:.0f} MB"
    return found


def run_cases(numbers: range, place: Path) -> tuple[Counter[str], dict[int, str]]:
    """Run cases and return how many loaded and were refused, and the fault of each other one."""
    counts: Counter[str] = Counter()
    faults: dict[int, str] = {}
    for number in numbers:
        case = make_case(number)
        (place.parent / f"{place.name}.number").write_text(str(number))  # if the process dies
        found = run_case(case, place)
        if found in ("loaded", "refused"):
            counts[found] += 1
        else:
            counts["faults"] += 1
            faults[number] = f"{case.layout} {case.names}: {found}"
    return counts, faults
