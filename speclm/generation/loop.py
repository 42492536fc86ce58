"""The decode loop, as Transformers enters it with everything resolved."""

from collections.abc import Callable
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
from speclm.adaptive.memory import Memory
from speclm.adaptive.pausing import Pausing
from speclm.adaptive.tuner import TreeTuner, describe_tree
from speclm.drafting.interface import Proposer
from speclm.generation.callbacks import Listener
from speclm.generation.delegation import (
    eos_token_ids,
    foreign_criteria,
    images_of,
    left_padding,
    max_length,
    prompt_length,
    require_supported,
    rows_end_together,
    stop_strings_of,
)
from speclm.generation.draft_checks import planned, require_drafts_for
from speclm.generation.lockstep import Lockstep
from speclm.generation.opening import meets_switch, open_session
from speclm.generation.run import Run
from speclm.generation.sequences import Rows
from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.draws import DraftSampling
from speclm.self_check.fingerprint import fingerprint
from speclm.self_check.verdict import Verification
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from speclm.tree.plan import TreePlan


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
    pauses: Memory | None = None,
    tree: TreePlan | None = None,
    trees: Memory | None = None,
    backend: Verification = Verification.TREES,
    isolates: bool = False,
    on_decoded: Callable[[], object] | None = None,
    **model_inputs: Any,
) -> Generated:
    """Generate as Transformers' own decoding methods do, in rounds.

    This is the callable that ``base.generate(custom_generate=...)`` enters with everything
    resolved: settings, processors, criteria, expanded rows. Greedy decoding has one rule, the
    exact one, whatever `rule` says; None is the exact rule too. `extends_cache` says that the
    cache among the inputs is the caller's, who finds it extended. `pauses` is what earlier calls
    measured; None to draft in every round, whether it pays or not. `tree` is what every draft
    should be; None for what the proposer's own settings say, or, where `trees` is given, for what
    that memory of earlier calls and this one make fastest. `backend` is the self-check's verdict on
    the target. `isolates` says that the proposer may draw from the default generators, which is
    undone. `on_decoded` is called once nothing shared is used any more, and before the streamer
    ends.

    Rows run ahead of each other, unless something looks at positions one by one: a processor that
    reads the text, or a caller who wants scores or logits. Nor do the rows of a batch where a
    criterion of an unknown class or a streamer hears of every position, where the target takes
    only chains, or where the proposer needs all rows to be equally long.

    Raises:
        NeedsRegularGeneration: Before anything is computed, if a setting asks for more than this
            loop gives.
        PromptError: If the prompt is longer than the model's positions.
        NumericalError: If the target's logits are not numbers.
        OptionError: If the rule needs drafts of a kind that the proposer does not make.
        DraftError: If the proposer returns a draft of the wrong shape.
    """
    if rule is None or not generation_config.do_sample:
        rule = ExactRule()
    require_drafts_for(rule, proposer)
    require_supported(generation_config, logits_processor, rule, device=input_ids.device)
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
    # Regular generation checks the length after a token, so there is always one.
    end = max(max_length(stopping_criteria, generation_config), input_ids.shape[1] + 1)
    num_unseen = length - input_ids.shape[1]
    is_switching = meets_switch(target, num_padding, start=length, end=num_unseen + end)
    session = open_session(
        target, backend, model_inputs, images, num_padding, given=given, num_tokens=length
    )
    rows = Rows(
        batch=input_ids.shape[0],
        max_new_tokens=end - input_ids.shape[1],
        eos_token_ids=eos_token_ids(stopping_criteria),
        stop_strings=stop_strings_of(stopping_criteria, input_ids),
    )
    pad_token_id = _token_id(generation_config._pad_token_tensor)
    foreign = foreign_criteria(stopping_criteria)
    lockstep = listener = None
    if _reads_positions(generation_config, logits_processor) or (
        len(input_ids) > 1
        and (
            is_switching
            or session.needs_lockstep
            or (proposer is not None and proposer.needs_lockstep)
            or streamer is not None
            or bool(foreign)
            or rows_end_together(stopping_criteria)
        )
    ):
        lockstep = Lockstep(
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
    elif foreign or streamer is not None:
        listener = Listener(input_ids, rows, criteria=foreign, streamer=streamer)
    run = Run(
        target=target,
        proposer=proposer,
        chooser=TokenChooser(list(logits_processor), is_greedy=not generation_config.do_sample),
        rows=rows,
        lockstep=lockstep,
        listener=listener,
        num_prompt_tokens=input_ids.shape[1],
        num_unseen=num_unseen,
        first_token=_token_id(generation_config._bos_token_tensor),
        max_length=end,
        pad_token_id=pad_token_id,
        num_padding=num_padding,
        session=session,
        keeps_cache=given is not None,
        stats=stats,
        rule=rule,
        plan=tree,
        isolates=isolates,
    )
    temperature = (generation_config.temperature or 1.0) if generation_config.do_sample else 0.0
    setting = (rule.name, temperature, *map(type, logits_processor))
    if pauses is not None and proposer is not None:
        run.pausing = Pausing(
            pauses,
            batch=len(input_ids),
            num_prompt_tokens=length,
            setting=(setting, tree, trees is None),
            proposer=proposer,
            stats=stats,
        )
    # Drawn trees are shaped before they are drawn: a smaller one is no part of a larger one.
    if trees is not None and proposer is not None and rule.draft_sampling is DraftSampling.NONE:
        run.tuner = TreeTuner(
            trees,
            batch=len(input_ids),
            num_prompt_tokens=length,
            max_depth=proposer.config.depth,
            setting=setting,
            proposer=proposer,
        )
        if run.tuner.timings is None and run.can_time_forwards:
            run.kind = fingerprint(target)
    stats.acceptance, stats.is_lossy = rule.name, rule.is_lossy
    sequences = _decode(run, input_ids, embeddings, given, temperature=temperature)
    stats.tree = describe_tree(run.plan if run.tuner is None else run.tuner.best)
    if on_decoded is not None:
        on_decoded()
    if listener is not None:
        listener.finish()
    if lockstep is None:
        return Generated(sequences, past_key_values=given)
    lockstep.finish()
    return Generated(
        sequences, scores=lockstep.scores, logits=lockstep.logits, past_key_values=given
    )


def _decode(
    run: Run,
    input_ids: Int[Tensor, "batch seq"],
    embeddings: Tensor | None,
    given: DynamicCache | None,
    *,
    temperature: float,
) -> Int[Tensor, "batch length"]:
    """Go from the prompt to the end of the last row, and leave everything usable on the way."""
    try:
        with planned(run.proposer, run.plan), run.target.decoding(run.features):
            run.start(input_ids, embeddings=embeddings, temperature=temperature)
            with run.target.steps():
                while run.rows.any_live:
                    run.round()
            if run.pausing is not None:
                run.pausing.finish(run.rows.num_steps)
            sequences = run.rows.sequences(input_ids, run.pad_token_id)
            if given is not None:
                run.hand_over(given, sequences)
    except BaseException:
        run.session.abandon()
        raise
    finally:
        if run.noise is not None:  # also after an error: the generator is the caller's
            run.noise.finish(run.rows.num_steps)
    return sequences


def _reads_positions(
    generation_config: GenerationConfig, logits_processor: LogitsProcessorList
) -> bool:
    """Return whether the scores of every position are needed one by one."""
    is_kept = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    return bool(is_kept) or first_text_dependent(logits_processor) is not None


def _token_id(token: Tensor | None) -> int:
    return 0 if token is None else int(token)
