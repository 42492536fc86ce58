"""The interface of a drafting method: a `Proposer` returns a `Draft` in every round."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.acceptance import Accepted
from speclm.cache.tree_cache import TreeCache
from speclm.config import ProposerConfig
from speclm.engines import Engine
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.tree.plan import TreePlan
from speclm.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Draft tokens: one tree per row.

    Args:
        tokens: Token at each node; column 0 is the root. Padding nodes may hold any valid token.
        topology: Shape of the trees; one row if all rows of the batch share it.
        node_probs: For each row, the proposer's probability of each node's token, given the path
            to it. Lists on the host, because only the host reads them. None if unknown.
        distributions: Distribution from which the children of each node were drawn, before siblings
            were removed. Rows of leaves may hold anything. None unless `Prefill.sampler` was given.
    """

    tokens: Int[Tensor, "batch nodes"]
    topology: TreeTopology
    node_probs: list[list[float]] | None = None
    distributions: Float[Tensor, "batch nodes vocab"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """Description of the prompt at the start of a generation.

    Args:
        tokens: Prompt without its last token, padded on the left, on the target's device; may have
            no columns.
        num_padding: Padding tokens at the start of each row.
        first_tokens: Last token of the prompt, which is the first root. A prompt that consists of
            embeddings looks like one of a single token.
        temperature: Temperature at which the target samples; 0 if it decodes greedily.
        max_new_tokens: Maximum new tokens of any row.
        eos_token_ids: Tokens that end a row.
        features: Target features at `tokens`, for proposers that set `Proposer.features`. If a
            cache was passed in, only the positions after it have features.
        sampler: Draws the draft tokens, if the acceptance rule needs drawn ones. Only proposers
            that set `Proposer.draft_sampling` are given one.
        chooser: How the target turns logits into tokens; None if unknown.
        engine: Runs stages of fixed shapes, also of the proposer; None to draft eagerly.
        cache: The target's cache, to read from; whenever `Proposer.propose` is called, it holds all
            committed tokens but the roots. None if the target does not verify trees.
    """

    tokens: Int[Tensor, "batch seq"]
    num_padding: Int[Tensor, " batch"]
    first_tokens: Int[Tensor, " batch"]
    temperature: float
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    features: Float[Tensor, "batch seq hidden"] | None = None
    sampler: DraftSampler | None = None
    chooser: TokenChooser | None = None
    engine: Engine | None = None
    cache: TreeCache | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TargetNeeds:
    """Requirements of a proposer on its target; None means no requirement.

    Args:
        vocab_size: Width of the target's logits.
        hidden_size: Width of its hidden states.
        model: The target itself, if the proposer computes with its weights.
    """

    vocab_size: int | None = None
    hidden_size: int | None = None
    model: PreTrainedModel | None = None


class Proposer(ABC):
    """Drafts tokens that the target then verifies.

    A generation calls `begin` once, then `propose` and `commit` in turn. It skips `propose` in
    rounds without a draft. A proposer keeps state per row from one `begin` to the next. Under the
    exact acceptance rule the generated tokens do not depend on the proposer, only the speed does.
    A proposer must not draw from the global random generators, which belong to the target; it uses
    a `torch.Generator` of its own.

    Check a proposer with `speclm.testing.check_proposer`.

    Attributes:
        config: Settings; ``config.depth`` bounds the depth of its trees.
        features: Target hidden states that it receives with the prompt and with every `commit`.
            Its first draft then comes one token later than that of other proposers.
        needs: Requirements on the target; checked when a `SpecModel` is built.
        needs_lockstep: Whether all rows must receive equally many tokens; fast rows then wait for
            slow ones.
        draft_sampling: How it can draw its tokens, which acceptance by rejection needs. If
            `Prefill.sampler` is given, draw the children of every node with it, in the order of
            the nodes, and return the distributions in `Draft.distributions`. Whether a node exists
            may depend on the tokens above it, not on its own token or a sibling's.
        num_observed: How many of the target's likeliest tokens after each node of the verified
            draft it is given with every `commit`, in ``accepted.candidates``, and with one of four
            while drafts pause. A part of a list that drafts by itself is given none.
        remembers: Whether drafts may depend on earlier generations and on other rows of a batch.
        fills_static_trees: Whether it fills static trees of ranks, such as ``plan.paths``.
        num_ranks: Candidates that it can rank below a node; None for ``needs.vocab_size``.
        plan: Size of the next drafts, set by the loop before `begin` and every `propose`; None
            follows `config`. The loop cuts larger trees.
        parts: Proposers that it calls itself, whose needs are checked too.
        hub_commit: Commit on the hub that its files are of, for reports; None without one.

    Example:
        Draft the last token again, as a chain of two:

        ```python
        class RepeatProposer(Proposer):
            config = ProposerConfig(depth=2)

            def begin(self, prompt):
                pass  # no state

            def propose(self, roots, *, noise):
                tokens = roots[:, None].expand(-1, 3)  # root and two draft tokens
                return Draft(tokens, chain(2, device=roots.device))

            def commit(self, accepted):
                pass  # a stateful proposer would read accepted.emitted


        model = SpecModel(base, RepeatProposer())
        ```
    """

    config: ProposerConfig = ProposerConfig()
    features: ClassVar[TargetFeatures] = TargetFeatures.NONE
    needs: TargetNeeds = TargetNeeds()
    needs_lockstep: ClassVar[bool] = False
    draft_sampling: ClassVar[DraftSampling] = DraftSampling.NONE
    num_observed: ClassVar[int] = 0
    remembers: ClassVar[bool] = False
    fills_static_trees: ClassVar[bool] = False
    num_ranks: int | None = None
    plan: TreePlan | None = None
    parts: Sequence["Proposer"] = ()
    hub_commit: str | None = None

    @abstractmethod
    def begin(self, prompt: Prefill) -> None:
        """Forget the last generation and start a new one."""

    @abstractmethod
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        """Draft continuations of every row.

        Args:
            roots: Last committed token of each row.
            noise: Noise of the next positions if the target samples: ``noise.at_depth(d)`` decides
                the child of a node of depth d. None if the target decodes greedily.

        Returns:
            A draft on the device of `roots`. If it is only the root, the round is one step of
            regular generation.
        """

    @abstractmethod
    def commit(self, accepted: Accepted) -> None:
        """Receive the tokens that every row emitted in this round.

        ``accepted.emitted[b]`` lists them on the host. The list is empty in a row that has ended or
        waits for slower rows; such a row keeps its root.
        """

    def forget(self) -> None:  # noqa: B027 - most learn nothing from earlier calls
        """Forget what earlier calls taught, except settings.

        Between generations only. A proposer that sets `remembers` drafts then as a new one does.
        """

    def describe(self) -> str:
        """Return one line about the proposer for reports."""
        return f"{type(self).__name__}, {self.config}"
