"""`SpecModel`: a causal language model whose `generate` is faster and returns the same tokens."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from speclm.acceptance import AcceptanceRule, resolve_acceptance_rule
from speclm.adaptive.memory import Memory
from speclm.drafting.interface import Proposer
from speclm.errors import OptionError
from speclm.files.hub import with_base_options
from speclm.generation.delegation import NeedsRegularGeneration
from speclm.model.arguments import naming_unknown, require_acceptable
from speclm.model.attaching import attach, detach, enter
from speclm.model.call import KeepsCounters, decode, with_counters
from speclm.model.fitting import MOVES, MissWatch, move, require_fits
from speclm.model.loading import Heads, load_base, load_proposer, unwrap
from speclm.model.obstacles import notes, require_speculation
from speclm.model.report import write_report
from speclm.model.saving import push_heads, save_heads
from speclm.model.trees import AUTO, Tree, normalize_tree, require_fillable
from speclm.self_check.verdict import SelfCheck
from speclm.self_check.watch import Watch
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from speclm.tree.plan import TreePlan

_log = logging.getLogger("speclm")


class SpecModel(KeepsCounters):
    """A base model together with the proposer that guesses its tokens.

    It stands in for the base: what is not defined here is read from the base and written to it,
    calling it runs a forward of the base, and `isinstance` takes it for one of the base's class.
    ``to``, ``half``, ``eval`` and the like take heads and draft models along, and return it.

    Example:
        ```python
        from speclm import SpecModel
        from speclm.demo.bundle import assets

        model = SpecModel.from_pretrained(assets()["base"], "ngram", dtype="float32")
        ```
    """

    def __init__(
        self,
        base: nn.Module,
        proposer: Proposer | None,
        *,
        adaptive: bool = True,
        tree: Tree | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            base: Any causal language model, PEFT's too; it stays usable by itself.
            proposer: Guesses tokens; None decodes one token a round.
            adaptive: Whether rounds go without a draft while measured times say that drafts do
                not pay. Tokens do not depend on it, in float32 at least: half precision rounds
                otherwise in rounds of another size.
            tree: What the drafts of calls should be that do not say so themselves; see `generate`.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            OptionError: If `proposer` is not one, or was built for another base.
            VocabularyMismatchError: If it was built for another vocabulary.
        """
        self._target = TargetView(unwrap(base, SpecModel))
        self.proposer = proposer
        self._watch = Watch(self._target)
        self.adaptive, self.tree = adaptive, tree
        self.memory, self._misses = Memory(), MissWatch()
        self._logged: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | nn.Module,
        heads: Heads | list[Heads] | tuple[Heads, ...] | None = "ngram",
        *,
        heads_kwargs: dict[str, Any] | None = None,
        num_draft_tokens: int | None = None,
        adaptive: bool | None = None,
        tree: Tree | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a base model and a proposer.

        Args:
            base: Folder, hub id or loaded model.
            heads: Name of a registered proposer, folder or hub id of heads or of a draft model, a
                loaded draft model, a `Proposer`, or None. A list of these joins their guesses.
            heads_kwargs: From the hub: revision, token, cache_dir, subfolder, local_files_only and
                force_download. For a draft model: arguments of its ``from_pretrained``, by default
                the base's dtype and device. For heads and proposers: their options.
            num_draft_tokens: Most tokens drafted a round; by default the proposer's own choice.
            adaptive: As in the constructor; by default on, unless a static tree is given.
            tree: What the drafts of calls should be that do not say so themselves; see `generate`.
            **kwargs: Of the base's ``from_pretrained``. Heads of the same name, which lie in its
                repository, get those of the hub too.

        Raises:
            UnknownNameError: If `heads` is a string that names nothing.
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If a draft model has another vocabulary than the base.
            OptionError: If arguments are given that the objects passed in have no use for, or do
                not know.
        """
        base = unwrap(base, SpecModel)
        model = load_base(base, kwargs)
        heads_kwargs = with_base_options(heads_kwargs, kwargs, heads=heads, base=base)
        proposer = load_proposer(
            heads, model, heads_kwargs=heads_kwargs, num_draft_tokens=num_draft_tokens
        )
        if adaptive is None:
            adaptive = (heads_kwargs or {}).get("tree") is None
        require_fillable(normalize_tree(tree), proposer)
        return cls(model, proposer, adaptive=adaptive, tree=tree)

    @property
    def proposer(self) -> Proposer | None:
        """What guesses tokens; another may be put in its place, if it fits the base."""
        return self._proposer

    @proposer.setter
    def proposer(self, proposer: Proposer | None) -> None:
        if proposer is not None and not isinstance(proposer, Proposer):
            raise OptionError(
                f"proposer is {proposer!r}, expected a Proposer or None; "
                "SpecModel.from_pretrained also takes names, folders and draft models"
            )
        if proposer is not None:
            require_fits(proposer, self._target)
        self._proposer = proposer

    @property
    def tree(self) -> TreePlan | str | None:
        """What the drafts of calls should be that do not say so themselves; see `generate`."""
        return self._tree

    @tree.setter
    def tree(self, tree: Tree | None) -> None:
        self._tree = normalize_tree(tree)

    @property
    def self_check(self) -> SelfCheck:
        """How drafts are verified, and why, for the base as it was at the last call."""
        return self._watch.check

    @self_check.setter
    def self_check(self, check: SelfCheck) -> None:
        self._watch.check = check

    @property
    def base(self) -> PreTrainedModel:
        """The wrapped model."""
        return self._target.model

    @property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's generation config."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.base.generation_config = config

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        return self.base.dtype

    def generate(  # noqa: PLR0913, PLR0917 - the order of `base.generate`
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,  # noqa: FBT001
        assistant_model: PreTrainedModel | None = None,
        streamer: BaseStreamer | None = None,
        *,
        acceptance: str | AcceptanceRule = "exact",
        tree: Tree | None = None,
        busy: str = "wait",
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Generate the tokens that ``base.generate`` generates, in fewer forwards.

        Takes what ``base.generate`` takes, and three options of its own. `acceptance` is the rule
        that decides which draft tokens are kept when sampling. ``"exact"`` gives the tokens of
        ``base.generate`` under the same seed, ``"rejection"`` others from the same distribution,
        and ``"typical"`` is lossy. Greedy decoding is exact under every rule.

        `tree` says what is drafted: ``"auto"`` for the depth and size that measured times and
        acceptance make fastest; a static tree as a preset's name, widths, paths of ranks or a JSON
        file of these; a `TreePlan`; by default what the proposer's own settings say. A static tree
        or a plan is drafted in every round, whether it pays or not.

        Settings that ask for another way to decode, such as beams, are left to ``base.generate``
        itself, and one line is logged that says so. After the call `last_speculation` holds its
        counters.

        While another thread's call has the base or the proposer, this one waits for its turn, or
        raises an error with ``busy="raise"``. A call from inside another one, by a processor,
        criterion or streamer, is left to ``base.generate``.

        Returns:
            Prompt and new tokens ``[batch, length]``; with ``return_dict_in_generate=True`` a
            `SpeculativeOutput` whose ``speculation`` holds the counters. Beams return
            Transformers' own class, with that attribute.

        Raises:
            OptionError: If `busy` or another option has no such value, or the acceptance rule or
                `tree` needs drafts of a kind that the proposer does not make.
            UnknownNameError: If no acceptance rule or preset has the name given.
            TopologyError: If `tree` is none.
            PromptError: If the prompt is empty, right-padded or too long for the model.
            CacheError: If a cache is passed in that cannot be rolled back.
            NumericalError: If the target's logits are not numbers.
            BusyError: If `busy` is ``"raise"`` and another thread has the base or the proposer.
        """
        arguments: dict[str, Any] = {
            "inputs": inputs,
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
            **kwargs,
        }
        rule = resolve_acceptance_rule(acceptance)
        plan = self.tree if tree is None else normalize_tree(tree)
        require_fillable(plan, self.proposer)
        require_acceptable(arguments, self.generation_config, busy=busy)
        arguments.pop("custom_generate", None)  # it is None
        self._watch.look(self._target)
        check = self.self_check
        stats = SpeculationStats(backend=check.verification.value, self_check=check.reason)
        try:
            require_speculation(self._watch, arguments, self.generation_config)
            for message, reason in notes(check, self.proposer):
                self._log_once(message, reason)
            output = decode(
                self._base_generate,
                arguments,
                self.generation_config,
                target=self._target,
                backend=check.verification,
                proposer=self.proposer,
                stats=stats,
                rule=rule,
                pauses=self.memory if self.adaptive and not isinstance(plan, TreePlan) else None,
                tree=plan if isinstance(plan, TreePlan) else None,
                trees=self.memory if plan == AUTO else None,
                waits=busy == "wait",
                report=partial(self._report, stats),
            )
            self._misses.look(self.proposer, stats, target=self._target)
        except NeedsRegularGeneration as reason:
            self._log_once("decoding plainly with %s.generate: %s", str(reason))
            stats = SpeculationStats(self_check=check.reason, fallbacks=[str(reason)])
            self._report(stats)
            output = with_counters(self._base_generate(**arguments), stats)
        self._report_again(stats)
        return output

    def attach(self) -> None:
        """Make ``base.generate`` this model's; see `patch`.

        Raises:
            PatchError: If the base is patched already.
        """
        attach(self.base, self.generate, owner=self)

    def detach(self) -> None:
        """Give the base back the ``generate`` that it had before `attach`.

        Raises:
            PatchError: If this model did not patch the base, or something was put over it since.
        """
        detach(self.base, owner=self)

    def __enter__(self) -> Self:
        enter(self.base, self.generate, owner=self)
        return self

    def __exit__(self, *exception: object) -> None:
        detach(self.base, owner=self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the base."""
        return self.base(*args, **kwargs)

    @property  # type: ignore[misc]  # that of object can be written
    def __class__(self) -> type:  # what isinstance and pipelines ask for
        return type(self.base) if "_target" in vars(self) else type(self)

    def __getattr__(self, name: str) -> Any:
        if name == "_target" or name.startswith("__"):  # asked for before they exist, by copying
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in MOVES:
            return partial(move, self, name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = hasattr(type(self), name) or name in vars(self) or "_target" not in vars(self)
        if is_own or not hasattr(self.base, name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.base, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *vars(self), *dir(self.base)})

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return object.__new__, (type(self),), dict(vars(self))  # by default it is __class__ itself

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads, without the base, and a model card into a folder.

        Raises:
            OptionError: If the proposer has no heads, as n-grams and draft models have none.
            CheckpointError: If the folder is a file or holds another model's config.
        """
        save_heads(folder, self.proposer, self.base)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the heads, without the base, and a model card; return the commit's address.

        Args:
            repo_id: Repository, made if it does not exist.
            private: Whether a new repository is private; None for the account's default.
            token: Access token; None for the one that is logged in with.

        Raises:
            OptionError: If the proposer has no heads, as n-grams and draft models have none.
        """
        return push_heads(repo_id, self.proposer, self.base, private=private, token=token)

    def print_report(self, *, write: Callable[[str], object] = print) -> None:
        """Print what is wrapped, how trees are verified and why, and the last call's counters.

        Args:
            write: Receives each line.
        """
        write_report(
            self._target, self.proposer, self.self_check, self.last_speculation, write=write
        )

    def _base_generate(self, **arguments: Any) -> Any:
        # The class's method: an instance attribute may be a wrapper that leads back here.
        with naming_unknown(arguments):
            return cast("Any", type(self.base)).generate(self.base, **arguments)

    def _log_once(self, message: str, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning(message, type(self.base).__name__, reason)
