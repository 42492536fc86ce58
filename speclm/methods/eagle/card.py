"""The model card of EAGLE heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speclm.cards import GENERATED_MARK, header, loading

_CARD = """\
---
{front}
---

{mark}

# {name} heads{for_base}

A small decoder for speculative decoding. It joins {features} of the base model with
the token that came after, and guesses on from there, guess after guess; the base model verifies all
guesses in one forward.

| | |
| --- | --- |
| base model | {base} |
| decoder layers | {num_layers} |
| hidden states read | {layers} |
| tokens guessed | {vocabulary} |
| output matrix | {lm_head} |
| parameters | {parameters} |
| dtype | {dtype} |
| tree | {tree} |
{figures}
{loading}
## Other software

The files are `model.safetensors` and `config.json`, in the layout of {layout}
"""

_LAYOUTS = {
    "eagle": """\
SafeAILab's EAGLE-1 and 2,
which vLLM reads too, but for a bias after the joined inputs, which it leaves out.""",
    "eagle3": """\
SafeAILab's and SpecForge's
EAGLE-3. vLLM and SGLang read heads of one layer in it. SGLang counts hidden states that are named
in `config.json` from the one after, and has no residual after the norm.""",
}


@dataclass(frozen=True, slots=True)
class EagleCard:
    """What the card of EAGLE heads says.

    Args:
        kind: ``"eagle"`` or ``"eagle3"``.
        num_layers: Decoder layers.
        feature_layers: Hidden states of the base that EAGLE-3 reads, 0 being the embeddings.
        vocab_size: Tokens of the base.
        draft_vocab_size: Tokens that the heads choose from.
        has_own_lm_head: Whether they have an output matrix.
        num_parameters: Numbers in all of them.
        dtype: Name of their type.
        num_nodes: Nodes of the stored tree, root included; None if none is stored.
        figures: What was measured, in words, by its name; nothing is said where it is empty.
        base: Hub id of the base model, if it has one.
        repo_id: Where the heads will be found, if known.
        license: Identifier of the licence, if known.
    """

    kind: str
    num_layers: int
    feature_layers: tuple[int, ...]
    vocab_size: int
    draft_vocab_size: int
    has_own_lm_head: bool
    num_parameters: int
    dtype: str
    num_nodes: int | None = None
    figures: Mapping[str, str] = field(default_factory=dict, hash=False)
    base: str | None = None
    repo_id: str | None = None
    license: str | None = None

    def render(self) -> str:
        """Return the card as Markdown with a YAML header."""
        is_eagle3 = self.kind == "eagle3"
        layers = ", ".join(map(str, self.feature_layers))
        vocabulary = f"{self.draft_vocab_size:,} of {self.vocab_size:,}"
        return _CARD.format(
            front=header(self.kind, base=self.base, license_id=self.license),
            mark=GENERATED_MARK,
            name="EAGLE-3" if is_eagle3 else "EAGLE",
            for_base=f" for {self.base}" if self.base else "",
            features="several hidden states" if is_eagle3 else "the last hidden state",
            base=self.base or "not recorded",
            num_layers=self.num_layers,
            layers=f"{layers} (0 is the embeddings)" if is_eagle3 else "the last",
            vocabulary="all" if self.draft_vocab_size == self.vocab_size else vocabulary,
            lm_head="their own" if self.has_own_lm_head else "the base model's",
            parameters=f"{self.num_parameters:,}",
            dtype=self.dtype,
            tree=f"{self.num_nodes} nodes" if self.num_nodes else "chosen when they are loaded",
            figures=self._figures(),
            loading=loading(self.base, self.repo_id),
            layout=_LAYOUTS[self.kind],
        )

    def _figures(self) -> str:
        if not self.figures:
            return ""
        rows = [f"| {name} | {value} |" for name, value in self.figures.items()]
        return "\n".join(["", "## Measured", "", "| | |", "| --- | --- |", *rows, ""])
