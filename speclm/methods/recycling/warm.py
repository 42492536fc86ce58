"""Fills a memory from texts: the target reads them, and its candidates are stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speclm.config import require_size, require_unicode
from speclm.errors import OptionError, PromptError, VocabularyMismatchError, reason_of
from speclm.methods.recycling.memory import CandidateMemory
from speclm.target import TargetFeatures, TargetView

MAX_LOGITS = 2**24
"""Logits that are computed at once, 64 MB in float32."""

Chat = str | Sequence[Mapping[str, Any]]
"""The text of a prompt, or messages as chat templates take them."""


@dataclass(frozen=True, slots=True)
class WarmText:
    """A chat as tokens.

    Args:
        tokens: The prompt, with the answer if the chat has one.
        is_answered: Whether it has one.
    """

    tokens: list[int]
    is_answered: bool


@torch.no_grad()
def warm_memory(
    base: PreTrainedModel,
    texts: Sequence[WarmText],
    memory: CandidateMemory,
    *,
    max_new_tokens: int = 128,
    on_text: Callable[[WarmText], object] = lambda _: None,
) -> int:
    """Store what a base thinks likely at every position of some texts.

    Texts without an answer are answered first, greedily. Then one forward reads each text. Later
    texts count more than earlier ones.

    Args:
        base: A causal language model, which stays as it is.
        texts: From `render_texts`.
        memory: Is filled, next to what it holds.
        max_new_tokens: Maximum tokens of each answer.
        on_text: Called after each text, such as to show progress.

    Returns:
        The number of positions that were read.

    Raises:
        OptionError: If `max_new_tokens` is not a number from 1 on.
        PromptError: If a text is too long for the model.
        VocabularyMismatchError: If a token, or the memory, is of another vocabulary.
    """
    require_size("max_new_tokens", max_new_tokens)
    target, num_read = TargetView(base), 0
    _require_readable(target, texts, memory)
    for text in texts:
        tokens = torch.tensor([text.tokens], dtype=torch.long, device=target.device)
        if not text.is_answered:
            tokens = _answer(target, tokens, max_new_tokens)
        _read(target, tokens, memory)
        num_read += tokens.shape[1]
        on_text(text)
    return num_read


def render_texts(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[WarmText]:
    """Return chats as tokens; those whose last message is the assistant's are answered.

    Args:
        chats: Texts, which are left without a chat template, or messages.
        tokenizer: Of the base.

    Raises:
        OptionError: If there is no chat template for messages, or a text is not Unicode.
        PromptError: If the chat template refuses a chat, or a chat has no tokens.
    """
    texts = []
    for index, chat in enumerate(chats):
        is_answered = not isinstance(chat, str) and _is_answered(chat)
        rendered = chat if isinstance(chat, str) else _render(chat, tokenizer, index)
        require_unicode(f"prompt {index}", rendered)
        # A chat template writes the special tokens itself.
        is_text = isinstance(chat, str)  # verbose warns of long texts, which are refused later
        encoded: Any = tokenizer(rendered, add_special_tokens=is_text, verbose=False)
        tokens = list(encoded["input_ids"])
        if not tokens:
            raise PromptError(f"prompt {index} has no tokens; drop it or fill it in")
        texts.append(WarmText(tokens, is_answered))
    return texts


def _is_answered(chat: Sequence[Mapping[str, Any]]) -> bool:
    return bool(chat) and chat[-1].get("role") == "assistant"


def _render(
    chat: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, index: int
) -> str:
    if not tokenizer.chat_template:
        raise OptionError(
            f"prompt {index} is a conversation, and the tokenizer has no chat template; pass "
            "texts, or set tokenizer.chat_template"
        )
    try:
        rendered: Any = tokenizer.apply_chat_template(
            [dict(message) for message in chat],
            add_generation_prompt=not _is_answered(chat),
            tokenize=False,
        )
    except Exception as error:  # whatever the code of a template runs into
        raise PromptError(
            f"the chat template refuses prompt {index} ({reason_of(error)}); change its turns, or "
            "pass texts"
        ) from error
    return str(rendered)


def _require_readable(
    target: TargetView, texts: Sequence[WarmText], memory: CandidateMemory
) -> None:
    """Check all texts before any is read, which may take hours."""
    if memory.vocab_size != target.vocab_size:
        raise VocabularyMismatchError(
            f"the memory has a vocabulary of {memory.vocab_size} tokens, expected the "
            f"{target.vocab_size} of {target.name}; create one of that size"
        )
    for index, text in enumerate(texts):
        largest = max(text.tokens)
        if largest >= target.vocab_size:
            raise VocabularyMismatchError(
                f"prompt {index} has token {largest}, expected less than the {target.vocab_size} "
                f"of {target.name}; take the tokenizer of that model"
            )
        try:
            target.require_prompt_fits(len(text.tokens))
        except PromptError as error:
            raise PromptError(f"prompt {index} cannot be read: {error}") from error


def _answer(
    target: TargetView, tokens: Int[Tensor, "1 seq"], max_new_tokens: int
) -> Int[Tensor, "1 longer"]:
    """Return a prompt with its greedy answer, within the positions of the model."""
    if target.max_positions is not None:
        max_new_tokens = min(max_new_tokens, target.max_positions - tokens.shape[1])
    if max_new_tokens < 1:
        return tokens
    mask, model = torch.ones_like(tokens), cast("Any", target.model)
    answered: Tensor = model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
    )
    return answered


def _read(target: TargetView, tokens: Int[Tensor, "1 seq"], memory: CandidateMemory) -> None:
    """Store the candidates after every token of a text, from one forward."""
    row = tokens[0].tolist()
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if "logits_to_keep" in signature(target.model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with target.decoding(TargetFeatures.LAST_HIDDEN):
        target.run(**inputs)
        assert target.features is not None
        hidden = target.features[0]  # [seq, hidden]
    size = max(MAX_LOGITS // target.vocab_size, 1)
    for start in range(0, len(row), size):
        ids, log_probs = _candidates(target.head_logits(hidden[start : start + size]), memory)
        end = start + len(ids)
        memory.store([-1, *row][start:end], row[start:end], ids.numpy(), log_probs.numpy())


def _candidates(
    logits: Float[Tensor, "nodes vocab"], memory: CandidateMemory
) -> tuple[Int[Tensor, "nodes candidates"], Float[Tensor, "nodes candidates"]]:
    """Return the most likely tokens after each node and their log-probabilities, on the host."""
    top = logits.float().topk(memory.num_candidates, dim=-1)
    log_probs = top.values - logits.float().logsumexp(-1, keepdim=True)
    return top.indices.cpu(), log_probs.cpu()
