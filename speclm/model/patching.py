"""`patch`: makes the ``generate`` of a loaded model speculative."""

from typing import Any

from torch import nn

from speclm.model.heads import Heads
from speclm.model.spec_model import SpecModel


def patch(
    base: nn.Module,
    heads: Heads | list[Heads] | tuple[Heads, ...] | None = "lookup",
    *,
    heads_kwargs: dict[str, Any] | None = None,
    num_draft_tokens: int | None = None,
) -> SpecModel:
    """Make ``base.generate`` speculative, until ``detach`` is called or the ``with`` block ends.

    The patch takes effect at once, and only on this model object: copies of it are not patched.
    The arguments are those of `SpecModel.from_pretrained`.

    Returns:
        The model that answers ``base.generate``. Its ``detach`` restores the base's own; its
        ``attach`` patches again.

    Raises:
        PatchError: If the base is patched already.
        SpeclmError: Whatever `SpecModel.from_pretrained` raises; nothing is patched then.

    Example:
        ```python
        import speclm
        from speclm.demo.bundle import assets
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype="float32")
        with speclm.patch(base) as spec:
            base.generate(max_new_tokens=8)
        print(spec.last_speculation.tau)
        ```
    """
    model = SpecModel.from_pretrained(
        base, heads, heads_kwargs=heads_kwargs, num_draft_tokens=num_draft_tokens
    )
    model.attach()
    return model
