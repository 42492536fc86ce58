"""The lines of `SpecModel.print_report`."""

from collections.abc import Callable

from speclm.drafting.interface import Proposer
from speclm.kernels import preferred
from speclm.methods.registry import describe_proposer
from speclm.self_check.verdict import SelfCheck
from speclm.stats import SpeculationStats
from speclm.target import TargetView


def write_report(
    target: TargetView,
    proposer: Proposer | None,
    check: SelfCheck,
    stats: SpeculationStats | None,
    *,
    write: Callable[[str], object],
) -> None:
    """Write what is wrapped, how drafts are verified and why, and the last call's counters."""
    model = target.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = sum(p.numel() * p.element_size() for p in model.parameters())
    write(f"base      {target.name}, {type(model).__name__}")
    write(
        f"          {parameters / 1e6:.1f} M parameters, {memory / 2**20:.1f} MiB, "
        f"{model.dtype}, {model.device}"
    )
    write(f"proposer  {describe_proposer(proposer)}" if proposer else "proposer  none")
    write(f"backend   {check.verification.value}: {check.reason}")
    source = "from an earlier check" if check.is_cached else "checked"
    write(f"          {source} in {check.milliseconds:.1f} ms")
    kernel = preferred(target.device)
    write(f"kernels   {kernel.backend}: {kernel.reason}")
    if stats is not None:
        _write_last_call(stats, write)


def _write_last_call(stats: SpeculationStats, write: Callable[[str], object]) -> None:
    if stats.fallbacks:
        write(f"last call regular generation: {'; '.join(stats.fallbacks)}")
        return
    by_depth = " ".join(f"{share:.2f}" for share in stats.acceptance_by_depth)
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in stats.milliseconds_per_round.items())
    write(f"last call tau {stats.tau:.2f} over {stats.rounds} rounds")
    lossy = ", lossy: the distribution is not the base's" if stats.is_lossy else ""
    write(f"          acceptance {stats.acceptance}{lossy}")
    write(f"          acceptance by depth: {by_depth or 'nothing drafted'}")
    write(f"          ms a round: {phases}")
    if stats.tree:
        write(f"          tree: {stats.tree}")
    if stats.pause_summary is not None:
        write(f"          {stats.pause_summary}")
