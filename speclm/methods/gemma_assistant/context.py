"""What an assistant of Gemma 4 knows of the committed tokens: the target's cache and features."""

from typing import Any
from weakref import ref

from jaxtyping import Float, Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.cache.tree_cache import TreeCache
from speclm.drafting.committed import CommittedRounds
from speclm.drafting.interface import Prefill
from speclm.errors import UnsupportedModelError
from speclm.methods.gemma_assistant.network import AssistantNetwork, AssistantRun
from speclm.target import TargetView


class AssistantContext:
    """Follows the hidden states that the roots come from; keys and values are the target's."""

    def __init__(self, network: AssistantNetwork, view: TargetView) -> None:
        """Create a context for any number of generations."""
        self._network, self._view = network, view
        self._rounds = CommittedRounds()
        self._cache: ref[TreeCache] | None = None  # which is freed with the call
        self.roots: Int[Tensor, " batch"] | None = None
        """Token of each root of the next draft."""
        self._hidden: Float[Tensor, "batch hidden"] | None = None

    def begin(self, prompt: Prefill) -> None:
        """Start a generation.

        Raises:
            UnsupportedModelError: If the target has no cache that can be read.
        """
        if prompt.cache is None:
            raise UnsupportedModelError(
                f"the target {self._view.name} gives no keys and values of committed tokens, "
                "expected one that verifies trees, because the assistant reads them; see "
                "self_check of the model, and use other heads"
            )
        self._cache, features = ref(prompt.cache), prompt.features
        self._hidden = features[:, -1] if features is not None and features.shape[1] else None

    def commit(self, accepted: Accepted) -> None:
        """Keep the hidden state that each row's last token was chosen from."""
        self._rounds.add(accepted)
        found = self._rounds.take()
        if found is not None:
            self._hidden = found.newest(found.features, self._hidden)

    def catch_up(self, *, num_ranks: int | None = None) -> None:
        """Do nothing: the target has computed what the assistant reads."""

    def start(
        self,
        widths: list[int],  # noqa: ARG002 - no room is needed
        *,
        width: int = 0,  # noqa: ARG002
        num_ranks: int | None = None,  # noqa: ARG002
    ) -> AssistantRun:
        """Return a run from the roots."""
        cache = None if self._cache is None else self._cache()
        assert cache is not None, "propose outside a generation"
        assert self._hidden is not None
        assert self.roots is not None
        return AssistantRun(
            self._network,
            self._view.model.get_input_embeddings(),
            self._network.read(cache),
            roots=self.roots,
            hidden=self._hidden,
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": None}  # that of a call, which a copy has no part in
