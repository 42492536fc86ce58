"""Draft trees with the assistants of Gemma 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_known
from speclm.drafting.interface import Draft, TargetNeeds
from speclm.drafting.level_proposer import LevelProposer, LevelProposerConfig, WholeVocabulary
from speclm.drafting.levels import options_with_tree
from speclm.methods.gemma_assistant.checkpoint import num_assistant_tokens, require_match
from speclm.methods.gemma_assistant.context import AssistantContext
from speclm.methods.gemma_assistant.network import AssistantNetwork
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView


@dataclass(frozen=True, slots=True)
class GemmaAssistantConfig(LevelProposerConfig):
    """Settings of `GemmaAssistantProposer`; each level costs one run of the assistant.

    Args:
        depth: Maximum levels of the tree; the proposer's default is `num_draft_tokens`.
        num_draft_tokens: Maximum nodes; the proposer's default is what the assistant's generation
            config names.
    """

    depth: int = 8
    num_draft_tokens: int = 8


class GemmaAssistantProposer(LevelProposer):
    """Grows a tree with a small model that reads the target's keys and values.

    It has no cache of its own, so it costs nothing at the prompt and nothing while drafts pause.
    All nodes of a draft are computed as if they were at the position of the root.

    Source: ``SinglePositionMultiTokenCandidateGenerator`` of Transformers, which drafts chains for
    one row.
    """

    features = TargetFeatures.LAST_HIDDEN
    config: GemmaAssistantConfig

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        """Wrap a loaded assistant.

        Args:
            model: A Gemma 4 assistant of Transformers.
            target: The Gemma 4 model that verifies.
            tree: Name of a preset, the number of children at each depth, or paths of ranks;
                `num_draft_tokens` keeps the first nodes by depth. None grows trees by
                probability.
            **options: Fields of `GemmaAssistantConfig`.

        Raises:
            UnsupportedModelError: If the target is no Gemma 4.
            VocabularyMismatchError: If the assistant was made for another vocabulary.
            OptionError: If an option is unknown or out of range, or the assistant was made for
                another target.
            CheckpointError: If its clusters do not hold each token once.
            TopologyError: If `tree` is not a tree.
        """
        require_known(GemmaAssistantConfig, options, owner="GemmaAssistantProposer")
        self.model, self.view = model, TargetView(target)
        layers = require_match(model, self.view)
        if tree is not None:
            options = options_with_tree(tree, options)
        if "num_draft_tokens" not in options:
            options["num_draft_tokens"] = num_assistant_tokens(model)
        options.setdefault("depth", options["num_draft_tokens"])
        vocab_size = self.view.vocab_size
        self.needs = TargetNeeds(
            vocab_size=vocab_size, hidden_size=self.view.hidden_size, model=target
        )
        self._own = AssistantContext(AssistantNetwork(model, layers=layers), self.view)
        self._prepare(
            GemmaAssistantConfig(**options),
            context=self._own,
            vocabulary=WholeVocabulary(),
            sizes=(vocab_size, vocab_size),
        )

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        self._own.roots = roots  # which the assistant reads itself
        return super().propose(roots, noise=noise)
