"""The model card of Medusa heads."""

from dataclasses import dataclass

from speclm.cards import GENERATED_MARK, header, loading

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

{loading}
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
            front=header("medusa", base=self.base, license_id=self.license),
            mark=GENERATED_MARK,
            for_base=f" for {self.base}" if self.base else "",
            base=self.base or "not recorded",
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            lm_head="one in each head" if self.has_own_lm_head else "the base model's",
            parameters=f"{self.num_parameters:,}",
            dtype=self.dtype,
            tree=f"{self.num_nodes} nodes" if self.num_nodes else "chosen when they are loaded",
            loading=loading(self.base, self.repo_id),
        )
