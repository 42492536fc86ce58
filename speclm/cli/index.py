"""``speclm index``: an index over texts, for drafts of what followed the same tokens there."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from speclm.cli._display import progress
from speclm.cli._files import prepare_file, read_lines
from speclm.cli._options import IndexOptions
from speclm.demo.bundle import assets
from speclm.errors import DataError, OptionError, UnknownNameError, reason_of
from speclm.files.json_lines import JsonLine
from speclm.methods.ngram.corpus import PROMPT_TAIL, vocabulary_fingerprint
from speclm.methods.ngram.suffix_index import SuffixIndex
from speclm.training.conversations import parse_conversation
from speclm.training.loss_masks import tokenize_conversation


def index(options: IndexOptions) -> None:
    """Tokenize texts, and write an index over them."""
    prepare_file("--out", options.out)
    lines = read_lines(options.data, "--data")
    name = str(assets()["base"]) if options.base is None else options.base
    tokenizer, config = _load(name)
    console = Console()
    documents: list[list[int]] = []
    with progress("tokenizing", total=len(lines)) as count:
        for line in lines:
            documents += _tokenize(line, tokenizer)
            count(line)
    with Console(stderr=True).status("sorting"):
        built = SuffixIndex.build(documents)
    vocab_size: int = config.get_text_config().vocab_size
    try:
        built.save(options.out, vocab_size=vocab_size, fingerprint=vocabulary_fingerprint(config))
        size = options.out.stat().st_size
    except OSError as error:
        raise OptionError(
            f"--out {str(options.out)!r} cannot be written ({error}); name a file in a folder that "
            "you may write to"
        ) from error
    console.print(
        f"{len(built)} tokens of {len(documents)} texts, {size / 1e6:.1f} MB, written to "
        f"{options.out}",
        markup=False,
        highlight=False,
    )


def _load(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Return the tokenizer and the config of a base, whose weights are not needed."""
    tokenizer: Any
    config: Any
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UnknownNameError(
            f"--base {name!r} is not a folder or hub id of a model with a tokenizer "
            f"({reason_of(error)}); correct it"
        ) from error
    return tokenizer, config


def _tokenize(line: JsonLine, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of a text, or of each answer of a conversation."""
    match line.parse():
        case {"messages": _}:
            for example in tokenize_conversation(parse_conversation(line), tokenizer):
                tokens, start = example["input_ids"], 0
                for is_answer, marks in groupby(example["loss_mask"]):
                    end = start + len(list(marks))
                    if is_answer:
                        yield tokens[max(start - PROMPT_TAIL, 0) : end]
                    start = end
        case {"text": str(text)} if text:
            encoded: Any = tokenizer(text, add_special_tokens=False)
            yield list(encoded["input_ids"])
        case _:
            raise DataError(
                f'{line.where}: expected "messages", a list of objects with a "role", or "text", '
                f"a string that is not empty, found {line.excerpt}; correct the row"
            )
