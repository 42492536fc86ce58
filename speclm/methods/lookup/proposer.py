"""N-grams and the target's remembered candidates in one tree: the method without training."""

from pathlib import Path

from transformers import PreTrainedModel

from speclm.config import MAX_DEPTH, require_count
from speclm.drafting.growing import GrowthConfig, SourceProposer, TreeGrower
from speclm.drafting.interface import TargetNeeds
from speclm.methods.ngram.source import NgramSource
from speclm.methods.recycling.memory import MAX_PAIRS
from speclm.methods.recycling.source import RecyclingSource
from speclm.target.logits import head_shape


class LookupProposer(SourceProposer):
    """Joins n-grams of the text with what the target thought likely before, in one tree.

    At each node both say what may follow, and the tree grows from the likeliest of all. How likely
    is measured for each kind of evidence, such as the length of a match or the rank of a candidate,
    and for what both say together.

    Args:
        target: The model that will verify.
        num_draft_tokens: Most nodes of a draft; `GrowthConfig` describes it and `min_probability`.
        min_probability: Least measured probability of acceptance at which a node is drafted for a
            single row; more in a batch.
        max_ngram: Longest run of tokens that is looked up, in ``[1, 16]``.
        memory: ``"model"`` to keep the memory from call to call, ``"call"`` to clear it at each,
            or the path of a file to keep it from program to program.
        max_pairs: Most pairs of tokens to remember; 0 for single tokens only.

    Raises:
        OptionError: If an option is out of range.
        CheckpointError: If the file is damaged, or the memory of another model.
    """

    remembers = True

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        num_draft_tokens: int = 16,
        min_probability: float = 0.09,
        max_ngram: int = 9,
        memory: str | Path = "model",
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        require_count("num_draft_tokens", num_draft_tokens, low=1, high=MAX_DEPTH)
        require_count("max_ngram", max_ngram, low=1, high=16)
        self.config = GrowthConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        self.needs = TargetNeeds(vocab_size=head_shape(target)[0])
        recycling = RecyclingSource(target, memory=memory, max_pairs=max_pairs)
        self.grower = TreeGrower([NgramSource(max_ngram=max_ngram), recycling])
