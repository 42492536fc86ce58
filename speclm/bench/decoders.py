"""Calls to measure, and the methods that answer them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from speclm.cache import CACHE_NAME
from speclm.config import require_unicode
from speclm.drafting.interface import Proposer
from speclm.engines import Engine
from speclm.errors import OptionError, PromptError
from speclm.files.questions import Question
from speclm.model import SpecModel
from speclm.model.call import Tree
from speclm.stats import SpeculationStats
from speclm.target.loading import eos_token_ids

SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "greedy": MappingProxyType({"do_sample": False}),
        "t0.7": MappingProxyType({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}),
        "t1.0": MappingProxyType({"do_sample": True, "temperature": 1.0, "top_k": 0}),
    }
)
"""Named arguments of ``generate``: greedy, a usual sampling, and the model's own distribution."""

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of ``generate``.

    Args:
        input_ids: Prompts, padded on the left, on the model's device.
        attention_mask: Zero at padding.
        options: Further arguments of ``generate``.
        seed: Given to ``torch.manual_seed`` before the call.
        eos_token_ids: Tokens that end a row.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    options: Mapping[str, Any]
    seed: int
    eos_token_ids: frozenset[int]

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            **self.options,
        }

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are sampled."""
        return bool(self.options.get("do_sample"))

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.input_ids)

    def answered_by(self, decoder: "Decoder") -> "list[Answer]":
        """Return the one answer of a method."""
        return [Answer(self, decoder.run(self))]


def setting_options(name: str) -> Mapping[str, Any]:
    """Return the arguments of ``generate`` of a named setting.

    Raises:
        OptionError: If `name` is not in `SETTINGS`.
    """
    if name not in SETTINGS:
        raise OptionError(f"setting {name!r} is not known, expected one of {sorted(SETTINGS)!r}")
    return SETTINGS[name]


def render_prompt(name: str, prompt: Conversation | str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as text: apply the chat template to a conversation, keep a string.

    Args:
        name: What messages call it.
        prompt: The prompt.
        tokenizer: Has the chat template.

    Raises:
        OptionError: If the text is not valid Unicode, or there is no chat template.
        PromptError: If the chat template refuses the conversation.
    """
    from jinja2 import TemplateError

    text: Any = prompt
    if not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise OptionError(
                f"{name} is a conversation, and the tokenizer has no chat template; pass texts, or "
                "set tokenizer.chat_template"
            )
        messages = [dict(message) for message in prompt]
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(
                f"the chat template refuses {name} ({error}); change its turns, or pass texts"
            ) from error
    require_unicode(name, str(text))
    return str(text)


def encode_prompt(
    name: str, prompt: Conversation | str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens of a prompt; arguments and further errors as of `render_prompt`.

    Raises:
        PromptError: If there are none.
    """
    text = render_prompt(name, prompt, tokenizer)
    # A chat template writes the special tokens itself.
    needs_special = isinstance(prompt, str)
    encoded = tokenizer(text, add_special_tokens=needs_special, verbose=False)["input_ids"]
    if not encoded:
        raise PromptError(f"{name} has no tokens, expected at least one; drop it")
    return list(encoded)


def make_calls(
    prompts: Sequence[Conversation | str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: Mapping[str, Any],
    batch: int = 1,
    seed: int = 0,
) -> list[Call]:
    """Split prompts into batches, each the input of one call.

    Args:
        prompts: Conversations, to which the chat template is applied, or texts.
        model: Gives device and end-of-sequence tokens.
        tokenizer: The model's tokenizer.
        options: Arguments of ``generate``.
        batch: Prompts per call; the last call may have fewer.
        seed: Seed of the first call, incremented by one for each further call.

    Raises:
        OptionError: If a text is not valid Unicode, or there is no chat template.
        PromptError: If a prompt has no tokens, or the chat template refuses it.
    """
    rows = [
        encode_prompt(f"prompt {index}", prompt, tokenizer) for index, prompt in enumerate(prompts)
    ]
    padding = tokenizer.pad_token_id or 0  # it is masked, so any token will do
    calls: list[Call] = []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        missing = [max(map(len, some)) - len(row) for row in some]
        ids = [[padding] * num + row for num, row in zip(missing, some, strict=True)]
        mask = [[0] * num + [1] * len(row) for num, row in zip(missing, some, strict=True)]
        calls.append(
            Call(
                input_ids=torch.tensor(ids, dtype=torch.long, device=model.device),
                attention_mask=torch.tensor(mask, dtype=torch.long, device=model.device),
                options=options,
                seed=seed + first // batch,
                eos_token_ids=eos_token_ids(model),
            )
        )
    return calls


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one call.

    Args:
        tokens: New tokens of each row, up to and with the first end-of-sequence token.
        seconds: Wall time of the call, prefill included.
        stats: Counters of speculation; None for a method without counters.
    """

    tokens: list[list[int]]
    seconds: float
    stats: SpeculationStats | None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of all rows."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one turn.

    Args:
        call: The whole prompt of the turn, without a cache.
        outcome: What was generated.
        question: The question that has the turn; None for a call that belongs to none.
        turn: Index of the turn.
    """

    call: Call
    outcome: Outcome
    question: Question | None = None
    turn: int = 0


@runtime_checkable
class Task(Protocol):
    """What methods are measured on: a `Call`, or a `Dialogue` of several turns."""

    @property
    def num_rows(self) -> int:
        """Rows of a batch."""

    def answered_by(self, decoder: "Decoder") -> list[Answer]:
        """Return the answers of a method, one for each turn."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to generate: regular generation, or a method.

    Args:
        name: Name in tables and records.
        generate: Returns prompts and new tokens, or what ``generate`` returns if the call asks
            for more.
        stats: Returns the counters of the last call.
        promises_identity: Whether the outputs have to be those of regular generation.
        max_batch: Largest batch that it can generate; None for any.
        forget: Makes it forget what earlier calls taught.
        keeps_cache: Whether it can go on with the cache that it returns.
    """

    name: str
    generate: Callable[[Call], Tensor | ModelOutput]
    stats: Callable[[], SpeculationStats | None]
    promises_identity: bool
    max_batch: int | None = None
    forget: Callable[[], None] = lambda: None
    keeps_cache: bool = True

    def can_run(self, batch: int) -> bool:
        """Return whether it can generate a batch of that size."""
        return self.max_batch is None or batch <= self.max_batch

    def run(self, call: Call) -> Outcome:
        """Seed, generate and measure the time."""
        return self.run_with_cache(call)[0]

    def run_with_cache(self, call: Call) -> tuple[Outcome, Cache | None]:
        """Do what `run` does, and return the cache too if the call asks for it."""
        torch.manual_seed(call.seed)
        _synchronize(call.input_ids)
        start = perf_counter()
        output = self.generate(call)
        _synchronize(call.input_ids)
        seconds = perf_counter() - start
        cache = None
        if not isinstance(output, Tensor):
            output, cache = output["sequences"], output.get(CACHE_NAME)
        new = output[:, call.input_ids.shape[1] :].tolist()
        tokens = [until_end(row, call.eos_token_ids) for row in new]
        return Outcome(tokens=tokens, seconds=seconds, stats=self.stats()), cache


def until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to and with the first end-of-sequence token."""
    for index, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: index + 1]
    return tokens


