"""Lets a draft model and a target share a tokenizer whose ids one of them has padded further."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from speclm.errors import VocabularyMismatchError
from speclm.target import TargetView

MAX_PADDING = 512
"""Most ids by which two vocabularies of one tokenizer differ: weights are padded to a multiple of
a power of two, of 512 at the most in published families."""

_MAX_PADDED_SHARE = 0.25  # so that small vocabularies of two tokenizers do not pass for padded


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """The ids of a draft model and of its target, equal as far as both go.

    Args:
        num_draft: Width of the draft model's logits.
        num_target: Width of the target's.
    """

    num_draft: int
    num_target: int

    @classmethod
    def of(cls, draft: TargetView, target: TargetView) -> "SharedVocabulary":
        """Compare two models.

        Raises:
            VocabularyMismatchError: If they differ by more than padding explains.
        """
        shared = cls(draft.vocab_size, target.vocab_size)
        difference = abs(shared.num_draft - shared.num_target)
        larger = max(shared.num_draft, shared.num_target)
        if difference > min(MAX_PADDING, _MAX_PADDED_SHARE * larger):
            raise VocabularyMismatchError(
                f"draft model {draft.name} has a vocabulary of {shared.num_draft}, the target "
                f"{target.name} one of {shared.num_target}, expected equal ones, or a difference "
                f"of at most {MAX_PADDING} ids and a quarter, which is padding; choose a draft "
                "model that shares the target's tokenizer"
            )
        return shared

    @property
    def num_shared(self) -> int:
        """Ids that both have."""
        return min(self.num_draft, self.num_target)

    def readable(self, tokens: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """Return tokens that the draft model can read: 0, which every vocabulary has, for others.

        Such a token costs guesses, not output.
        """
        if self.num_draft >= self.num_target:
            return tokens
        return tokens.masked_fill(tokens >= self.num_draft, 0)

    def fit(self, logits: Float[Tensor, "*rows draft"]) -> Float[Tensor, "*rows target"]:
        """Return a draft model's logits in the target's width; ids that it lacks are impossible."""
        if self.num_draft >= self.num_target:
            return logits[..., : self.num_target]
        return pad(logits, (0, self.num_target - self.num_draft), value=float("-inf"))
