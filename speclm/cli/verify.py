"""``speclm verify``: whether a model decodes the same tokens with drafts, and by which backend."""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from speclm.bench import Cell, Decoder, make_calls, measure_grid, plain_decoder, setting_options
from speclm.bench.calls import Call
from speclm.cli._models import load
from speclm.cli._options import MaxNewTokens
from speclm.cli._tables import verdict
from speclm.demo.bundle import load_prompts
from speclm.model import SpecModel
from speclm.testing import ScriptedProposer

_WRONG_EVERY = 5
"""Every so many guesses are wrong: drafts of all lengths are accepted, and none for ever."""


def verify(
    base: Annotated[
        str | None, typer.Argument(help="Folder or hub id; by default the bundled model.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each setting.")] = 8,
    max_new_tokens: MaxNewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the larger calls.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, auto.")] = None,
) -> None:
    """Check a model: the self-check's verdict, and outputs next to those of regular generation.

    Drafts are the true tokens with errors here and there, so that much is accepted and much is
    not, whatever model it is.
    """
    console, loaded = Console(), load(base, "none", dtype=dtype)
    loaded.spec.print_report(write=console.print)
    method = _scripted_decoder(loaded.base)
    half = -(-prompts // 2)
    texts = [*load_prompts("sql_tune", limit=half), *load_prompts("gsm8k_tune", limit=half)]
    chats = texts[:prompts]
    has_template = loaded.tokenizer.chat_template is not None
    questions = chats if has_template else [chat[-1]["content"] for chat in chats]
    cells = [
        Cell(
            make_calls(
                questions,
                loaded.base,
                loaded.tokenizer,
                options={**setting_options(setting), "max_new_tokens": max_new_tokens},
                batch=size,
            ),
            {"setting": setting, "batch": size},
        )
        for setting in ("greedy", "t1.0")
        for size in dict.fromkeys((1, batch))
    ]
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for name in ("setting", "batch", "tau", "identical"):
        table.add_column(name)
    is_honest = True
    with console.status("decoding"):
        for result in measure_grid(cells, [method], base=loaded.base, benchmark="verify"):
            comparison, settings = result.comparison, result.cell.settings
            tau = "" if comparison.stats is None else f"{comparison.stats.tau:.2f}"
            table.add_row(settings["setting"], str(settings["batch"]), tau, verdict(comparison))
            is_honest = is_honest and comparison.is_honest
    console.print()
    console.print(table)
    if not is_honest:
        raise typer.Exit(1)


def _scripted_decoder(base: PreTrainedModel) -> Decoder:
    """Return a method that drafts what regular generation says, with errors."""
    spec = SpecModel(base, None, adaptive=False)
    plain = plain_decoder(base)

    def generate(call: Call) -> Tensor:
        tokens = plain.run(call).tokens
        longest = max(map(len, tokens))
        spec.proposer = ScriptedProposer(tokens, wrong_at=range(3, longest, _WRONG_EVERY))
        torch.manual_seed(call.seed)  # anew: the plain run has drawn
        output = spec.generate(**call.arguments)
        assert isinstance(output, Tensor)
        return output

    return Decoder("scripted", generate, lambda: spec.last_speculation, promises_identity=True)
