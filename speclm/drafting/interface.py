"""What a proposer is: the abstract class, what it is told and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.acceptance.accepted import Accepted
from speclm.config import ProposerConfig
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.drafts import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.tree.plan import TreePlan
from speclm.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """What is known when a generation starts.

    Args:
        tokens: Prompt without its last token, padded on the left, on the target's device; may
            have no columns.
        num_padding: Padding tokens at the start of each row.
        first_tokens: Last token of the prompt; the first roots. A prompt of embeddings alone looks
            like one of a single token.
        temperature: Temperature at which the target samples; 0 when it decodes greedily.
        max_new_tokens: Most tokens that any row will be given.
        eos_token_ids: Tokens that end a row; what follows them is of no use.
        features: Features of the target at `tokens`, for proposers that ask for them; at the last
            of them alone where a cache that was passed in held the first.
        sampler: What drafts have to be drawn with when the acceptance rule asks for drawn ones;
            None when it takes any. Only proposers that declare `draft_sampling` are given one.
        chooser: How the target turns logits into tokens, with its processors; None where nobody
            says.
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


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A guess: one tree of tokens per row.

    Args:
        tokens: Token at each node; column 0 is the root. Padding nodes may hold any valid token.
        topology: Shape of the trees; one row when all rows share it.
        probs: Probability that the proposer gave to each token, given its path; None when it has
            none.
        distributions: Distribution that the children of each node were drawn from, before siblings
            were removed; rows of leaves may hold anything. None unless a sampler was given.
    """

    tokens: Int[Tensor, "batch nodes"]
    topology: TreeTopology
    probs: Float[Tensor, "batch nodes"] | None
    distributions: Float[Tensor, "batch nodes vocab"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TargetNeeds:
    """What a target has to be for a proposer; None where anything will do.

    Args:
        vocab_size: Width of its logits.
        hidden_size: Width of its hidden states.
        model: The very model, where the proposer computes with its weights.
    """

    vocab_size: int | None = None
    hidden_size: int | None = None
    model: PreTrainedModel | None = None


class Proposer(ABC):
    """Guesses how the target will continue each row.

    A generation calls `begin` once and then `propose` and `commit` in turn; it leaves out
    `propose` where no draft could be used. State is kept per row
    and lives from one `begin` to the next. Randomness of a proposer's own comes from a generator
    of its own: the global one belongs to the target. Under the exact rule the tokens that
    `generate` returns do not depend on the proposer; only the speed does.

    A proposer that sets `features` is given them with the prompt, and at the accepted nodes with
    every `commit`. Its first draft comes a token later than that of others, which are asked
    before the target has read the prompt.

    A proposer that sets `draft_sampling` can draw its drafts, which rejection rules need. When
    `Prefill.sampler` is given, it draws the children of every node with it, in the order of
    their nodes, from distributions that it returns in `Draft.distributions`. It then draws before
    it shapes: a node may be left out for what stands above it, never for its own token or a
    sibling's.

    A proposer that sets `needs_lockstep` is given equally many tokens in all rows that run, at the
    price that the fast wait for the slow.

    Attributes:
        features: Hidden states of the target that it is given.
        needs_lockstep: Whether all rows have to advance together.
        draft_sampling: How it can draw its drafts.
        config: Its settings; `config.depth` bounds its trees.
        needs: What the target has to be; checked when a `SpecModel` is given the proposer.
        parts: Proposers that it asks in turn, whose needs are checked too.
        takes_choices: Whether it fills static trees of ranks.
        num_ranks: Guesses that it can rank below a node; None for the vocabulary it needs.
        plan: What the loop wants the next drafts to be, set before `begin` and every `propose`;
            None for what `config` says. Larger trees are cut by the loop.
    """

    features: ClassVar[TargetFeatures] = TargetFeatures.NONE
    draft_sampling: ClassVar[DraftSampling] = DraftSampling.NONE
    needs_lockstep: ClassVar[bool] = False
    config: ProposerConfig = ProposerConfig()
    needs: TargetNeeds = TargetNeeds()
    parts: Sequence["Proposer"] = ()
    takes_choices: ClassVar[bool] = False
    num_ranks: int | None = None
    plan: TreePlan | None = None

    @abstractmethod
    def begin(self, prompt: Prefill) -> None:
        """Forget the last generation and start a new one."""

    @abstractmethod
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        """Guess continuations of every row.

        Args:
            roots: Last committed token of each row.
            noise: Noise of the positions to come when the target samples: `noise.at_depth(d)`
                decides the child of a node of depth d. None when it decodes greedily.

        Returns:
            A draft on the device of `roots`. A draft of the root alone is allowed: the round is
            then one step of regular generation.
        """

    @abstractmethod
    def commit(self, accepted: Accepted) -> None:
        """Take note of the tokens that every row was given in this round.

        ``accepted.emitted[b]`` lists them on the host. It is empty in a row that is finished or
        waits for slower rows, and such a row keeps its root.
        """
