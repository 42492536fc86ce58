"""A row of the table of families, and what rows share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speclm.self_check.verdict import Verification
from tests.models import WINDOW

GLOBAL = "full_attention"
HALF_WINDOW: dict[str, object] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", GLOBAL],
}
EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, object] = {  # keys and values of unequal width
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table.

    Args:
        model_type: As Transformers names it.
        settings: What differs from `tests.models.SHAPE`.
        examples: Models of the family, for the compatibility page.
        variant: What distinguishes it from other rows of its type.
        backend: How it is verified.
        reason: Words of the self-check's reason, where that is not by trees.
        since: First Transformers version that has the model type, of those we test.
        embedding_scale: See `tests.models.randomise`.
        seed: Of weights whose greedy output does not repeat itself at once.
    """

    model_type: str
    settings: Mapping[str, object] = field(default_factory=dict)
    examples: str = ""
    variant: str = ""
    backend: Verification = Verification.TREES
    reason: str = ""
    since: str = "5.17"
    embedding_scale: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the row, which no other has."""
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type
