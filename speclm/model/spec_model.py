"""`SpecModel`: a causal language model whose `generate` is faster and returns the same tokens."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from speclm.acceptance import AcceptanceRule, resolve_acceptance_rule
from speclm.adaptive.memory import Memory
from speclm.drafting.interface import Proposer
from speclm.engines import Engine
from speclm.errors import OptionError
from speclm.files.hub import with_named_options
from speclm.generation.regular import NeedsRegularGeneration
from speclm.generation.request import Setup, require_acceptable
from speclm.model.call import (
    AUTO,
    KeepsCounters,
    Tree,
    decode,
    naming_unknown,
    normalize_tree,
    require_fillable,
    require_speculation,
    slowdowns,
    with_counters,
)
from speclm.model.engines import Engines, normalize_engine
from speclm.model.fitting import MissWatch, require_fits
from speclm.model.heads import (
    Heads,
    load_base,
    load_proposer,
    options_with_base,
    push_heads,
    save_heads,
    unwrap,
)
from speclm.model.report import describe_model, write_report
from speclm.model.wrapping import Wrapper, attach, detach, enter
from speclm.self_check.verdict import SelfCheck
from speclm.self_check.watch import Watch
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from speclm.tree.plan import TreePlan

_log = logging.getLogger("speclm")


class SpecModel(KeepsCounters, Wrapper):
    """A base model together with a proposer, which drafts the tokens that the base verifies.

    It can be used in place of the base: other attributes are those of the base, calling it runs a
    forward of the base, and `isinstance` recognises the base's class. ``to``, ``half``, ``eval``
    and the like also apply to heads and draft models, and return the `SpecModel`.

    Example:
        ```python
        from speclm import SpecModel
        from speclm.demo.bundle import assets

        model = SpecModel.from_pretrained(assets()["base"], dtype="float32")
        ```
    """

    def __init__(
        self,
        base: nn.Module,
        proposer: Proposer | None,
        *,
        adaptive: bool = True,
        tree: Tree | None = None,
        engine: str | Engine = "auto",
    ) -> None:
        """Wrap a loaded model.

        Args:
            base: Any causal language model, or a PEFT model; it stays usable by itself.
            proposer: Drafts tokens; None decodes one token per round.
            adaptive: Whether to pause drafts while measured times show that they do not pay.
                Tokens do not depend on it in float32; in half precision, rounds of different sizes
                round differently.
            tree: Default of the option ``tree`` of `generate`.
            engine: Default of the option ``engine`` of `generate`.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            OptionError: If `proposer` is not one, or was built for another base.
            VocabularyMismatchError: If it was built for another vocabulary.
        """
        self._target = TargetView(unwrap(base, SpecModel))
        self.proposer = proposer
        self._watch = Watch(self._target)
        self.adaptive, self.tree = adaptive, tree
        self.engine, self._engines = normalize_engine(engine), Engines()
        self.memory, self._misses = Memory(), MissWatch()
        self._plain_seconds: dict[int, float] = {}
        self._logged: set[str] = set()

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - its options are keywords
        cls,
        base: str | Path | nn.Module,
        heads: Heads | list[Heads] | tuple[Heads, ...] | None = "lookup",
        *,
        heads_revision: str | None = None,
        heads_subfolder: str | None = None,
        heads_kwargs: dict[str, Any] | None = None,
        num_draft_tokens: int | None = None,
        adaptive: bool | None = None,
        tree: Tree | None = None,
        engine: str | Engine = "auto",
        **kwargs: Any,
    ) -> Self:
        """Load a base model and a proposer.

        Args:
            base: Folder, hub id or loaded model.
            heads: Name of a registered proposer, folder or hub id of heads or of a draft model, a
                loaded draft model, a `Proposer`, or None for no drafts. The drafts of a list of
                these are merged. By default ``"lookup"``, which needs no weights.
            heads_revision: Branch, tag or commit of heads or a draft model on the hub.
            heads_subfolder: Their folder inside the repository, or inside a local folder.
            heads_kwargs: For the hub: token, cache_dir, local_files_only and force_download. For a
                draft model: arguments of its ``from_pretrained``, by default the base's dtype and
                device. For heads and proposers: their options.
            num_draft_tokens: Maximum draft tokens per round; by default the proposer's own choice.
            adaptive: As in the constructor; by default True, unless a static tree is given.
            tree: Default of the option ``tree`` of `generate`.
            engine: Default of the option ``engine`` of `generate`.
            **kwargs: Arguments of the base's ``from_pretrained``. Of those for the hub, token,
                cache_dir, local_files_only and force_download apply to heads on the hub too, and
                the others to heads in the base's own repository.

        Raises:
            UnknownNameError: If `heads` is a string that names nothing.
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If a draft model has another vocabulary than the base.
            OptionError: If an argument is unknown, or would not affect an object already built.
        """
        base, engine = unwrap(base, SpecModel), normalize_engine(engine)
        model = load_base(base, kwargs)
        named = {"revision": heads_revision, "subfolder": heads_subfolder}
        heads_kwargs = with_named_options(heads_kwargs, named)
        proposer = load_proposer(
            heads,
            model,
            heads_kwargs=heads_kwargs,
            num_draft_tokens=num_draft_tokens,
            with_base=partial(options_with_base, base=base, kwargs=kwargs),
        )
        if adaptive is None:
            adaptive = (heads_kwargs or {}).get("tree") is None
        require_fillable(normalize_tree(tree), proposer)
        return cls(model, proposer, adaptive=adaptive, tree=tree, engine=engine)

    @property
    def proposer(self) -> Proposer | None:
        """Drafts tokens; may be set to another proposer that fits the base."""
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
        """Default of the option ``tree`` of `generate`."""
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
        engine: str | Engine | None = None,
        busy: str = "wait",
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Generate the tokens that ``base.generate`` generates, in fewer forwards.

        Takes the arguments of ``base.generate``, and four options of its own. `acceptance` is the
        rule that decides which draft tokens are kept when sampling. ``"exact"`` gives the tokens
        of ``base.generate`` under the same seed, ``"rejection"`` other tokens from the same
        distribution, and ``"typical"`` is lossy. Greedy decoding is exact under every rule.

        `tree` sets the shape of drafts: ``"auto"`` for the depth and size that are fastest by
        measured times and acceptance; a static tree as a preset's name, widths, paths of ranks or
        a JSON file of these; a `TreePlan`. By default the proposer's own settings apply. A static
        tree or a plan is drafted in every round, even where it does not pay.

        `engine` says how trees are verified: ``"eager"``; ``"compile"``, which compiles the base's
        forward for each size of tree and cache; ``"graph"``, which records it as a CUDA graph; or
        ``"auto"``, which at present is ``"eager"``. What an engine cannot run is verified eagerly,
        and `SpeculationStats.engine` says why.

        `busy` says what to do while another thread's call uses the base or the proposer:
        ``"wait"`` or ``"raise"``.

        Calls that need another decoding method, such as beam search, are answered by
        ``base.generate`` itself, and so are calls from inside a call's processors, criteria and
        streamers; one log line gives the reason. `last_speculation` then holds the counters.

        Returns:
            Prompt and new tokens ``[batch, length]``; with ``return_dict_in_generate=True`` a
            `SpeculativeOutput` whose ``speculation`` holds the counters. Beams return
            Transformers' own class, with that attribute.

        Raises:
            OptionError: If an option has an unknown value, or the proposer cannot make the drafts
                that the acceptance rule or `tree` needs.
            UnknownNameError: If no acceptance rule or preset has the name given.
            TopologyError: If the paths in `tree` do not form a tree.
            PromptError: If the prompt is empty, right-padded or too long for the model.
            CacheError: If a cache is passed in that cannot be rolled back.
            NumericalError: If the target's logits are not numbers.
            BusyError: If `busy` is ``"raise"`` and another thread uses the base or the proposer.
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
        static = self._engines.forward(
            self.engine if engine is None else engine, self._target, state=self._watch.state
        )
        stats = SpeculationStats(verification=check.verification.value, self_check=check.reason)
        try:
            require_speculation(self._watch, arguments, self.generation_config)
            for message, reason in slowdowns(check, self.proposer):
                self._log_once(message, reason)
            setup = Setup(
                target=self._target,
                proposer=self.proposer,
                verification=check.verification,
                rule=rule,
                plan=plan if isinstance(plan, TreePlan) else None,
                pauses=self.memory if self.adaptive and not isinstance(plan, TreePlan) else None,
                trees=self.memory if plan == AUTO else None,
                static=static,
            )
            output = decode(
                self._base_generate,
                arguments,
                self.generation_config,
                setup,
                stats,
                waits=busy == "wait",
                report=self._report,
            )
            self._misses.look(self.proposer, stats, target=self._target)
        except NeedsRegularGeneration as reason:
            self._log_once("regular generation with %s.generate: %s", str(reason))
            stats = SpeculationStats(self_check=check.reason, fallbacks=[str(reason)])
            self._report(stats)
            output = with_counters(self._base_generate(**arguments), stats)
        self._report_again(stats)
        return output

    def attach(self) -> None:
        """Replace ``base.generate`` by this model's; see `patch`.

        Raises:
            PatchError: If the base is patched already.
        """
        attach(self.base, self.generate, owner=self)

    def detach(self) -> None:
        """Restore the ``generate`` that the base had before `attach`.

        Raises:
            PatchError: If this model did not patch the base, or something was put over it since.
        """
        detach(self.base, owner=self)

    def __enter__(self) -> Self:
        enter(self.base, self.generate, owner=self)
        return self

    def __exit__(self, *exception: object) -> None:
        detach(self.base, owner=self)

    def __repr__(self) -> str:
        return describe_model(
            self._target, self.proposer, self.self_check, self.tree, self.last_speculation
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: str | None = None,  # noqa: A002 - as users expect it
    ) -> None:
        """Write the heads, without the base, and a model card into a folder.

        Args:
            folder: Created if it does not exist.
            format: Checkpoint format of other software, such as ``"vllm"``; by default our own,
                which keeps the static tree. `speclm.model.exporting.format_names` lists them.

        Raises:
            OptionError: If the proposer has no heads, such as n-grams or a draft model.
            UnknownNameError: If there is no such format for these heads.
            CheckpointError: If the folder is a file or holds another model's config, or the format
                cannot hold the heads.
        """
        save_heads(folder, self.proposer, self.base, to=format)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: str | None = None,  # noqa: A002 - as in `save_pretrained`
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the heads, without the base, and a model card; return the commit's address.

        Args:
            repo_id: Repository; created if it does not exist.
            format: As in `save_pretrained`.
            private: Whether a new repository is private; None for the account's default.
            token: Access token; None for the stored one.

        Raises:
            OptionError: If the proposer has no heads, such as n-grams or a draft model.
        """
        options: Any = {"to": format, "private": private, "token": token}
        return push_heads(repo_id, self.proposer, self.base, **options)

    def print_report(self, *, write: Callable[[str], object] = print) -> None:
        """Print what is wrapped, how drafts are verified and why, and the last call's counters."""
        write_report(
            self._target,
            self.proposer,
            self.self_check,
            self.last_speculation,
            write=write,
        )

    def _base_generate(self, **arguments: Any) -> Any:
        # The class's method: an instance attribute may be a wrapper that leads back here.
        with naming_unknown(arguments):
            return cast("Any", type(self.base)).generate(self.base, **arguments)

    def _log_once(self, message: str, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning(message, type(self.base).__name__, reason)
