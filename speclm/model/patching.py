"""Makes the `generate` of a base itself speculative, for code that is handed the base."""

from typing import Any

from torch import nn

from speclm.model.loading import Heads
from speclm.model.spec_model import SpecModel


def patch(
    base: nn.Module,
    heads: Heads | list[Heads] | tuple[Heads, ...] | None = "ngram",
    *,
    heads_kwargs: dict[str, Any] | None = None,
    num_draft_tokens: int | None = None,
) -> SpecModel:
    """Make ``base.generate`` speculative, until ``detach`` is called or the ``with`` block ends.

    The patch is on from the call. It belongs to this model object: copies of it are plain.

    Args:
        base: Loaded model, or a PEFT model around one.
        heads: As in `SpecModel.from_pretrained`.
        heads_kwargs: As in `SpecModel.from_pretrained`.
        num_draft_tokens: As in `SpecModel.from_pretrained`.

    Returns:
        What ``base.generate`` goes to. Its ``detach`` gives the base back the generate that it
        had; its ``attach`` patches again.

    Raises:
        PatchError: If the base is patched already.
        SpeclmError: Whatever `SpecModel.from_pretrained` raises; nothing is patched then.

    Example:
        ```python
        import speclm
        from speclm.demo.bundle import assets
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype="float32")
        with speclm.patch(base, "ngram") as spec:
            base.generate(max_new_tokens=8)
        print(spec.last_speculation.tau)
        ```
    """
    model = SpecModel.from_pretrained(
        base, heads, heads_kwargs=heads_kwargs, num_draft_tokens=num_draft_tokens
    )
    model.attach()
    return model
