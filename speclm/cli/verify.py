"""``speclm verify``: checks that a model decodes the same tokens with drafts."""

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from speclm.bench import Cell, Decoder, make_calls, measure_grid, plain_decoder, setting_options
from speclm.bench.decoders import Call
from speclm.cli._console import printable
from speclm.cli._display import progress, verdict
from speclm.cli._models import load
from speclm.cli._options import VerifyOptions
from speclm.demo.bundle import load_prompts
from speclm.errors import OptionError
from speclm.model import SpecModel
from speclm.model.checking import check_heads
from speclm.testing import ScriptedProposer

_WRONG_EVERY = 5
"""Every fifth draft token is wrong, so that accepted lengths vary."""


def verify(options: VerifyOptions) -> None:
    """Check heads, if some are named, or else a model."""
    if options.heads is not None:
        _verify_heads(options, options.heads)
        return
    of_heads = ("source", "heads_revision", "heads_subfolder", "token_map")
    _require_unused(options, of_heads, "with heads; name them")
    _verify_model(options)


def _require_unused(options: VerifyOptions, names: tuple[str, ...], reason: str) -> None:
    """Check that options which would have no effect are not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise OptionError(f"{option} is {value!r}, which only says something {reason}")


def _verify_heads(options: VerifyOptions, heads: str) -> None:
    """Print what heads are, and compare them with their base and source."""
    _require_unused(
        options,
        ("dtype", "device", "device_map", "quantization"),
        "without heads: those are compared on the CPU in float32; leave it out",
    )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    given = {
        "revision": options.heads_revision,
        "subfolder": options.heads_subfolder,
        "cache_dir": options.cache_dir,
        "token_map": options.token_map,
    }
    found = check_heads(
        heads,
        base=options.base,
        source=options.source,
        revision=options.revision,
        heads_kwargs={name: value for name, value in given.items() if value is not None},
    )
    console = Console(soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    made = found.provenance
    origin = {"written by": f"speclm {made.get('speclm_version')} as {made.get('format')}"}
    rows = {"method": found.method, "formats": ", ".join(found.formats), **found.facts}
    for name, text in (rows | (origin if made else {})).items():
        table.add_row(name, printable(text))
    for engine in found.engines:
        table.add_row("loaded by", printable(f"{engine.name}, {engine.versions}"))
    console.print(table)
    if found.difference is None:
        console.print("\nnot compared with a source: name one with --source", markup=False)
        return
    verdict = "equal to" if found.is_equal else f"differ by up to {found.difference:.2e} from"
    console.print(f"\nlogits {verdict} those of {printable(found.source or '')}", markup=False)
    if not found.is_equal:
        raise typer.Exit(1)


def _verify_model(options: VerifyOptions) -> None:
    """Print the self-check's verdict, and compare outputs with those of regular generation."""
    console, loaded = Console(), load(options)
    loaded.spec.print_report(write=console.print)
    method = _scripted_decoder(loaded.base)
    half = -(-options.num_prompts // 2)
    texts = [*load_prompts("sql_tune", limit=half), *load_prompts("gsm8k_tune", limit=half)]
    chats = texts[: options.num_prompts]
    has_template = loaded.tokenizer.chat_template is not None
    questions = chats if has_template else [chat[-1]["content"] for chat in chats]
    cells = [
        Cell(
            make_calls(
                questions,
                loaded.base,
                loaded.tokenizer,
                options={**setting_options(setting), "max_new_tokens": options.max_new_tokens},
                batch=size,
            ),
            {"setting": setting, "batch": size},
        )
        for setting in ("greedy", "t1.0")
        for size in dict.fromkeys((1, options.batch))
    ]
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for name in ("setting", "batch", "tau", "identical"):
        table.add_column(name)
    is_honest = True
    num_pairs = sum(len(cell.calls) for cell in cells)
    with progress("decoding", total=num_pairs) as count:
        for result in measure_grid(
            cells, [method], base=loaded.base, benchmark="verify", on_pair=count
        ):
            comparison, settings = result.comparison, result.cell.settings
            tau = "" if comparison.stats is None else f"{comparison.stats.tau:.2f}"
            table.add_row(settings["setting"], str(settings["batch"]), tau, verdict(comparison))
            is_honest = is_honest and comparison.is_honest
    console.print()
    console.print(table)
    if not is_honest:
        raise typer.Exit(1)


def _scripted_decoder(base: PreTrainedModel) -> Decoder:
    """Return a method that drafts the tokens of regular generation, with errors."""
    spec = SpecModel(base, None, adaptive=False)
    plain = plain_decoder(base)

    def generate(call: Call) -> Tensor:
        tokens = plain.run(call).tokens
        longest = max(map(len, tokens))
        spec.proposer = ScriptedProposer(tokens, wrong_at=range(3, longest, _WRONG_EVERY))
        torch.manual_seed(call.seed)  # again, because the regular run has drawn
        output = spec.generate(**call.arguments)
        assert isinstance(output, Tensor)
        return output

    return Decoder("scripted", generate, lambda: spec.last_speculation, promises_identity=True)
