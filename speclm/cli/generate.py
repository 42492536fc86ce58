"""``speclm generate``: answers one prompt."""

import typer
from rich.console import Console

from speclm.bench import Decoder, Outcome, make_calls, plain_decoder, speculative_decoder
from speclm.cli._console import printable
from speclm.cli._display import coloured
from speclm.cli._files import read_prompt
from speclm.cli._models import load_with_heads
from speclm.cli._options import GenerateOptions
from speclm.errors import OptionError


def generate(options: GenerateOptions) -> None:
    """Answer a prompt, and compare with regular generation on request."""
    text = read_prompt(options.prompt, options.file)
    loaded = load_with_heads(options)
    tokenizer = loaded.tokenizer
    if options.chat and not tokenizer.chat_template:
        raise OptionError("the tokenizer has no chat template; pass --no-chat")
    (call,) = make_calls(
        [[{"role": "user", "content": text}] if options.chat else text],
        loaded.base,
        tokenizer,
        options=options.arguments(),
        seed=options.seed,
    )
    spec = loaded.spec
    methods: list[Decoder] = [
        speculative_decoder(
            "speclm", loaded.base, spec.proposer, tree=spec.tree, engine=spec.engine
        )
    ]
    if options.compare:
        methods.append(plain_decoder(loaded.base))
        for method in methods:  # warms up, so that the comparison is fair
            method.run(call)
            method.forget()
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
    if options.compare:
        is_identical = own.tokens == outcomes["plain"].tokens
        console.print(f"identical: {'yes' if is_identical else 'NO'}", highlight=False)
        if not is_identical:
            raise typer.Exit(1)


def _summary(name: str, outcome: Outcome) -> str:
    line = f"{name}: {outcome.num_tokens} tokens, {outcome.tokens_per_second:.0f} tokens/s"
    if outcome.stats is None:
        return line
    if outcome.stats.fallbacks:
        return f"{line}, regular generation: {'; '.join(outcome.stats.fallbacks)}"
    return f"{line}, tau {outcome.stats.tau:.2f} over {outcome.stats.rounds} rounds"
