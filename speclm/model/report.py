"""Descriptions of a `SpecModel`: its `repr`, and the lines of `print_report`."""

from collections.abc import Callable

from speclm.drafting.interface import Proposer
from speclm.kernels import preferred
from speclm.methods.registry import method_of
from speclm.self_check.verdict import SelfCheck
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from speclm.target.loading import hub_commit
from speclm.tree.plan import TreePlan

_WIDTH = 12  # of the names at the start of the lines, as in `SpeculationStats`


def describe_proposer(proposer: Proposer) -> str:
    """Return one line about a proposer for reports."""
    method = method_of(proposer)
    return proposer.describe() if method is None else method.describe(proposer)


def describe_tree_option(tree: TreePlan | str | None) -> str:
    """Return a description of the option ``tree``."""
    if not isinstance(tree, TreePlan):
        return tree or "as the proposer is set"
    kind = "at most" if tree.paths is None else "static tree of"
    return f"{kind} {tree.num_draft_tokens} nodes on {tree.depth} levels"


def describe_model(
    target: TargetView,
    proposer: Proposer | None,
    check: SelfCheck,
    tree: TreePlan | str | None,
    stats: SpeculationStats | None,
) -> str:
    """Return what a model wraps and how it decodes, on a few lines."""
    model = target.model
    name = type(model).__name__
    lines = {
        "base": name if target.name == name else f"{target.name} ({name})",
        "proposer": describe_proposer(proposer) if proposer else "none",
        "tree": describe_tree_option(tree),
        "acceptance": "exact by default"
        if stats is None or not stats.rounds
        else f"{stats.acceptance} in the last call",
        "verification": check.verification.value,
        "dtype, device": f"{model.dtype}, {model.device}",
    }
    return "\n".join(["SpecModel(", *(f"  {name}: {text}" for name, text in lines.items()), ")"])


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
    size = f"{parameters / 1e6:.1f} M parameters, {memory / 2**20:.1f} MiB"
    source = "from an earlier check" if check.is_cached else "checked"
    kernel = preferred(target.device)
    lines = [
        ("base", f"{target.name}, {type(model).__name__}"),
        *(("", f"commit {commit}") for commit in [hub_commit(model)] if commit),
        ("", f"{size}, {model.dtype}, {model.device}"),
        ("proposer", describe_proposer(proposer) if proposer else "none"),
        *(("", f"commit {commit}") for commit in _commits(proposer)),
        ("verified", f"{check.verification.value}: {check.reason}"),
        ("", f"{source} in {check.milliseconds:.1f} ms"),
        ("kernels", f"{kernel.backend}: {kernel.reason}"),
    ]
    for name, text in lines:
        write(f"{name:<{_WIDTH}}{text}")
    if stats is not None:
        write("last call")
        for line in str(stats).splitlines():
            write(f"  {line}")


def _commits(proposer: Proposer | None) -> list[str]:
    """Return the commits on the hub of a proposer and its parts, where there are any."""
    found = [] if proposer is None else [proposer, *proposer.parts]
    return [each.hub_commit for each in found if each.hub_commit is not None]
