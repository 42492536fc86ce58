"""Run damaged folders from a first number: ``python -m tests.fuzzing --first 0 --cases 1000``."""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from tests.fuzzing.cases import log_of, run_cases

STEP = 1000

parser = argparse.ArgumentParser(description="Read damaged folders of heads.")
parser.add_argument("--first", type=int, default=0, help="number of the first case")
parser.add_argument("--cases", type=int, default=1000, help="how many cases")
options = parser.parse_args()
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
torch.set_num_threads(1)
disable_progress_bar()
start, last, num_faults = time.monotonic(), options.first + options.cases, 0
with tempfile.TemporaryDirectory() as folder:
    sys.stdout.write(f"a case that hangs is named in {log_of(Path(folder) / 'case')}\n")
    sys.stdout.flush()
    for first in range(options.first, last, STEP):
        numbers = range(first, min(first + STEP, last))
        counts, faults = run_cases(numbers, Path(folder) / "case")
        num_faults += len(faults)
        for number, fault in faults.items():
            sys.stdout.write(f"case {number}: {fault}\n")
        seconds = time.monotonic() - start
        sys.stdout.write(f"cases {first} to {numbers[-1]}: {dict(counts)}, {seconds:.0f} s\n")
        sys.stdout.flush()
sys.stdout.write(f"{options.cases} cases from {options.first}: {num_faults} faults\n")
sys.exit(num_faults > 0)
