"""One call of `SpecModel.generate`: its own options, and its way through the decode loop."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import ModelOutput

from speclm.cache import CACHE_NAME, CACHE_NAMES
from speclm.drafting.interface import Proposer
from speclm.errors import OptionError, suggest
from speclm.files.atomic import read_json
from speclm.generation.loop import Generated, generate_tokens
from speclm.generation.regular import NeedsRegularGeneration, first_delegated
from speclm.generation.request import Setup, arguments_for_loop
from speclm.generation.settings import BY_NAME, given_cache
from speclm.model.fitting import claimed, proposer_modules, require_still_fits
from speclm.model.heads import OPTIONS_OF_LOADING
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.self_check.watch import Watch, first_in_training, may_draw
from speclm.stats import SpeculationStats
from speclm.target import NestedError
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPaths, normalize_paths

AUTO = "auto"
"""Plans depth and size of trees from measured times and acceptance."""

Tree = str | Path | Sequence[int] | Sequence[Sequence[int]] | TreePlan
"""The option ``tree``: "auto", the name of a preset, a file of paths, widths, paths, or a plan."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Output of `generate` with ``return_dict_in_generate=True``.

    Args:
        speculation: Counters of the call.
    """

    # Transformers' own annotations are narrower than what it returns.
    sequences: Tensor | None = None  # type: ignore[assignment]
    scores: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    logits: tuple[Tensor, ...] | None = None  # type: ignore[assignment]
    speculation: SpeculationStats | None = None


class KeepsCounters:
    """Keeps the counters of the last call.

    Attributes:
        last_speculation: Counters of the last call, which may still be running; None before the
            first. Calls that its callbacks make do not replace them.
    """

    last_speculation: SpeculationStats | None = None
    _last_thread: int | None = None
    _plain_seconds: dict[int, float]  # of a round without a draft, by batch size

    def _report(self, stats: SpeculationStats) -> None:
        """Keep the counters; called while a call holds the model."""
        self.last_speculation, self._last_thread = stats, threading.get_ident()
        batch, seconds = len(stats.rows), stats.plain_round_seconds
        if seconds is not None:
            self._plain_seconds[batch] = seconds
        stats.plain_round_seconds = self._plain_seconds.get(batch)

    def _report_again(self, stats: SpeculationStats) -> None:
        """Keep the counters at the end of a call, unless another thread has reported since."""
        if self._last_thread == threading.get_ident():
            self._report(stats)


def decode(
    base_generate: Callable[..., Any],
    arguments: dict[str, Any],
    default: GenerationConfig,
    setup: Setup,
    stats: SpeculationStats,
    *,
    waits: bool,
    report: Callable[[SpeculationStats], object],
) -> Tensor | ModelOutput:
    """Answer a call with the decode loop, once base and proposer are free.

    Args:
        base_generate: The base's own `generate`.
        arguments: Arguments of the call.
        default: The model's own generation config.
        setup: What the call is decoded with.
        stats: Counters to fill.
        waits: Whether to wait while another thread uses the base or the proposer.
        report: Called with `stats` when the turn of this call begins and just before it ends. The
            streamer ends afterwards, when other calls may use the model.

    Raises:
        NeedsRegularGeneration: Before anything is computed, if the loop does not support the
            request, or the call comes from inside another one.
        BusyError: If another thread uses the base or the proposer, and `waits` is False.
    """
    setup = replace(
        setup,
        isolates=any(map(may_draw, proposer_modules(setup.proposer))),
        streamer=arguments.get("streamer"),
        extends_cache=given_cache(arguments) is not None,
    )
    turn = ExitStack()

    def loop(_: object, input_ids: Tensor, **resolved: Any) -> Tensor | SpeculativeOutput:
        generated = generate_tokens(input_ids, setup, stats, **resolved)
        turn.close()
        if setup.streamer is not None:
            setup.streamer.end()  # type: ignore[no-untyped-call]  # Transformers'
        return _as_output(generated, resolved["generation_config"], stats)

    require_still_fits(setup.proposer, setup.target)
    with turn:
        try:
            turn.enter_context(claimed(setup.target, setup.proposer, waits=waits))
        except NestedError as error:
            raise NeedsRegularGeneration(str(error)) from error
        report(stats)
        turn.callback(report, stats)
        resolved_arguments = arguments_for_loop(arguments, default)
        output: Tensor | ModelOutput = base_generate(custom_generate=loop, **resolved_arguments)
    return output


def _as_output(
    generated: Generated, config: GenerationConfig, stats: SpeculationStats
) -> Tensor | SpeculativeOutput:
    """Return what Transformers' own loop returns, for classes that process it further."""
    if not config.return_dict_in_generate:
        return generated.sequences
    cache: dict[str, Any] = {CACHE_NAME: generated.cache}
    return SpeculativeOutput(
        sequences=generated.sequences,
        scores=generated.scores,
        logits=generated.logits,
        speculation=stats,
        **cache,
    )


