"""``speclm env``: what an issue report should say about the machine."""

import platform

import torch

from speclm.bench.machine import describe_commit, describe_machine, describe_versions
from speclm.kernels import preferred
from speclm.methods.registry import heads_names


def env() -> None:
    """Print versions, machine and devices, ready to paste into an issue."""
    machine, commit = describe_machine(), describe_commit()
    device = torch.device("cuda" if machine.gpus else "cpu")
    kernel = preferred(device)
    rows = {
        **describe_versions(),
        "commit": f"{commit.sha or 'none'}{' (modified)' if commit.is_dirty else ''}",
        "platform": platform.platform(),
        "cpu": f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads",
        "cuda": torch.version.cuda or "none",
        "gpus": ", ".join(machine.gpus) or "none",
        "kernels": f"{kernel.backend}: {kernel.reason}",
        "proposers": ", ".join(heads_names()),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
