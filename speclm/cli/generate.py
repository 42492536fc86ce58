"""``speclm generate``: answers one prompt."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from speclm.bench import Decoder, Outcome, make_calls, plain_decoder, speculative_decoder
from speclm.cli._console import printable
from speclm.cli._models import HeadsRevision, load, read_prompt
from speclm.cli._options import MaxNewTokens, Seed
from speclm.cli._tables import coloured
from speclm.errors import OptionError


def generate(  # noqa: PLR0913, PLR0917 - each is an option of the command
    prompt: Annotated[str | None, typer.Option(help="Text of the prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with the prompt.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help='Proposer name, folder or hub id of a draft model, or "none".'),
    ] = None,
    heads_revision: HeadsRevision = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option(help="Apply the chat template.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, auto.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode plainly too; exit code 1 if it differs.")
    ] = False,
) -> None:
    """Generate an answer; tokens that were drafted and accepted are coloured."""
    text = read_prompt(prompt, file)
    loaded = load(base, heads, dtype=dtype, heads_revision=heads_revision)
    tokenizer = loaded.tokenizer
    if chat and not tokenizer.chat_template:
        raise OptionError("the tokenizer has no chat template; pass --no-chat")
    (call,) = make_calls(
        [[{"role": "user", "content": text}] if chat else text],
        loaded.base,
        tokenizer,
        options=_options(temperature, top_p, max_new_tokens),
        seed=seed,
    )
    methods: list[Decoder] = [speculative_decoder("speclm", loaded.base, loaded.spec.proposer)]
    if compare:
        methods.append(plain_decoder(loaded.base))
        for method in methods:  # warms up, so that the comparison is fair
            method.run(call)
    outcomes = {method.name: method.run(call) for method in methods}
    console = Console()
    own = outcomes["speclm"]
    if own.stats is not None and own.stats.rows:
        console.print(coloured(own.tokens[0], own.stats.rows[0], tokenizer))
    else:
        decoded = str(tokenizer.decode(own.tokens[0], skip_special_tokens=True))
        console.print(printable(decoded), markup=False, highlight=False)
    for name, outcome in outcomes.items():
        console.print(_summary(name, outcome), style="dim", highlight=False)
    if compare:
        is_identical = own.tokens == outcomes["plain"].tokens
        console.print(f"identical: {'yes' if is_identical else 'NO'}", highlight=False)
        if not is_identical:
            raise typer.Exit(1)


def _options(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    if temperature == 0.0:
        return {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,
        "max_new_tokens": max_new_tokens,
    }


def _summary(name: str, outcome: Outcome) -> str:
    line = f"{name}: {outcome.num_tokens} tokens, {outcome.tokens_per_second:.0f} tokens/s"
    if outcome.stats is None:
        return line
    if outcome.stats.fallbacks:
        return f"{line}, decoded plainly: {'; '.join(outcome.stats.fallbacks)}"
    return f"{line}, tau {outcome.stats.tau:.2f} over {outcome.stats.rounds} rounds"
