"""Drafts without training: what the target thought likely after the same tokens before."""

from typing_extensions import override

from speclm.drafting.growing import GrowthConfig, SourceProposer, TreeGrower
from speclm.drafting.interface import Prefill
from speclm.methods.ngram.source import NgramSource
from speclm.methods.recycling.memory import CandidateMemory
from speclm.methods.recycling.source import NUM_CANDIDATES, RecyclingSource


class RecyclingProposer(SourceProposer):
    remembers = True

    def __init__(
        self,
        *,
        vocab_size,
        num_draft_tokens=15,
        min_probability=0.09,
        max_pairs=100_000,
        ngram=False,
        keep=True,
    ):
        self.config = GrowthConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        self.memory = CandidateMemory(
            vocab_size=vocab_size, num_candidates=NUM_CANDIDATES, max_pairs=max_pairs
        )
        sources = [RecyclingSource(self.memory)]
        if ngram:
            sources.insert(0, NgramSource(max_ngram=6))
        self.keep = keep
        self.grower = TreeGrower(sources)

    @override
    def begin(self, prompt: Prefill) -> None:
        if not self.keep:
            self.memory.clear()
        super().begin(prompt)
