"""Check that a proposer keeps the rules of its interface."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from speclm.acceptance.interface import TargetCandidates
from speclm.config import MAX_DEPTH, require_in_range
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import ProposerContractError
from speclm.sampling.noise import PositionNoise, get_generator_state
from speclm.target import TargetFeatures
from speclm.testing._sound_draft import require_sound_draft
from speclm.testing.scripted import (
    ScriptedRow,
    accept_scripted,
    drafted_paths,
    limit_to_slowest,
    random_features,
    repetitive_rows,
    scripted_prefill,
    texts_with_one_end,
)

_NUM_ROUNDS = 8
_PROB_TOLERANCE = 1e-3  # a product over more rows, or over padding, rounds differently

Drafted = dict[tuple[int, ...], float]
History = list[list[Drafted]]  # for each round a list of rows


def check_proposer(
    make_proposer: Callable[[], Proposer] | Proposer,
    *,
    vocab_size: int = 32,
    hidden_size: int = 32,
    device: str | torch.device = "cpu",
    temperature: float = 0.8,
    max_length: int = 64,
    seed: int = 0,
) -> None:
    """Drive a proposer through scripted generations and check what it returns.

    The generations are greedy and sampled, of one row and of left-padded batches, with every
    accepted length, rows that wait and rows that end. The check covers dtype, device, shape,
    topology and probabilities of drafts; that column 0 holds the roots; that arguments, earlier
    drafts and the global generators stay unchanged; that a row's draft depends neither on the
    other rows nor on an earlier generation; and that committed tokens matter to a proposer whose
    drafts depend on the prompt. Drafts of a proposer that declares `remembers` may depend on other
    rows and generations. A proposer that requests features receives random ones, which
    depend only on the token. The check takes seconds; models should be small.

    Args:
        make_proposer: A proposer, or a function that builds one; a function also reveals state that
            instances share.
        vocab_size: Size of the target's vocabulary.
        hidden_size: Width of the target's hidden states, for proposers that request them.
        device: Device of the target.
        temperature: Temperature of the sampled generations.
        max_length: Maximum tokens of prompt and output together, in ``[32, 4096]``.
        seed: Seed of prompts and of the target's choices.

    Raises:
        ProposerContractError: At the first broken rule; the message gives the rule and the remedy.
        OptionError: If an option is out of range.

    Example:
        ```python
        check_proposer(lambda: NgramProposer(num_draft_tokens=4))
        ```
    """
    require_in_range("vocab_size", vocab_size, low=2, high=10**7)
    require_in_range("hidden_size", hidden_size, low=1, high=10**6)
    require_in_range("max_length", max_length, low=32, high=4096)
    make = (lambda: make_proposer) if isinstance(make_proposer, Proposer) else make_proposer
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=device.type):
        for mode_temperature in (0.0, temperature):
            driver = _Driver(vocab_size, hidden_size, device, mode_temperature, seed)
            batch = repetitive_rows(
                vocab_size=vocab_size, seed=seed, num_rounds=_NUM_ROUNDS, max_length=max_length
            )
            _require_independence(make, driver, batch)
            _require_commits_matter(make, driver, max_length)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Runs generations under the same conditions."""

    vocab_size: int
    hidden_size: int
    device: torch.device
    temperature: float
    seed: int

    def run(
        self, proposer: Proposer, rows: Sequence[ScriptedRow], *, rounds: int = _NUM_ROUNDS
    ) -> History:
        """Generate with one proposer; return its drafts."""
        watch = _Watch(type(proposer).__name__, self.device)
        torch.manual_seed(self.seed)
        noise = None
        if self.temperature:
            noise = PositionNoise(batch=len(rows), vocab_size=self.vocab_size, device=self.device)
        roots = [row.said[0] for row in rows]
        positions = [1] * len(rows)
        prefill = scripted_prefill(rows, device=self.device, temperature=self.temperature)
        inputs = [prefill.tokens, prefill.num_padding, prefill.first_tokens]
        features = random_features(
            self.vocab_size, self.hidden_size, seed=self.seed, device=self.device
        )
        # The logits after a token, of which a proposer may ask for the best.
        scores = random_features(
            self.vocab_size, self.vocab_size, seed=self.seed, device=self.device
        )
        needs_features = proposer.features != TargetFeatures.NONE
        if needs_features:
            inputs.append(features[prefill.tokens])
            prefill = replace(prefill, features=inputs[-1])
        watch.call("begin", partial(proposer.begin, prefill), inputs)
        history: History = []
        for round_index in range(rounds):
            if noise is not None:
                noise.seek(positions, live=[True] * len(rows))
                noise.at_depth(MAX_DEPTH)  # drawn here, so that what moves later is a fault
            given = torch.tensor(roots, device=self.device, dtype=torch.long)
            draft = watch.draft(proposer, given, noise, self.vocab_size)
            history.append([drafted_paths(draft, row) for row in range(len(rows))])
            limits = [row.limit(positions[b], round_index) for b, row in enumerate(rows)]
            if not any(limits):
                break  # no row is live
            accepted = accept_scripted(draft, rows, positions)
            if proposer.needs_lockstep:
                is_live = [
                    round_index < row.ends_after and positions[b] < row.max_new_tokens
                    for b, row in enumerate(rows)
                ]
                limits = limit_to_slowest(accepted, limits, is_live)
            accepted = accepted.cut(limits)
            decided = [accepted.path, accepted.tokens]
            if needs_features:
                accepted = accepted.with_features(features[draft.tokens])
                assert accepted.features is not None
                decided.append(accepted.features)
            if proposer.num_observed:
                accepted = accepted.with_candidates(
                    TargetCandidates.best(scores[draft.tokens], num=proposer.num_observed)
                )
            watch.call("commit", partial(proposer.commit, accepted), decided)
            for row, emitted in enumerate(accepted.emitted):
                positions[row] += len(emitted)
                roots[row] = emitted[-1] if emitted else roots[row]
        return history


