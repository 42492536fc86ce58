"""The arguments of a call of `generate`, before and after Transformers resolves them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from speclm.acceptance.exact import ExactRule
from speclm.acceptance.interface import AcceptanceRule
from speclm.adaptive.memory import Memory
from speclm.drafting.interface import Proposer
from speclm.errors import CacheError, OptionError, PromptError
from speclm.generation.regular import (
    images_of,
    left_padding,
    meets_switch,
    prompt_length,
    require_left_padding,
    require_supported,
)
from speclm.generation.settings import (
    REFUSED_SETTINGS,
    first_active,
    given_cache,
    resolve_setting,
)
from speclm.sampling.chooser import first_text_dependent
from speclm.sampling.draws import DraftSampling
from speclm.self_check.verdict import Verification
from speclm.target import Session, StaticForward, TargetView
from speclm.tree.plan import TreePlan

_OWN_CRITERIA = frozenset({EosTokenCriteria, MaxLengthCriteria, StopStringCriteria})
"""Criteria that are decided per row, by exact class."""


def require_acceptable(
    arguments: Mapping[str, Any], default: GenerationConfig, *, busy: object = "wait"
) -> None:
    """Check the arguments of a call before anything is computed.

    Raises:
        OptionError: If Transformers' own speculation or an output of every forward is requested,
            or `busy` is neither ``"wait"`` nor ``"raise"``.
        CacheError: If a cache is passed in that cannot be rolled back.
        PromptError: If the prompt is empty, of the wrong shape or padded on the right.
    """
    if not isinstance(busy, str) or busy not in {"wait", "raise"}:
        raise OptionError(
            f"busy is {busy!r}, expected 'wait' to wait for the calls of other threads, or 'raise' "
            "to fail with a BusyError"
        )
    lookup = partial(resolve_setting, arguments=arguments, default=default)
    setting = first_active(REFUSED_SETTINGS, lookup)
    if setting is not None:
        shown = setting.describe(lookup(setting.name))
        raise OptionError(f"{shown} {setting.note}; drop it, or call .base.generate")
    cache = given_cache(arguments)
    # The recurrent states of a dynamic cache are restored, not cropped.
    if isinstance(cache, Cache) and not (isinstance(cache, DynamicCache) or cache.is_croppable):
        raise CacheError(
            f"the given cache is a {type(cache).__name__}, which cannot be rolled back; pass a "
            "DynamicCache, or none"
        )
    _require_prompt(arguments)


def _require_prompt(arguments: Mapping[str, Any]) -> None:
    """Check prompt and attention mask."""
    tokens = (
        arguments["inputs"] if arguments.get("inputs") is not None else arguments.get("input_ids")
    )
    if arguments.get("inputs_embeds") is not None:
        tokens = None  # the embeddings are the prompt, and Transformers checks them
    if tokens is not None and not isinstance(tokens, Tensor):
        raise PromptError(
            f"prompt is a {type(tokens).__name__}, expected a tensor of token ids [batch, seq]; "
            "tokenize with return_tensors='pt'"
        )
    if tokens is not None and (tokens.dim() != 2 or 0 in tokens.shape):
        raise PromptError(
            f"prompt has shape {tuple(tokens.shape)}, expected [batch, seq] with at least one row "
            "and one token; tokenize with return_tensors='pt'"
        )
    if tokens is not None and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise PromptError(
            f"prompt has dtype {tokens.dtype}, expected integer token ids; pass input_ids, not "
            "the attention mask or embeddings"
        )
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # With a cache the prompt may hold only the new tokens, under a mask for all.
        has_cache = given_cache(arguments) is not None
        is_continued = has_cache and tokens is not None and mask.shape[1] > tokens.shape[1]
        if tokens is not None and mask.shape != tokens.shape and not is_continued:
            raise PromptError(
                f"attention mask has shape {tuple(mask.shape)}, the prompt {tuple(tokens.shape)}; "
                "pass the mask that the tokenizer returned with the prompt"
            )
        require_left_padding(mask)


def arguments_for_loop(arguments: dict[str, Any], default: GenerationConfig) -> dict[str, Any]:
    """Return the arguments with which ``base.generate`` enters the decode loop.

    Transformers passes neither streamer nor tokenizer on to a custom decoding method, and builds
    the criterion for stop strings without the tokenizer that it needs. The streamer is therefore
    left out (`Setup` holds it), and stop strings become a criterion here.
    """
    arguments = {name: value for name, value in arguments.items() if name != "streamer"}
    stop_strings = resolve_setting("stop_strings", arguments, default)
    tokenizer = arguments.pop("tokenizer", None)
    if stop_strings is None or tokenizer is None:
        return arguments  # without a tokenizer Transformers says what is missing
    criteria = list(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.insert(0, StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    config = arguments.get("generation_config")
    if config is not None:
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if config is None or default.stop_strings is not None:
        arguments["stop_strings"] = None  # takes precedence over every config
    else:
        arguments.pop("stop_strings", None)
    return arguments


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """Everything that a call is decoded with.

    Args:
        target: View of the base.
        proposer: Proposes draft tokens; None gives one token per round.
        verification: How drafts are verified.
        rule: Decides which draft tokens are kept when sampling.
        plan: Plan of every draft; None follows the proposer's own settings.
        pauses: What earlier calls measured; None to draft in every round.
        trees: What earlier calls learned about trees, for planning.
        isolates: Whether to undo what the proposer draws from the default generators.
        streamer: Receives the tokens; None without one.
        extends_cache: Whether to extend a cache that the caller passed in.
        static: Verifies trees by an engine; None to verify eagerly.
    """

    target: TargetView
    proposer: Proposer | None
    verification: Verification = Verification.TREES
    rule: AcceptanceRule = field(default_factory=ExactRule)
    plan: TreePlan | None = None
    pauses: Memory | None = None
    trees: Memory | None = None
    isolates: bool = False
    streamer: BaseStreamer | None = None
    extends_cache: bool = False
    static: StaticForward | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The prompts of a call.

    Args:
        input_ids: Tokens passed to `generate`; no columns if only embeddings were passed.
        embeddings: The prompt as vectors; None for one of tokens.
        model_inputs: All inputs that Transformers prepared for the model.
        images: Those of them that belong to images.
        num_padding: Padding tokens at the start of each row.
        num_unseen: Tokens before `input_ids`, known only to the cache or as embeddings.
        first_token: Stands for the last token if there are only embeddings.
        cache: Cache to continue from and to extend; None without one.
    """

    input_ids: Int[Tensor, "batch seq"]
    embeddings: Float[Tensor, "batch embedded hidden"] | None
    model_inputs: dict[str, Any]
    images: dict[str, Any]
    num_padding: Int[Tensor, " batch"]
    num_unseen: int
    first_token: int
    cache: Any

    @property
    def length(self) -> int:
        """Tokens of each row, padding and `num_unseen` included."""
        return self.num_unseen + self.input_ids.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a call asks for, as Transformers has resolved it.

    Args:
        prompt: The prompts.
        rule: Decides which draft tokens are kept; the exact one for greedy decoding.
        temperature: Temperature of sampling; 0 for greedy decoding.
        processors: All logits processors, in order.
        criteria: All stopping criteria, in order.
        max_length: Length at which every row ends, `prompt.input_ids` included.
        eos_token_ids: Tokens that end a row; empty when rows run to `max_length`.
        pad_token_id: Token that follows the end of a row.
        keeps_scores: Whether the processed scores of each position are returned.
        keeps_logits: Whether the logits of each position are returned.
        meets_switch: Whether the rotation of keys may change during the call.
    """

    prompt: Prompt
    rule: AcceptanceRule
    temperature: float
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    max_length: int
    eos_token_ids: frozenset[int]
    pad_token_id: int
    keeps_scores: bool
    keeps_logits: bool
    meets_switch: bool

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def total_length(self) -> int:
        """Length at which every row ends, `prompt.num_unseen` included."""
        return self.prompt.num_unseen + self.max_length

    @property
    def foreign_criteria(self) -> list[StoppingCriteria]:
        """Criteria that are not decided per row and have to see every position."""
        return [criterion for criterion in self.criteria if type(criterion) not in _OWN_CRITERIA]

    @property
    def stop_strings(self) -> list[StopStringCriteria]:
        """Criteria of stop strings."""
        return [found for found in self.criteria if type(found) is StopStringCriteria]

    @property
    def names_eos(self) -> bool:
        """Whether a criterion names an end-of-sequence token."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    def needs_lockstep(self, setup: Setup, session: Session) -> bool:
        """Return whether all rows have to advance together.

        They must if something reads positions one by one: a processor that reads the text, or a
        caller who wants scores or logits. So must the rows of a batch if a callback receives every
        position, if the target verifies only chains or changes the rotation of its keys, if the
        proposer needs rows of equal length, or if stop strings end all rows at once.
        """
        if self.keeps_scores or self.keeps_logits:
            return True
        if first_text_dependent(self.processors) is not None:
            return True
        return len(self.prompt.input_ids) > 1 and (
            self.meets_switch
            or session.needs_lockstep
            or (setup.proposer is not None and setup.proposer.needs_lockstep)
            or setup.streamer is not None
            or bool(self.foreign_criteria)
            # Without an end-of-sequence token, Transformers stops rows only together.
            or (bool(self.stop_strings) and not self.names_eos)
        )


