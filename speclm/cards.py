"""What the cards of all heads have in common."""

import json

GENERATED_MARK = "<!-- written by speclm: remove this line to keep your own changes -->"
"""Stands in every generated card; a card without it belongs to somebody."""

LOADING = """\
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
"""


def header(kind: str, *, base: str | None, license_id: str | None) -> str:
    """Return the lines of a card's header; strings are quoted as JSON, which is YAML too."""
    lines = ["library_name: speclm"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    if license_id is not None:
        lines.append(f"license: {json.dumps(license_id)}")
    tags = ("speclm", kind, "speculative-decoding", "text-generation")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def loading(base: str | None, repo_id: str | None) -> str:
    """Return how heads are loaded, and what is promised of them."""
    return LOADING.format(
        base_code=json.dumps(base or "path/to/base"),
        heads_code=json.dumps(repo_id or "path/to/this/folder"),
    )
