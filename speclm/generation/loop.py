"""The decode loop, as Transformers enters it with everything resolved."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm.acceptance.exact import ExactRule
from speclm.acceptance.interface import AcceptanceRule
from speclm.cache import import_cache
from speclm.errors import UnsupportedModelError
from speclm.generation.delegation import (
    NeedsPlainDecoding,
    eos_token_ids,
    images_of,
    left_padding,
    max_length,
    num_slots,
    prompt_length,
    reads_positions,
    require_importable,
    require_supported,
)
from speclm.generation.drafting import require_drafts_for
from speclm.generation.frontier import Frontier
from speclm.generation.pace import Pace, PaceMemory
from speclm.generation.rows import Rows
from speclm.generation.run import Run
from speclm.proposers.interface import Proposer
from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.stats import SpeculationStats
from speclm.target import ChainSession, Session, TargetView, TreeSession, position_shift
from speclm.verify import Backend


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """What a generation returns; fields are None where nobody asked for them.

    Args:
        sequences: Prompt and new tokens, ended rows padded on the right.
        scores: Processed scores of each new position, ``[batch, vocab]``.
        logits: The target's logits of each new position, in float32, ``[batch, vocab]``.
        past_key_values: The cache that was passed in or would have been made, with all tokens
            but the last.
    """

    sequences: Int[Tensor, "batch length"]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None


def generate_tokens(  # noqa: PLR0913 - the signature is Transformers'
    model: object,  # noqa: ARG001 - the target, in the place where Transformers passes it
    input_ids: Int[Tensor, "batch seq"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    target: TargetView,
    proposer: Proposer | None,
    stats: SpeculationStats,
    rule: AcceptanceRule | None = None,
    streamer: BaseStreamer | None = None,
    extends_cache: bool = False,
    paces: PaceMemory | None = None,
    backend: Backend = Backend.TREES,
    **model_inputs: Any,
) -> Generated:
    """Generate as Transformers' own decoding methods do, in rounds.

    This is the callable that ``base.generate(custom_generate=...)`` enters with everything
    resolved: settings, processors, criteria, expanded rows. Greedy decoding has one rule, the
    exact one, whatever `rule` says; None is the exact rule too. `extends_cache` says that the
    cache among the inputs is the caller's, who finds it extended. `paces` is what earlier calls
    measured; None to draft in every round, whether it pays or not. `backend` is the self-check's
    verdict on the target.

    Rows run ahead of each other, unless something looks at positions one by one: a processor that
    reads the text, a criterion, a streamer, or a caller who wants scores or logits. Nor do they
    where the target takes chains alone, or the proposer needs all rows to be equally long.

    Raises:
        NeedsPlainDecoding: Before anything is computed, if a setting asks for more than this loop
            gives.
        PromptError: If the prompt is longer than the model's positions.
        NumericalError: If the target's logits are not numbers.
        OptionError: If the rule needs drafts of a kind that the proposer does not make.
        DraftError: If the proposer returns a draft of the wrong shape.
    """
    if rule is None or not generation_config.do_sample:
        rule = ExactRule()
    require_drafts_for(rule, proposer)
    require_supported(generation_config, logits_processor, rule)
    wants_details = bool(generation_config.return_dict_in_generate)
    input_ids = input_ids.long()
    attention_mask = model_inputs.get("attention_mask")
    cache = model_inputs.get("past_key_values", model_inputs.get("cache_params"))
    given = cache if extends_cache or wants_details else None
    embeddings = model_inputs.get("inputs_embeds")
    length = prompt_length(input_ids, attention_mask, generation_config, given, embeddings)
    num_padding = left_padding(input_ids, attention_mask, length=length)
    images = images_of(target, input_ids, model_inputs)
    target.require_prompt_fits(length)
    # Plain decoding checks the length after a token, so there is always one.
    end = max(max_length(stopping_criteria, generation_config), input_ids.shape[1] + 1)
    num_unseen = length - input_ids.shape[1]
    meets_switch = _meets_switch(target, num_padding, start=length, end=num_unseen + end)
    session = _open(
        target, backend, model_inputs, images, num_padding, given=given, num_tokens=length
    )
    rows = Rows(
        batch=input_ids.shape[0],
        max_new_tokens=end - input_ids.shape[1],
        eos_token_ids=eos_token_ids(stopping_criteria),
    )
    pad_token_id = _token_id(generation_config._pad_token_tensor)
    frontier = None
    if (
        streamer is not None
        or (wants_details and (generation_config.output_scores or generation_config.output_logits))
        or first_text_dependent(logits_processor) is not None
        or reads_positions(stopping_criteria)
        or meets_switch
        or session.needs_lockstep
        or (proposer is not None and proposer.needs_lockstep)
    ):
        frontier = Frontier(
            input_ids,
            rows,
            processors=logits_processor,
            criteria=stopping_criteria,
            streamer=streamer,
            is_greedy=not generation_config.do_sample,
            pad_token_id=pad_token_id,
            keeps_scores=bool(wants_details and generation_config.output_scores),
            keeps_logits=bool(wants_details and generation_config.output_logits),
            target_name=target.name,
        )
    run = Run(
        target=target,
        proposer=proposer,
        chooser=TokenChooser(list(logits_processor), is_greedy=not generation_config.do_sample),
        rows=rows,
        frontier=frontier,
        num_prompt_tokens=input_ids.shape[1],
        num_unseen=num_unseen,
        first_token=_token_id(generation_config._bos_token_tensor),
        max_length=end,
        num_padding=num_padding,
        session=session,
        keeps_cache=given is not None,
        stats=stats,
        rule=rule,
    )
    temperature = (generation_config.temperature or 1.0) if generation_config.do_sample else 0.0
    if paces is not None and proposer is not None:
        run.pace = Pace(
            paces,
            batch=len(input_ids),
            num_prompt_tokens=length,
            setting=(rule.name, temperature, *map(type, logits_processor)),
            proposer=proposer,
            stats=stats,
        )
    stats.acceptance, stats.is_lossy = rule.name, rule.is_lossy
    try:
        with target.decoding(run.features):
            run.start(input_ids, embeddings=embeddings, temperature=temperature)
            while rows.any_live:
                run.round()
            sequences = rows.sequences(input_ids, pad_token_id)
            if given is not None:
                run.hand_over(given, sequences)
    except BaseException:
        session.abandon()
        raise
    finally:
        if run.noise is not None:  # also after an error: the generator is the caller's
            run.noise.finish(rows.num_steps)
    if frontier is None:
        return Generated(sequences, past_key_values=given)
    frontier.finish()
    return Generated(
        sequences, scores=frontier.scores, logits=frontier.logits, past_key_values=given
    )


def _meets_switch(
    target: TargetView, num_padding: Int[Tensor, " batch"], *, start: int, end: int
) -> bool:
    """Tell whether the rotation of keys may change while rows grow from `start` to `end` slots.

    Raises:
        NeedsPlainDecoding: If plain decoding then reads the text again.
    """
    switch = target.rotary_switch
    if switch is None:
        return False
    shortest = int(num_padding.min())
    is_met = switch.is_met(start - 1 - shortest, end - 1 - shortest)
    # Whether to read again is decided by slots, how to rotate by positions.
    if switch.reads_again and (is_met or switch.is_met(start - 1, end - 1)):
        raise NeedsPlainDecoding(
            f"within max_length the text may outgrow {switch.num_positions} positions, where this "
            "model reads it again"
        )
    return is_met


def _open(
    target: TargetView,
    backend: Backend,
    inputs: dict[str, Any],
    images: dict[str, Any],
    num_padding: Int[Tensor, " batch"],
    *,
    given: Any,
    num_tokens: int,
) -> Session:
    """Return a session of the backend, with what a cache that was passed in holds.

    Raises:
        NeedsPlainDecoding: If the backend cannot use that cache, or positions switch rotations
            elsewhere than slots.
    """
    batch = len(num_padding)
    shift = position_shift(inputs.get("position_ids"), num_padding, num_tokens=num_tokens)
    if shift is not None and target.rotary_switch is not None:
        raise NeedsPlainDecoding("rope scaling by length, and positions that images shift")
    if backend is Backend.CHAINS:
        inputs = {
            name: value
            for name, value in inputs.items()
            if name != "inputs_embeds" and name not in images
        }
        try:
            return ChainSession(
                target,
                inputs,
                images=images,
                num_cached=num_slots(given),
                is_callers=given is not None,
            )
        except UnsupportedModelError as error:
            raise NeedsPlainDecoding(str(error)) from error
    cache = target.new_cache(num_padding)
    cache.position_shift = shift
    if given is not None:
        require_importable(given, target.num_layers, batch=batch, num_tokens=num_tokens)
        import_cache(cache, given, room=num_tokens)
    return TreeSession(
        target,
        cache,
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        images=images,
    )


def _token_id(token: Tensor | None) -> int:
    return 0 if token is None else int(token)