def resolve_request(
    input_ids: Int[Tensor, "batch seq"],
    setup: Setup,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_inputs: dict[str, Any],
) -> Request:
    """Check what Transformers resolved for a call, and return it as a request.

    Raises:
        NeedsRegularGeneration: If the decode loop does not support a setting.
        PromptError: If the prompt is longer than the model's positions.
        OptionError: If the rule needs drafts of a kind that the proposer does not make.
    """
    target, config = setup.target, generation_config
    rule = setup.rule if config.do_sample else ExactRule()
    _require_drafts_for(rule, setup.proposer)
    require_supported(config, logits_processor, rule, device=input_ids.device)
    wants_details = bool(config.return_dict_in_generate)
    input_ids = input_ids.long()
    mask, embeddings = model_inputs.get("attention_mask"), model_inputs.get("inputs_embeds")
    cache = given_cache(model_inputs)
    if not (setup.extends_cache or wants_details):
        cache = None  # the caller does not see the one that Transformers made
    length = prompt_length(input_ids, mask, config, cache, embeddings)
    num_padding = left_padding(input_ids, mask, length=length)
    images = images_of(target, input_ids, model_inputs)
    target.require_prompt_fits(length)
    # Regular generation checks the length after a token, so there is always one.
    end = max(max_length(stopping_criteria, config), input_ids.shape[1] + 1)
    num_unseen = length - input_ids.shape[1]
    prompt = Prompt(
        input_ids=input_ids,
        embeddings=embeddings,
        model_inputs=model_inputs,
        images=images,
        num_padding=num_padding,
        num_unseen=num_unseen,
        first_token=_token_id(config._bos_token_tensor),
        cache=cache,
    )
    return Request(
        prompt=prompt,
        rule=rule,
        temperature=(config.temperature or 1.0) if config.do_sample else 0.0,
        processors=logits_processor,
        criteria=stopping_criteria,
        max_length=end,
        eos_token_ids=eos_token_ids(stopping_criteria),
        pad_token_id=_token_id(config._pad_token_tensor),
        keeps_scores=bool(wants_details and config.output_scores),
        keeps_logits=bool(wants_details and config.output_logits),
        meets_switch=meets_switch(target, num_padding, start=length, end=num_unseen + end),
    )


