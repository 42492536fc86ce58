"""The model card of Medusa heads."""

import json
from dataclasses import dataclass

GENERATED_MARK = "<!-- written by speclm: remove this line to keep your own changes -->"
"""Stands in every generated card; a card without it belongs to somebody."""

_CARD = """\
---
{front}
---

{mark}

# Medusa heads{for_base}

{num_heads} draft heads for speculative decoding. Head i guesses the token i + 2 positions after the
hidden state that it sees; the base model verifies all guesses in one forward.

| | |
| --- | --- |
| base model | {base} |
| heads | {num_heads} |
| residual layers of each head | {num_layers} |
| output matrix | {lm_head} |
| parameters | {parameters} |
| dtype | {dtype} |
| tree | {tree} |

## Load

```python
from speclm import SpecModel

model = SpecModel.from_pretrained({base_code}, {heads_code})
```

`model.generate` takes what the base model's `generate` takes.

## What is promised

The heads only guess. With the default rule, `exact`, the tokens are those of the base model's own
`generate`, greedy and sampled under the same seed, up to the rounding of floating-point sums: two
tokens of almost the same score may change places, in 16 bits more often than in 32. The rule
`rejection` keeps the base model's output distribution. The rule `typical` is **lossy**: it accepts
guesses that the base model would not have drawn, and its output follows another distribution.

Use the heads with the base model that they were trained on. With another one nothing becomes wrong,
only slower, and they are refused where the vocabulary or the width differs.

## Other software

The files are `medusa_lm_head.safetensors` and `config.json`, named as TGI and vLLM up to 0.32
expect them; heads without an output matrix are for TGI and speclm alone.
"""


@dataclass(frozen=True, slots=True)
class MedusaCard:
    """What the card of Medusa heads says.

    Args:
        num_heads: Heads.
        num_layers: Residual layers of each head.
        has_own_lm_head: Whether each head has an output matrix.
        num_parameters: Numbers in all heads.
        dtype: Name of their type.
        num_nodes: Nodes of the stored tree, root included; None if none is stored.
        base: Hub id of the base model, if it has one.
        repo_id: Where the heads will be found, if known.
        license: Identifier of the licence, if known.
    """

    num_heads: int
    num_layers: int
    has_own_lm_head: bool
    num_parameters: int
    dtype: str
    num_nodes: int | None
    base: str | None = None
    repo_id: str | None = None
    license: str | None = None

    def render(self) -> str:
        """Return the card as Markdown with a YAML header."""
        return _CARD.format(
            front="\n".join(self._front()),
            mark=GENERATED_MARK,
            for_base=f" for {self.base}" if self.base else "",
            base=self.base or "not recorded",
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            lm_head="one in each head" if self.has_own_lm_head else "the base model's",
            parameters=f"{self.num_parameters:,}",
            dtype=self.dtype,
            tree=f"{self.num_nodes} nodes" if self.num_nodes else "chosen when they are loaded",
            base_code=json.dumps(self.base or "path/to/base"),
            heads_code=json.dumps(self.repo_id or "path/to/this/folder"),
        )

    def _front(self) -> list[str]:
        """Return the lines of the header; strings are quoted as JSON, which is YAML too."""
        lines = ["library_name: speclm"]
        if self.base is not None:
            lines.append(f"base_model: {json.dumps(self.base)}")
        if self.license is not None:
            lines.append(f"license: {json.dumps(self.license)}")
        tags = ("speclm", "medusa", "speculative-decoding", "text-generation")
        return [*lines, "tags:", *(f"- {tag}" for tag in tags)]
