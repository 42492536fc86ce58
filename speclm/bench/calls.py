"""Calls of ``generate`` that are measured: prompts, options and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speclm.config import require_unicode
from speclm.errors import OptionError, PromptError

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


def setting_options(name: str) -> Mapping[str, Any]:
    """Return the arguments of ``generate`` of a named setting.

    Raises:
        OptionError: If `name` is not in `SETTINGS`.
    """
    if name not in SETTINGS:
        raise OptionError(f"setting {name!r} is not known, expected one of {sorted(SETTINGS)!r}")
    return SETTINGS[name]


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens at which the model's generation config ends a row."""
    found: int | list[int] | None = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def render_prompts(
    conversations: Sequence[Conversation | str], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return prompts as texts: apply the chat template to conversations, keep strings.

    Raises:
        OptionError: If a text is not valid Unicode, or there is no chat template.
        PromptError: If the chat template refuses a conversation.
    """
    from jinja2 import TemplateError

    rendered: list[str] = []
    for index, prompt in enumerate(conversations):
        text: Any = prompt
        if not isinstance(prompt, str):
            if not tokenizer.chat_template:
                raise OptionError(
                    f"prompt {index} is a conversation, and the tokenizer has no chat template; "
                    "pass texts, or set tokenizer.chat_template"
                )
            messages = [dict(message) for message in prompt]
            try:
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            except (TemplateError, TypeError, ValueError) as error:
                raise PromptError(
                    f"the chat template refuses prompt {index} ({error}); change its turns, or "
                    "pass texts"
                ) from error
        require_unicode(f"prompt {index}", str(text))
        rendered.append(str(text))
    return rendered


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
    texts = render_prompts(prompts, tokenizer)
    # A chat template writes the special tokens itself.
    needs_special = [isinstance(prompt, str) for prompt in prompts]
    calls: list[Call] = []
    for first in range(0, len(texts), batch):
        encoded = tokenizer(
            texts[first : first + batch],
            return_tensors="pt",
            padding=batch > 1,
            padding_side="left",
            add_special_tokens=needs_special[first],
        ).to(model.device)
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        if 0 in lengths:
            raise PromptError(
                f"prompt {first + lengths.index(0)} has no tokens, expected at least one; drop it"
            )
        calls.append(
            Call(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                options=options,
                seed=seed + first // batch,
                eos_token_ids=eos_token_ids(model),
            )
        )
    return calls
