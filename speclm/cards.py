"""Model cards of heads and draft models."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GENERATED_MARK = "<!-- written by speclm: remove this line to keep your own changes -->"
"""Marks a generated card. A card without it was written by a user and is kept."""

REPORT_NAME = "report.json"
"""File of a report that holds the records of its measurements."""

CHARTS = {"Speed-up": "speed.png", "Latency": "latency.png", "Acceptance": "acceptance.png"}
"""Files of the charts of a report, by what they show."""

_CARD = """\
---
{front}
---

{mark}

# {title}{for_base}

{summary}

{facts}
{figures}{recipe}
## Load

```python
from speclm import SpecModel
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base_code})
model = SpecModel.from_pretrained({base_code}, {heads_code})
prompt = tokenizer("How many singers are there?", return_tensors="pt").to(model.device)
output = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(output[0]))
print(model.last_speculation)
```

`model.generate` takes what the base model's `generate` takes.

## Serve

`speclm export-server` writes a folder that the OpenAI-compatible server of Transformers serves with
these drafts:

```bash
speclm export-server {base_word} --heads {heads_word} --out served
transformers serve --trust-remote-code served
```

## What is promised

The base model verifies every draft. With the default rule, `exact`, the tokens are those of its own
`generate`, greedy and sampled under the same seed, up to the rounding of floating-point sums: two
tokens of almost the same score may change places, in 16 bits more often than in 32. The rule
`rejection` keeps the base model's output distribution. The rule `typical` is **lossy**: it accepts
draft tokens that the base model would not have drawn, and its output follows another distribution.

Use these files with the base model that they were trained on. With another one the output stays
right and becomes slower, and files for another vocabulary or width are refused.

## Other software

{software}
"""


@dataclass(frozen=True, slots=True)
class HeadsCard:
    """Content of a model card for heads or a draft model.

    Args:
        kind: Tag of the kind of heads.
        title: Heading, without the base.
        summary: What the heads are, in a few sentences.
        facts: Rows of the table that only heads of this kind have, by name.
        software: Names of the files, and what else reads them.
        num_parameters: Number of parameters in all tensors.
        dtype: Name of their dtype.
        num_nodes: Nodes of the stored tree, its root not counted; None if none is stored.
        figures: Measured figures by name; empty if there are none.
        charts: Files of charts of the figures, by what they show.
        recipe: How the heads were trained, by name; empty if that is not recorded.
        curves: File of the curves of the training, if there is one.
        base: Hub id of the base model, if it has one.
        repo_id: Where the heads will be found, if known.
        license: Identifier of the licence, if known.
    """

    kind: str
    title: str
    summary: str
    facts: Mapping[str, str | int]
    software: str
    num_parameters: int
    dtype: str
    num_nodes: int | None = None
    figures: Mapping[str, str] = field(default_factory=dict, hash=False)
    charts: Mapping[str, str] = field(default_factory=dict, hash=False)
    recipe: Mapping[str, object] = field(default_factory=dict, hash=False)
    curves: str | None = None
    base: str | None = None
    repo_id: str | None = None
    license: str | None = None

    def render(self) -> str:
        """Return the card as Markdown with a YAML header."""
        tree = "chosen when they are loaded"
        if self.num_nodes:
            tree = f"{self.num_nodes} nodes, not counting the root"
        facts = {
            "base model": self.base or "not recorded",
            **self.facts,
            "parameters": f"{self.num_parameters:,}",
            "dtype": self.dtype,
            "tree": tree,
        }
        curves = {} if self.curves is None else {"Curves of the training": self.curves}
        return _CARD.format(
            front=self._header(),
            mark=GENERATED_MARK,
            title=self.title,
            for_base=f" for {self.base}" if self.base else "",
            summary=self.summary.strip(),
            facts=_rows(facts),
            figures=_section("Measured", self.figures, self.charts),
            recipe=_section("Training", self.recipe, curves),
            base_code=json.dumps(self.base or "path/to/base"),
            heads_code=json.dumps(self.repo_id or "path/to/this/folder"),
            base_word=shlex.quote(self.base or "path/to/base"),
            heads_word=shlex.quote(self.repo_id or "path/to/this/folder"),
            software=self.software.strip(),
        )

    def _header(self) -> str:
        """Return the lines of the header; strings are quoted as JSON, which is YAML too."""
        lines = ["library_name: speclm"]
        if self.base is not None:
            lines.append(f"base_model: {json.dumps(self.base)}")
        if self.license is not None:
            lines.append(f"license: {json.dumps(self.license)}")
        tags = ("speclm", self.kind, "speculative-decoding", "text-generation")
        return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table of Markdown, without a newline at its end.

    Args:
        header: Names of the columns.
        rows: Cells of each row; line breaks become spaces.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "".join(map(_cell, line)) for line in lines)


def _cell(value: object) -> str:
    text = " ".join(str(value).replace("|", "\\|").split())
    return f" {text} |" if text else " |"


def _rows(facts: Mapping[str, object]) -> str:
    return markdown_table(("", ""), list(facts.items()))


def _section(title: str, facts: Mapping[str, object], charts: Mapping[str, str]) -> str:
    """Return a section with a table and charts; nothing if there are neither."""
    images = [f"![{name}]({file})" for name, file in charts.items()]
    parts = [f"\n## {title}", *([_rows(facts)] if facts else []), *images]
    return "\n\n".join(parts) + "\n" if len(parts) > 1 else ""
