"""One call of `generate`: into the decode loop and out of it, through Transformers' entry."""

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import ModelOutput

from speclm.acceptance import AcceptanceRule
from speclm.adaptive.memory import Memory
from speclm.drafting.interface import Proposer
from speclm.generation.delegation import CACHE_INPUTS, NeedsRegularGeneration
from speclm.generation.loop import Generated, generate_tokens
from speclm.model.arguments import resolve_setting
from speclm.model.fitting import claimed, proposer_modules, require_still_fits
from speclm.self_check.verdict import Verification
from speclm.self_check.watch import may_draw
from speclm.stats import SpeculationStats
from speclm.target import NestedError, TargetView
from speclm.tree.plan import TreePlan


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with ``return_dict_in_generate=True``.

    Args:
        speculation: Counters of the call.
    """

    # Transformers' own annotations are narrower than what it gives.
    sequences: Tensor | None = None  # type: ignore[assignment]
    scores: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    logits: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    speculation: SpeculationStats | None = None


class KeepsCounters:
    """Keeps the counters of its last call.

    Attributes:
        last_speculation: Counters of the call that ended last, or goes on; None before the first.
            After a call they are its own, whatever its callbacks have called from inside.
    """

    last_speculation: SpeculationStats | None = None
    _last_thread: int | None = None

    def _report(self, stats: SpeculationStats) -> None:
        """Report when a call begins, and when it ends and the model is still its own."""
        self.last_speculation, self._last_thread = stats, threading.get_ident()

    def _report_again(self, stats: SpeculationStats) -> None:
        """Report at the end of a call, unless another thread has reported since."""
        if self._last_thread == threading.get_ident():
            self._report(stats)


def decode(  # noqa: PLR0913 - a call has many sides
    base_generate: Callable[..., Any],
    arguments: dict[str, Any],
    default: GenerationConfig,
    *,
    target: TargetView,
    backend: Verification,
    proposer: Proposer | None,
    stats: SpeculationStats,
    rule: AcceptanceRule,
    pauses: Memory | None,
    tree: TreePlan | None = None,
    trees: Memory | None = None,
    waits: bool = True,
    report: Callable[[], object],
) -> Tensor | ModelOutput:
    """Answer a call with the decode loop, when base and proposer are free.

    Args:
        base_generate: The base's own `generate`.
        arguments: Of the call.
        default: The model's own generation config.
        target: The base.
        backend: How the base's drafts are verified.
        proposer: Guesses tokens.
        stats: Counters to fill.
        rule: Decides which guesses are kept when sampling.
        pauses: What earlier calls measured; None to draft in every round.
        tree: What every draft should be; None for what the proposer's settings say.
        trees: What earlier calls learned about trees, for drafts that follow from it.
        waits: Whether to wait while another thread has the base or the proposer.
        report: Called when the turn of this call begins and just before it ends. The streamer
            ends after that, when others may use the model.

    Raises:
        NeedsRegularGeneration: Before anything is computed, if the loop does not give what is
            asked, or the call comes from inside another one.
        BusyError: If another thread has the base or the proposer, and `waits` is False.
    """
    turn = ExitStack()

    def loop(*resolved: Any, **named: Any) -> Tensor | SpeculativeOutput:
        # A partial would let the caller's keywords replace these.
        generated = generate_tokens(
            *resolved,
            target=target,
            backend=backend,
            proposer=proposer,
            stats=stats,
            rule=rule,
            pauses=pauses,
            tree=tree,
            trees=trees,
            isolates=any(map(may_draw, proposer_modules(proposer))),
            streamer=arguments.get("streamer"),
            extends_cache=any(arguments.get(name) is not None for name in CACHE_INPUTS),
            on_decoded=turn.close,
            **named,
        )
        return _as_output(generated, named["generation_config"], stats)

    require_still_fits(proposer, target)
    with turn:
        try:
            turn.enter_context(claimed(target, proposer, waits=waits))
        except NestedError as error:
            raise NeedsRegularGeneration(str(error)) from error
        report()
        turn.callback(report)
        resolved_arguments = for_own_loop(arguments, default)
        output: Tensor | ModelOutput = base_generate(custom_generate=loop, **resolved_arguments)
    return output


def _as_output(
    generated: Generated, config: GenerationConfig, stats: SpeculationStats
) -> Tensor | SpeculativeOutput:
    """Return what Transformers' own loop returns: a class may have a `generate` around it."""
    if not config.return_dict_in_generate:
        return generated.sequences
    return SpeculativeOutput(
        sequences=generated.sequences,
        scores=generated.scores,
        logits=generated.logits,
        past_key_values=generated.past_key_values,
        speculation=stats,
    )


def with_counters(output: Tensor | ModelOutput, stats: SpeculationStats) -> Tensor | ModelOutput:
    """Return what the base's own `generate` returned, with counters where they fit."""
    if isinstance(output, Tensor):
        return output
    if type(output) is not GenerateDecoderOnlyOutput:  # beams have fields that we do not
        output.speculation = stats
        return output
    counted = SpeculativeOutput(sequences=output.sequences)
    for name, value in {**output, "speculation": stats}.items():
        counted[name] = value
    return counted


def for_own_loop(arguments: dict[str, Any], default: GenerationConfig) -> dict[str, Any]:
    """Return the arguments with which ``base.generate`` enters the decode loop.

    Transformers hands neither streamer nor tokenizer to a decoding method that is passed in, and
    builds the criterion for stop strings without the tokenizer that it needs. So the streamer is
    left out, for the loop to be given by itself, and stop strings become a criterion here.

    Args:
        arguments: Of `generate`.
        default: The model's own generation config.
    """
    arguments = {name: value for name, value in arguments.items() if name != "streamer"}
    stop_strings = resolve_setting("stop_strings", arguments, default)
    tokenizer = arguments.pop("tokenizer", None)
    if stop_strings is None:
        return arguments
    if tokenizer is None:
        return arguments  # Transformers says what is missing
    criteria = list(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.insert(0, StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    config = arguments.get("generation_config")
    if config is not None:
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if config is None or default.stop_strings is not None:
        arguments["stop_strings"] = None  # outranks every config
    else:
        arguments.pop("stop_strings", None)
    return arguments