class _Watch:
    """Calls a proposer, and checks that it changes nothing but its own state."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name = name
        self._device = device
        self._kept: list[tuple[Tensor, Tensor]] = []  # tensors of drafts, and what they were

    def draft(
        self, proposer: Proposer, roots: Tensor, noise: PositionNoise | None, vocab_size: int
    ) -> Draft:
        """Call `propose` and check the draft."""
        drafts: list[Draft] = []
        self.call("propose", lambda: drafts.append(proposer.propose(roots, noise=noise)), (roots,))
        (draft,) = drafts
        if type(draft) is not Draft:
            raise ProposerContractError(
                f"{self._name}.propose returned {type(draft).__name__}, expected a Draft; build "
                "one from tokens and topology"
            )
        require_sound_draft(draft, roots=roots, vocab_size=vocab_size, name=self._name)
        topology = draft.topology
        tensors = [draft.tokens, topology.parents, topology.depths, topology.path_ends]
        tensors.append(topology.ancestor_words)
        self._kept += [(tensor, tensor.clone()) for tensor in tensors]
        return draft

    def call(self, method: str, action: Callable[[], object], inputs: Sequence[Tensor]) -> None:
        """Call one method, and check that what must not change has not changed."""
        before = [tensor.clone() for tensor in inputs]
        states = _generator_states(self._device)
        action()
        for generator, state in _generator_states(self._device).items():
            if state != states[generator]:
                raise ProposerContractError(
                    f"{self._name}.{method} moved the global generator of {generator}, expected "
                    "it untouched, since the target draws from it; draw from a torch.Generator "
                    "of your own"
                )
        if not all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True)):
            raise ProposerContractError(
                f"{self._name}.{method} mutated its arguments, expected them unchanged; clone "
                "before writing"
            )
        if not all(torch.equal(now, then) for now, then in self._kept):
            raise ProposerContractError(
                f"{self._name}.{method} mutated an earlier draft, expected drafts to stay as they "
                "were returned; return new tensors every round"
            )


def _require_independence(
    make: Callable[[], Proposer], driver: _Driver, batch: list[ScriptedRow]
) -> None:
    """Check that drafts depend neither on earlier generations nor on other rows."""
    first = make()
    name = type(first).__name__
    history = driver.run(first, batch)
    if first.remembers:
        driver.run(first, batch[::-1])
        return
    others = [
        replace(row, prompt=row.prompt[::-1][:-1], seed=f"other {b}", said=[])
        for b, row in enumerate(batch)
    ]
    driver.run(first, [*others, *others[:1]])
    remedy = "reset everything in begin, and share nothing between instances"
    what = f"{name} kept state between generations"
    _require_same(history, driver.run(first, batch), what=what, remedy=remedy)
    _require_same(history, driver.run(make(), batch), what=what, remedy=remedy)

    if first.needs_lockstep:
        return  # lockstep rows depend on each other, and so do their drafts
    what = f"{name} mixed the rows of a batch"
    remedy = "keep state per row, and mind left padding"
    for kept in range(len(batch)):
        mates = [row if b == kept else others[b] for b, row in enumerate(batch)]
        found = driver.run(make(), mates)
        _require_same(_row_of(history, kept), _row_of(found, kept), what=what, remedy=remedy)
    if not driver.temperature:  # noise differs between rows
        # Among copies of itself, a row has no padding and the batch size is the same.
        copies = [replace(batch[0], waits=r.waits, ends_after=r.ends_after, said=[]) for r in batch]
        found = driver.run(make(), [replace(batch[0], said=[]), *copies[1:]])
        _require_same(_row_of(history, 0), _row_of(found, 0), what=what, remedy=remedy)


def _require_commits_matter(make: Callable[[], Proposer], driver: _Driver, max_length: int) -> None:
    """Check that a proposer which reads the prompt also reads committed tokens."""
    proposer = make()
    variants = [
        texts_with_one_end(vocab_size=driver.vocab_size, seed=driver.seed, side=side)
        for side in range(2)
    ]
    rounds = len(variants[0][0])

    def last_drafts(prompt: list[list[int]], said: list[list[int]], rounds: int) -> list[Drafted]:
        row = ScriptedRow([], driver.vocab_size, "commit", said=[0], one_by_one=True)
        row.max_new_tokens = max_length - 12
        rows = [replace(row, prompt=p, said=list(s)) for p, s in zip(prompt, said, strict=True)]
        return driver.run(proposer, rows, rounds=rounds)[-1]

    in_prompt = [
        last_drafts([t[:-1] for t in text], [t[-1:] for t in text], 1) for text in variants
    ]
    if in_prompt[0] == in_prompt[1]:
        return  # it ignores what comes before the root, so commits need not matter
    in_output = [last_drafts([[0, 1]] * len(text), text, rounds) for text in variants]
    if in_output[0] == in_output[1]:
        raise ProposerContractError(
            f"{type(proposer).__name__} ignores commit: drafts differ after different prompts but "
            "not after different committed tokens, expected both to matter; take note "
            "of accepted.emitted in commit"
        )


def _require_same(expected: History, found: History, *, what: str, remedy: str) -> None:
    for round_index, (then, now) in enumerate(zip(expected, found, strict=False)):
        for row, (old, new) in enumerate(zip(then, now, strict=True)):
            is_same = old.keys() == new.keys() and all(
                abs(old[path] - new[path]) <= _PROB_TOLERANCE for path in old
            )
            if not is_same:
                raise ProposerContractError(
                    f"{what}: in round {round_index} row {row} is {str(new)[:120]}, expected "
                    f"{str(old)[:120]}; {remedy}"
                )


def _row_of(history: History, row: int) -> History:
    return [[drafted[row]] for drafted in history]


def _generator_states(device: torch.device) -> dict[str, bytes]:
    # Python's own `random` is left out: run-time type checkers draw from it.
    numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy one is the global one
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(numpy_state),
    }
    if device.type != "cpu":
        states[f"torch.{device.type}"] = get_generator_state(device).numpy().tobytes()
    return states
