"""Why a call is left to regular generation, as far as it is known before the call is resolved."""

from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from speclm.drafting.interface import Proposer
from speclm.generation.delegation import NeedsRegularGeneration
from speclm.model.arguments import first_delegated
from speclm.model.fitting import proposer_modules
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.self_check.watch import Watch, first_in_training


def require_speculation(watch: Watch, arguments: dict[str, Any], default: GenerationConfig) -> None:
    """Check that a call may be answered by the decode loop.

    Args:
        watch: What is known of the base.
        arguments: Of the call.
        default: The base's own generation config.

    Raises:
        NeedsRegularGeneration: If not; the message is the reason.
    """
    if not watch.check.passes:
        raise NeedsRegularGeneration(watch.check.reason)
    if watch.in_training is not None:
        raise NeedsRegularGeneration(
            f"{watch.in_training} is in training mode, in which forwards may be random; call "
            ".eval() on the model"
        )
    name = first_delegated(arguments, default)
    if name is not None:
        raise NeedsRegularGeneration(name)


def notes(check: SelfCheck, proposer: Proposer | None) -> Iterator[tuple[str, str]]:
    """Yield what makes a call slower than it could be: lines for the log, and their reasons."""
    if check.verification is Verification.CHAINS:
        yield "verifying chains with %s: %s", check.reason
    for module in proposer_modules(proposer):
        name = first_in_training(module)
        if name is not None:
            reason = (
                f"{name} of {type(module).__name__} is in training mode, in which drafts may be"
            )
            yield "drafting badly for %s: %s", f"{reason} random; call .eval() on what drafts"