def plain_decoder(base: PreTrainedModel) -> Decoder:
    """Return regular generation: ``base.generate``."""
    return Decoder("plain", _generate_with(base), _no_stats, promises_identity=True)


def prompt_lookup_decoder(base: PreTrainedModel, *, num_tokens: int = 10) -> Decoder:
    """Return Transformers' prompt lookup.

    Args:
        base: The model.
        num_tokens: Draft tokens per round; 10 is the value in Transformers' documentation.
    """
    return Decoder(
        name="prompt_lookup",
        generate=_generate_with(base, prompt_lookup_num_tokens=num_tokens),
        stats=_no_stats,
        promises_identity=False,  # when sampling, it draws other tokens
        max_batch=1,
        keeps_cache=False,  # it would give other tokens than without, in Transformers 5.23
    )


def assisted_decoder(base: PreTrainedModel, assistant: PreTrainedModel) -> Decoder:
    """Return Transformers' assisted generation.

    Transformers adapts the number of draft tokens in the assistant's generation config, which is
    restored after each call, so that every call starts alike.
    """
    generate = _generate_with(base, assistant_model=assistant)

    def generate_and_restore(call: Call) -> Tensor | ModelOutput:
        before = assistant.generation_config
        assistant.generation_config = copy.deepcopy(before)
        try:
            return generate(call)
        finally:
            assistant.generation_config = before

    return Decoder(
        "assisted",
        generate_and_restore,
        _no_stats,
        promises_identity=False,
        max_batch=1,
        keeps_cache=False,
    )


def speculative_decoder(
    name: str,
    base: PreTrainedModel,
    heads: Proposer | None,
    *,
    tree: Tree | None = None,
    engine: str | Engine = "auto",
    adaptive: bool = True,
) -> Decoder:
    """Return `SpecModel` with a proposer.

    Args:
        name: Name in tables and records.
        base: The model.
        heads: The proposer; None for one token per round.
        tree: Passed to ``generate``; None for the proposer's own settings.
        engine: Passed to ``generate``.
        adaptive: Whether speculation pauses while it does not pay.
    """
    model = SpecModel(base, heads, engine=engine, adaptive=adaptive)

    def generate(call: Call) -> Tensor | ModelOutput:
        return model.generate(**call.arguments, tree=tree)

    def forget() -> None:
        if heads is not None:
            heads.forget()

    return Decoder(
        name, generate, lambda: model.last_speculation, promises_identity=True, forget=forget
    )


def _generate_with(base: PreTrainedModel, **options: Any) -> Callable[[Call], Tensor | ModelOutput]:
    def generate(call: Call) -> Tensor | ModelOutput:
        output: Tensor | ModelOutput = base.generate(  # type: ignore[operator]  # mixin
            **call.arguments, **options
        )
        return output

    return generate


def _no_stats() -> SpeculationStats | None:
    return None


def _synchronize(tokens: Tensor) -> None:
    if tokens.device.type != "cpu":
        torch.accelerator.synchronize(tokens.device)
