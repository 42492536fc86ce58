"""A training that several processes share."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training import processes
from tests.training.cached import random_texts
from tests.training.processes import NUM_ROWS, RUNS, train

CLOSE = 1e-5  # float32 sums in another order
ROOT = Path(__file__).parents[2]
COMPARED = ("loss", "eval_loss", "grad_norm", "learning_rate", "estimated_tau", "epoch")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return what each of two processes logged, read and learned."""
    folder = tmp_path_factory.mktemp("shared")
    launcher = [sys.executable, "-W", "error", "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ROOT / "examples" / "accelerate-cpu.yaml"
    command = [*launcher, "--config_file", str(config), processes.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONWARNINGS"] = "error"
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_the_losses_of_one_with_twice_the_batch(name, shared, tmp_path):
    single = train(tmp_path, name, 4, **{**RUNS[name], "broken_at": 0, "fsdp": False})
    first, second = (process[name] for process in shared)
    assert first["divided"] == second["divided"] == (name == "divided")
    assert len(first["logs"]) == len(single["logs"])
    for found, expected in zip(first["logs"], single["logs"], strict=True):
        for key in COMPARED:
            if key in expected:
                assert found[key] == pytest.approx(expected[key], rel=CLOSE), key
    for key, value in single["heads"].items():
        assert first["heads"][key] == second["heads"][key]
        torch.testing.assert_close(
            torch.tensor(first["heads"][key]), torch.tensor(value), atol=CLOSE, rtol=0
        )


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_read_each_row_once_an_epoch(name, shared):
    read = Counter(tuple(row) for process in shared for row in process[name]["read"])
    rows = [tuple(example["input_ids"]) for example in random_texts(NUM_ROWS + 1)][:NUM_ROWS]
    assert read == Counter([*rows, *rows])
