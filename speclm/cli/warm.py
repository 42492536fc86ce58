"""``speclm warm``: fill a memory of the target's candidates from a user's own prompts."""

from rich.console import Console

from speclm.cli._display import progress
from speclm.cli._files import prepare_file, read_chats
from speclm.cli._models import load
from speclm.cli._options import WarmOptions
from speclm.errors import OptionError
from speclm.methods.recycling.checkpoint import memory_fingerprint
from speclm.methods.recycling.memory import CandidateMemory
from speclm.methods.recycling.warm import render_texts, warm_memory
from speclm.target import TargetView


def warm(options: WarmOptions) -> None:
    """Read or answer every prompt, and write what the base thought likely."""
    out = options.out
    if out.suffix != ".safetensors":
        raise OptionError(f"--out is {str(out)!r}, expected a file named *.safetensors; rename it")
    chats = read_chats(options.prompts)[: options.num_prompts]
    prepare_file("--out", out)
    loaded, console = load(options), Console(soft_wrap=True)
    base = loaded.base
    fingerprint, vocab_size = memory_fingerprint(base), TargetView(base).vocab_size
    memory = CandidateMemory(vocab_size=vocab_size, max_pairs=options.max_pairs)
    for path in options.merge or ():
        older = CandidateMemory.load(
            path, vocab_size=vocab_size, fingerprint=fingerprint, max_pairs=options.max_pairs
        )
        memory.merge(older)
    texts = render_texts(chats, loaded.tokenizer)
    with progress("reading", total=len(texts)) as count:
        num_read = warm_memory(
            base, texts, memory, max_new_tokens=options.max_new_tokens, on_text=count
        )
    memory.save(out, fingerprint=fingerprint)
    console.print(
        f"{len(texts)} prompts, {num_read} positions read: {memory.num_tokens} tokens, "
        f"{memory.num_pairs} pairs, {out.stat().st_size / 1e6:.1f} MB",
        highlight=False,
    )
    console.print(f"written to {out}", markup=False, highlight=False)
