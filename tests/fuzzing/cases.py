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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from speclm.errors import SpeclmError
from tests.fuzzing.exported import ALL, files_of
from tests.fuzzing.mutations import CANARY, MUTATIONS, Folder
from tests.fuzzing.verbs import HEADS, VERBS

SECONDS, MEGABYTES = 2.0, 200
"""Limits of a case: processor time, and memory next to the bytes of its files."""

WAIT, HANG = 10, 30
"""Seconds until a call that waits is interrupted, and until one that cannot be ends the process."""


class TimeOut(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Case:
    """A damaged folder, made again from its number."""

    number: int
    layout: str
    names: tuple[str, ...]
    folder: Folder
    use: Callable[[Path], None]


def make_case(number: int) -> Case:
    """Return the case of a number."""
    draw = random.Random(number)
    layout = draw.choice(sorted(ALL))
    folder = Folder(dict(files_of(layout)))
    chosen = draw.choices(MUTATIONS, k=draw.randint(1, 3))
    for mutate in chosen:
        mutate(draw, folder)
    use = draw.choice(VERBS.get(layout, HEADS))
    return Case(number, layout, tuple(mutate.__name__ for mutate in chosen), folder, use)


def log_of(place: Path) -> Path:
    """Return the file that names the case in a place while it runs, and after it has hung."""
    return place.with_suffix(".log")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TimeOut


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_case(case: Case, place: Path) -> str:
    """Run a case and return "loaded" or "refused"; any other word is a fault.

    If it hangs, the process ends, and `log_of` names the case and the lines where it was.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    canary = place / "canary"
    os.environ[CANARY] = str(canary)
    allowed = MEGABYTES + case.folder.write(place / "heads") / 2**20
    before, start = _peak(), time.process_time()
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    log = log_of(place).open("w", encoding="utf-8")
    log.write(f"case {case.number}: {case.use.__name__} of {case.layout} {case.names}\n")
    log.flush()
    faulthandler.dump_traceback_later(HANG, exit=True, file=log)
    try:
        case.use(place / "heads")
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
        log.close()
    seconds, grown = time.process_time() - start, _peak() - before
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
        found = run_case(case, place)
        if found in ("loaded", "refused"):
            counts[found] += 1
        else:
            counts["faults"] += 1
            faults[number] = f"{case.use.__name__} of {case.layout} {case.names}: {found}"
    return counts, faults
