"""Draft trees with the MTP layers that come with a target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from speclm.config import require_known
from speclm.drafting.interface import TargetNeeds
from speclm.drafting.level_proposer import LevelProposer, LevelProposerConfig, WholeVocabulary
from speclm.drafting.levels import options_with_tree
from speclm.errors import OptionError
from speclm.methods.mtp.context import MtpContext
from speclm.methods.mtp.network import MtpHeads
from speclm.target import TargetFeatures, TargetView


@dataclass(frozen=True, slots=True)
class MtpProposerConfig(LevelProposerConfig):
    """Settings of `MtpProposer`; each level costs one run of a layer.

    Args:
        repeats_last: Whether the last layer drafts further levels from its own output. If not, a
            draft has at most as many levels as there are layers.
    """

    repeats_last: bool = True

    def __post_init__(self) -> None:
        LevelProposerConfig.__post_init__(self)  # super() does not work in a slotted dataclass
        if not isinstance(self.repeats_last, bool):
            raise OptionError(
                f"repeats_last is {self.repeats_last!r}, expected True or False; choose one"
            )


class MtpProposer(LevelProposer):
    """Grows a tree with the layers that were trained with the target to predict further tokens.

    Level k is drafted by layer k, and levels beyond the last layer by that layer, applied to its
    own output. Committed positions are computed from the target's hidden states; those computed
    from draft tokens are dropped in every round.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.2; Qwen3-Next for the repeated layer.
    """

    features = TargetFeatures.LAST_HIDDEN
    config: MtpProposerConfig

    def __init__(
        self,
        heads: MtpHeads,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        """Wrap the MTP layers of a target.

        Args:
            heads: Result of `build_mtp` for the target. Their weights must not change.
            target: The model that verifies.
            tree: Name of a preset, the number of children at each depth, or paths of ranks;
                `num_draft_tokens` keeps the first nodes by depth. None grows trees by
                probability.
            **options: Fields of `MtpProposerConfig`.

        Raises:
            OptionError: If an option is unknown or out of range, or a rank exceeds the vocabulary.
            TopologyError: If `tree` is not a tree.
            UnsupportedModelError: If the target's embeddings are quantised or offloaded and the
                layers have none of their own.
        """
        require_known(MtpProposerConfig, options, owner="MtpProposer")
        if tree is not None:
            options = options_with_tree(tree, options)
        config = MtpProposerConfig(**options)
        self.heads, self.view = heads, TargetView(target)
        if heads.shares_embeddings:
            _ = self.view.embedding_weight  # raises if the target's cannot be read
        vocab_size = self.view.vocab_size
        self.needs = TargetNeeds(
            vocab_size=vocab_size, hidden_size=self.view.hidden_size, model=target
        )
        self.max_levels = None if config.repeats_last else len(heads.layers)
        self._prepare(
            config,
            context=MtpContext(heads, self.view),
            vocabulary=WholeVocabulary(),
            sizes=(vocab_size, vocab_size),
        )
