"""N-grams and the target's remembered candidates in one tree: the method without training."""

from pathlib import Path

from transformers import PreTrainedModel

from speclm.config import require_count
from speclm.drafting.growing import TreeGrower
from speclm.drafting.sources import CandidateSource
from speclm.errors import OptionError
from speclm.methods.ngram.corpus import (
    MAX_HISTORY,
    CorpusSource,
    OutputHistory,
    vocabulary_fingerprint,
)
from speclm.methods.ngram.source import NgramSource
from speclm.methods.ngram.suffix_index import SuffixIndex
from speclm.methods.recycling.memory import MAX_PAIRS
from speclm.methods.recycling.source import MemoryProposer, RecyclingSource


class LookupProposer(MemoryProposer):
    """Joins n-grams of the text with what the target thought likely before, in one tree.

    At each node both say what may follow, and the tree grows from the likeliest of all. How likely
    is measured for each kind of evidence, such as the length of a match or the rank of a candidate,
    and for what both say together.

    Args:
        target: The model that will verify.
        num_draft_tokens: Maximum nodes of a draft, 1 to 64; see `GrowthConfig`.
        min_probability: Least measured probability of acceptance at which a node is drafted for a
            single row; more in a batch.
        memory: ``"model"`` to keep the memory from call to call, ``"call"`` to clear it at each,
            or the path of a file to keep it from program to program.
        max_pairs: Maximum pairs of tokens to remember; 0 for single tokens only.
        history: Maximum tokens of earlier outputs to draft from by the longest match; 0 for none.
        corpus: File of texts to draft from in the same way, as ``speclm index`` writes it.

    Raises:
        OptionError: If an option is out of range.
        CheckpointError: If a file is damaged, or the memory of another model.
        VocabularyMismatchError: If the corpus is in tokens of another vocabulary.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        num_draft_tokens: int = 16,
        min_probability: float = 0.05,
        memory: str | Path = "model",
        max_pairs: int = MAX_PAIRS,
        history: int = 0,
        corpus: str | Path | None = None,
    ) -> None:
        recycling = RecyclingSource(target, memory=memory, max_pairs=max_pairs)
        super().__init__(
            target,
            recycling,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        sources: list[CandidateSource] = [NgramSource(), recycling]
        require_count("history", history, low=0, high=MAX_HISTORY)
        if history:
            sources.append(CorpusSource(history=OutputHistory(max_tokens=history)))
        if corpus is not None:
            if not isinstance(corpus, str | Path):
                raise OptionError(f"corpus is {corpus!r}, expected the path of a file; pass one")
            fingerprint = vocabulary_fingerprint(target.config)
            size = recycling.memory.vocab_size
            index = SuffixIndex.load(Path(corpus), vocab_size=size, fingerprint=fingerprint)
            sources.append(CorpusSource(index))
        self.grower = TreeGrower(sources)