def _require_drafts_for(rule: AcceptanceRule, proposer: Proposer | None) -> None:
    """Check that a proposer draws its drafts, if the rule needs drawn ones."""
    wanted = rule.draft_sampling
    if proposer is None or wanted in {DraftSampling.NONE, proposer.draft_sampling}:
        return
    raise OptionError(
        f"acceptance {rule.name!r} expected drafts drawn {wanted.value}, with their "
        f"distributions, found {type(proposer).__name__}, which does not draw; use a draft model "
        "or Medusa heads, or acceptance='exact', which is lossless with any proposer"
    )


def max_length(stopping_criteria: Sequence[Any], generation_config: GenerationConfig) -> int:
    """Return the length at which every row ends, prompt included.

    A criterion that the caller passes in replaces that of the config.
    """
    lengths = [
        int(criterion.max_length)
        for criterion in stopping_criteria
        if type(criterion) is MaxLengthCriteria
    ]
    return min(lengths, default=int(generation_config.max_length))


def eos_token_ids(stopping_criteria: Sequence[Any]) -> frozenset[int]:
    """Return the tokens that end a row; empty when rows run to the maximal length."""
    ids: set[int] = set()
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:
            ids.update(criterion.eos_token_id.tolist())
    return frozenset(ids)


def _token_id(token: Tensor | None) -> int:
    return 0 if token is None else int(token)