def with_counters(output: Tensor | ModelOutput, stats: SpeculationStats) -> Tensor | ModelOutput:
    """Return the output of the base's own `generate`, with counters if its class can hold them."""
    if isinstance(output, Tensor):
        return output
    if type(output) is not GenerateDecoderOnlyOutput:  # beams have other fields
        output.speculation = stats
        return output
    counted = SpeculativeOutput(sequences=output.sequences)
    for name, value in {**output, "speculation": stats}.items():
        counted[name] = value
    return counted


def require_speculation(watch: Watch, arguments: dict[str, Any], default: GenerationConfig) -> None:
    """Check that the decode loop may answer a call.

    Raises:
        NeedsRegularGeneration: If not; the message is the reason.
    """
    if not watch.check.passes:
        raise NeedsRegularGeneration(watch.check.reason)
    if watch.in_training is not None:
        raise NeedsRegularGeneration(
            f"{watch.in_training} is in training mode, in which forwards may be random; call "
            ".eval() on the model"
        )
    name = first_delegated(arguments, default)
    if name is not None:
        raise NeedsRegularGeneration(name)


def slowdowns(check: SelfCheck, proposer: Proposer | None) -> Iterator[tuple[str, str]]:
    """Yield log lines, with reasons, about what makes a call slower than it could be."""
    if check.verification is Verification.CHAINS:
        yield "verifying chains with %s: %s", check.reason
    for module in proposer_modules(proposer):
        name = first_in_training(module)
        if name is not None:
            reason = (
                f"{name} of {type(module).__name__} is in training mode, in which drafts may be"
            )
            yield "drafting badly for %s: %s", f"{reason} random; call .eval() on what drafts"


@contextmanager
def naming_unknown(arguments: Iterable[str]) -> Iterator[None]:
    """Turn Transformers' error on unknown arguments into one that names them and a remedy.

    Raises:
        OptionError: In place of Transformers' own error.
    """
    try:
        yield
    except ValueError as error:
        unknown = [name for name in arguments if repr(name) in str(error)]
        if "not used by the model" not in str(error) or not unknown:
            raise
        if unknown[0] in OPTIONS_OF_LOADING:
            remedy = "pass it to SpecModel.from_pretrained"
        elif unknown[0] in {"cache", *CACHE_NAMES}:
            remedy = f"pass it as {CACHE_NAME!r}"
        else:
            remedy = suggest(unknown[0], [*BY_NAME, *OPTIONS_OF_LOADING, "acceptance"])
        raise OptionError(
            f"arguments {unknown!r} are not used by the model, nor known to generate; {remedy}"
        ) from error


def normalize_tree(tree: Tree | None) -> TreePlan | str | None:
    """Return the plan that the option ``tree`` stands for, `AUTO`, or None.

    Raises:
        UnknownNameError: If no preset has that name.
        TopologyError: If paths do not form a tree.
        OptionError: If a file cannot be read.
    """
    if tree is None or isinstance(tree, TreePlan) or (isinstance(tree, str) and tree == AUTO):
        return tree
    is_file = isinstance(tree, Path) or (isinstance(tree, str) and tree.endswith(".json"))
    return TreePlan.of(read_tree(tree) if is_file else normalize_paths(tree))


def read_tree(path: Any) -> RankPaths:
    """Read a static tree from a JSON file, as ``speclm tune --save`` writes it.

    Raises:
        OptionError: If the file cannot be read.
        TopologyError: If it holds no tree.
        TreeBudgetError: If the tree is too deep.
    """
    try:
        found = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"tree {str(path)!r} cannot be read ({error}), expected a JSON file of paths such as "
            "[[0], [0, 0]]; write one with speclm tune --save"
        ) from error
    if isinstance(found, dict) and "tree" in found:
        found = found["tree"]
    return normalize_paths(found)


def require_fillable(tree: TreePlan | str | None, proposer: Proposer | None) -> None:
    """Check that a proposer can fill a tree.

    Raises:
        OptionError: If a static tree is given to a proposer that does not fill it.
    """
    if not isinstance(tree, TreePlan) or tree.paths is None:
        return
    if proposer is None:
        raise OptionError(
            f"tree has {len(tree.paths)} nodes and there is no proposer to fill it, expected one "
            "such as a draft model or Medusa heads; pass heads, or leave tree out"
        )
    if not proposer.fills_static_trees:
        raise OptionError(
            f"tree is a static one of {len(tree.paths)} nodes, which {type(proposer).__name__} "
            "cannot fill: it does not rank its candidates; pass tree='auto', or "
            "TreePlan(depth=4, num_draft_tokens=8) for a bound only"
        )
    num_ranks, rank = proposer.num_ranks, max(max(path) for path in tree.paths)
    if num_ranks is None:
        num_ranks = proposer.needs.vocab_size
    if num_ranks is not None and rank >= num_ranks:
        raise OptionError(
            f"tree asks for rank {rank}, the vocabulary has {num_ranks} tokens; use smaller ranks"
        )
