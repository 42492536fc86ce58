"""Draft without a model: copy what followed the same tokens before."""

from speclm.config import MAX_DEPTH, require_count
from speclm.drafting.growing import GrowthConfig, SourceProposer, TreeGrower
from speclm.methods.ngram.source import MAX_NGRAM, NgramSource


class NgramProposer(SourceProposer):
    """Proposes what followed the longest n-gram that occurred before, in prompt or output.

    A draft grows node by node, most likely first, and every node looks up its own n-gram. A copy
    may therefore continue past the end of the text. It branches where earlier occurrences differ,
    and ends when another node is not worth its time. Needs no weights, and no sync in a round.

    Args:
        num_draft_tokens: Maximum nodes of a draft, 1 to 64; see `GrowthConfig`.
        max_ngram: Longest run of tokens that is looked up, in ``[1, 16]``; the index holds one
            entry per token and length.
        min_probability: Least measured probability of acceptance at which a node is drafted for a
            single row; more in a batch.

    Raises:
        OptionError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        num_draft_tokens: int = 15,
        max_ngram: int = MAX_NGRAM,
        min_probability: float = 0.09,
    ) -> None:
        require_count("num_draft_tokens", num_draft_tokens, low=1, high=MAX_DEPTH)
        require_count("max_ngram", max_ngram, low=1, high=16)
        self.config = GrowthConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        self.grower = TreeGrower([NgramSource(max_ngram=max_ngram)])
