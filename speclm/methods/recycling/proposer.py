"""Drafts without training: what the target thought likely after the same tokens before."""

from pathlib import Path

from transformers import PreTrainedModel

from speclm.drafting.growing import TreeGrower
from speclm.methods.recycling.memory import MAX_PAIRS
from speclm.methods.recycling.source import MemoryProposer, RecyclingSource


class RecyclingProposer(MemoryProposer):
    """Proposes what the target thought likely when it last was after the same one or two tokens.

    Every verification computes the target's distribution after all nodes of a tree, accepted and
    rejected ones. The likeliest tokens of each are remembered, and drafted when their node's token
    comes again. The memory changes which tokens are drafted, never which are generated.

    Source: Luo et al. 2024 (Token Recycling).

    Args:
        target: The model that will verify.
        num_draft_tokens: Maximum nodes of a draft, 1 to 64; see `GrowthConfig`.
        min_probability: Least measured probability of acceptance at which a node is drafted for a
            single row; more in a batch.
        memory: ``"model"`` to keep the memory from call to call, ``"call"`` to clear it at each,
            or the path of a file to keep it from program to program.
        max_pairs: Maximum pairs of tokens to remember; 0 for single tokens only.

    Raises:
        OptionError: If an option is out of range.
        CheckpointError: If the file is damaged, or the memory of another model.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        num_draft_tokens: int = 15,
        min_probability: float = 0.09,
        memory: str | Path = "model",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        source = RecyclingSource(target, memory=memory, max_pairs=max_pairs)
        super().__init__(
            target,
            source,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        self.grower = TreeGrower([source])
