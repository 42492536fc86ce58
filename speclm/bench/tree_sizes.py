"""Simulate tau by the number of nodes of a draft tree."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from speclm.adaptive.memory import Memory
from speclm.adaptive.planner import Observed, RoundCosts
from speclm.bench.decoders import Call, Decoder, Task
from speclm.drafting.interface import Proposer
from speclm.model import SpecModel

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of nodes, root excluded."""

_EQUAL = RoundCosts(forwards=((1, 1.0), (2, 1.0)))
"""All rounds cost the same, so that the best tree of a size is the one with the largest tau."""


def simulate_tau(
    base: PreTrainedModel, proposer: Proposer, tasks: Sequence[Task]
) -> dict[int, float]:
    """Return the tau of the best tree of at most each number of nodes.

    The tasks are decoded once with large trees, and smaller trees are replayed on these rounds. The
    proposer forgets before and afterwards.

    Args:
        base: The model.
        proposer: The proposer.
        tasks: What is decoded.

    Returns:
        tau by the number of nodes, root excluded, up to the largest tree whose forward was not too
        slow to pay; empty if nothing was drafted.
    """
    model = SpecModel(base, proposer, adaptive=False, tree="auto")
    model.memory = Memory(explores_always=True)
    observed: dict[int, Observed] = {}

    def generate(call: Call) -> Tensor | ModelOutput:
        output: Tensor | ModelOutput = model.generate(**call.arguments)
        tuner = model.memory.last_tuner
        if tuner is not None:  # calls of similar length share one list
            observed[id(tuner.observed)] = tuner.observed
        return output

    decoder = Decoder("explored", generate, lambda: None, promises_identity=True)
    proposer.forget()
    for task in tasks:
        task.answered_by(decoder)
    proposer.forget()
    tuner = model.memory.last_tuner
    if tuner is None:
        return {}
    rounds = [found for each in observed.values() for found in each]
    estimates = tuner.estimates(rounds=rounds, costs=_EQUAL)
    return {
        found.plan.num_draft_tokens: found.tau
        for found in estimates
        if found.plan.num_draft_tokens in SIZES
    }
