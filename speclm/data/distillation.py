"""Self-distillation: generate the answers of conversations anew, with the base itself."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from speclm._version import __version__
from speclm.data.dialogues import (
    Answer,
    AnswerSource,
    Dialogue,
    DistillSettings,
    Drop,
    Finished,
    NumberedRow,
)
from speclm.data.row_plan import RowPlan, Shard
from speclm.data.shards import (
    ShardFile,
    Totals,
    delete_folder,
    merge_shards,
    open_folder,
)
from speclm.errors import OptionError, reason_of
from speclm.methods.recycling.checkpoint import memory_fingerprint
from speclm.model import SpecModel
from speclm.sampling.noise import GeneratorStates
from speclm.target.loading import eos_token_ids


class ModelSource(AnswerSource):
    """Answers from a model in this process, a batch of conversations at a time.

    A call is seeded with the ids of its rows. The default random generators are left as they were.

    Example:
        ```python
        source = ModelSource(SpecModel.from_pretrained("org/base", "org/heads"), tokenizer)
        ```
    """

    def __init__(self, spec: SpecModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a model.

        Args:
            spec: The model with a proposer, which decides the speed only.
            tokenizer: The base's, with a chat template.

        Raises:
            OptionError: If the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise OptionError(
                "the tokenizer has no chat template; take a model that was tuned to chat, or set "
                "tokenizer.chat_template"
            )
        self.spec = spec
        self._tokenizer = tokenizer
        self._num_rounds = self._num_accepted = 0

    @property
    @override
    def tau(self) -> float | None:
        return 1.0 + self._num_accepted / self._num_rounds if self._num_rounds else None

    @property
    @override
    def answers_together(self) -> bool:
        return True

    @override
    def identity(self) -> dict[str, Any]:
        base = self.spec.base
        quantization = getattr(base.config, "quantization_config", None)
        template = repr(self._tokenizer.chat_template)
        return {
            "weights": memory_fingerprint(base),
            "dtype": str(base.dtype).removeprefix("torch."),
            "quantization": None if quantization is None else type(quantization).__name__,
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
        }

    @override
    def answer(
        self, batches: Iterable[list[NumberedRow]], settings: DistillSettings
    ) -> Iterator[list[Finished]]:
        for rows in batches:
            dialogues = [Dialogue(row, settings) for row in rows]
            while running := [dialogue for dialogue in dialogues if dialogue.is_open]:
                self._answer_turn(running, settings)
            yield [dialogue.finish() for dialogue in dialogues]

    def _answer_turn(self, dialogues: Sequence[Dialogue], settings: DistillSettings) -> None:
        """Answer the next turn of each; those near the end of the model's positions one by one."""
        roomy: list[tuple[Dialogue, list[int]]] = []
        wanted, positions = settings.max_new_tokens, self._max_positions()
        for dialogue in dialogues:
            prompt = self._render(dialogue)
            room = wanted if positions is None else positions - len(prompt)
            if not dialogue.is_open:  # refused
                continue
            if room < 1:
                dialogue.drop(Drop.TOO_LONG, f"{len(prompt)} tokens, {positions} positions")
            elif room < wanted:
                self._generate([(dialogue, prompt)], settings, max_new_tokens=room)
            else:
                roomy.append((dialogue, prompt))
        if roomy:
            self._generate(roomy, settings, max_new_tokens=wanted)

    def _max_positions(self) -> int | None:
        return getattr(self.spec.config.get_text_config(), "max_position_embeddings", None)

    def _render(self, dialogue: Dialogue) -> list[int]:
        """Return the prompt; drop the row if the template refuses it."""
        try:
            text: Any = self._tokenizer.apply_chat_template(
                dialogue.messages,
                tools=dialogue.tools,
                add_generation_prompt=True,
                tokenize=False,
                **dialogue.template_options,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program, and may fail anyhow
            dialogue.drop(Drop.REFUSED, reason_of(error))
            return []
        # The template writes the special tokens itself.
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if not tokens:
            dialogue.drop(Drop.REFUSED, "the chat template renders no tokens")
        return tokens

    def _generate(
        self,
        asked: Sequence[tuple[Dialogue, list[int]]],
        settings: DistillSettings,
        *,
        max_new_tokens: int,
    ) -> None:
        """Answer prompts in one call, and hand out the answers."""
        device, spec = self.spec.device, self.spec
        padding = self._tokenizer.pad_token_id or 0
        input_ids, attention_mask = _pad_left([prompt for _, prompt in asked], padding)
        arguments: dict[str, Any] = {"do_sample": False}
        if settings.is_sampled:
            sampling = ("temperature", "top_p", "top_k")
            arguments = {"do_sample": True, **{name: getattr(settings, name) for name in sampling}}
        states = GeneratorStates(torch.device("cpu"), device)
        ids = [dialogue.row.id for dialogue, _ in asked]
        try:
            torch.manual_seed(settings.seed_of(asked[0][0].num_answers, ids))
            output: Any = spec.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                **arguments,
            )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OptionError(_out_of_memory(error, asked[0][0].row.where, settings)) from error
        finally:
            states.restore()
        self._count()
        ends = eos_token_ids(spec.base)
        for (dialogue, _), row in zip(asked, output[:, input_ids.shape[1] :].tolist(), strict=True):
            length = next((n for n, token in enumerate(row) if token in ends), None)
            text: Any = self._tokenizer.decode(row[:length], skip_special_tokens=True)
            num_tokens = len(row) if length is None else length + 1
            dialogue.take(Answer(str(text), num_tokens, is_cut=length is None))

    def _count(self) -> None:
        stats = self.spec.last_speculation
        assert stats is not None, "a call has just ended"
        lengths = stats.total.accepted_lengths
        self._num_rounds += len(lengths)
        self._num_accepted += sum(lengths)


def _pad_left(
    prompts: Sequence[list[int]], padding: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Return tokens, padded on the left, and a mask that is zero at padding."""
    longest = max(map(len, prompts))
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return (
        torch.tensor(rows, dtype=torch.long, device="cpu"),
        torch.tensor(masks, dtype=torch.long, device="cpu"),
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # a RuntimeError without a type of its own


def _out_of_memory(error: Exception, where: str, settings: DistillSettings) -> str:
    remedy = "a smaller --batch-size (batch_size), or fewer --max-new-tokens (max_new_tokens)"
    if settings.batch_size == 1:
        remedy = "fewer --max-new-tokens (max_new_tokens), or without long rows"
    consequence = ", to which sampled answers are tied: pass --overwrite (overwrite=True) too"
    return (
        f"{where}: memory does not suffice for the batch of {settings.batch_size} conversations "
        f"that begins there ({reason_of(error)}); finished rows are kept: run again with {remedy}"
        f"{consequence if settings.is_sampled else ''}"
    )


@dataclass(frozen=True, slots=True)
class DistillProgress:
    """How far a run is.

    Args:
        num_done: Rows of the shard that are finished, those of earlier runs included.
        num_total: Rows of the shard.
        num_resumed: Rows that earlier runs had finished.
        num_new_tokens: Tokens that this run has generated for finished rows.
        seconds: Time since the first request.
    """

    num_done: int
    num_total: int
    num_resumed: int
    num_new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this run."""
        return self.num_new_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a run did.

    Args:
        out: The file with the rows; None while rows of other shards are missing.
        totals: Rows, tokens and dropped rows of the whole data, or of this shard if `out` is None.
        progress: Rows, tokens and time of this run.
        tau: Tokens per target forward in this run, prefill excluded; None for a server, or if
            nothing was left to do.
    """

    out: Path | None
    totals: Totals
    progress: DistillProgress
    tau: float | None


def distill(
    data: str | Path | RowPlan,
    out: str | Path,
    source: AnswerSource,
    *,
    settings: DistillSettings | None = None,
    shard: Shard | None = None,
    overwrite: bool = False,
    on_progress: Callable[[DistillProgress], object] = lambda _: None,
) -> DistillReport:
    """Generate every answer of the conversations in a file anew, so that heads learn the base's.

    Finished rows are kept in the folder ``OUT.shards`` until all are there. A call with the same
    data, model and settings goes on where an earlier one ended, and `out` is the same: what is
    generated depends on neither shards nor interruptions, in half precision up to rounding. Heads
    may change in between, and without sampling and shards the `batch_size`.

    Args:
        data: JSON lines with ``messages`` and an optional ``id``, or a plan that has read them.
        out: File of JSON lines to write: the rows in their order, with ``id`` and
            ``finish_reason`` ("stop", or "length" if an answer was cut).
        source: What answers, a `ModelSource` or a `ServerSource`.
        settings: How answers are generated; None for the defaults.
        shard: Which part of the rows to answer; None for all. The process that finishes the last
            of several shards writes `out`.
        overwrite: Whether to replace `out`, and finished rows of other data or settings.
        on_progress: Called at the start and when rows are finished.

    Returns:
        What was done.

    Raises:
        DataError: If the data or a finished row cannot be used, or all rows are dropped.
        OptionError: If `out` exists, is the data, cannot be written, or has finished rows of other
            data or settings; or if a batch needs too much memory.
        BusyError: If another process answers the same shard.
        ServerError: If a server cannot be reached, or rows failed again and again.
    """
    settings, shard = settings or DistillSettings(), shard or Shard()
    plan, out = data if isinstance(data, RowPlan) else RowPlan(Path(data)), Path(out)
    require_other_file(plan.path, out)
    manifest = {
        "speclm": __version__,
        "data": plan.identity(),
        "model": source.identity(),
        "settings": settings.deciding(together=source.answers_together, num_shards=shard.count),
        "num_shards": shard.count,
    }
    folder = open_folder(out, manifest, overwrite=overwrite)
    with ShardFile(folder, shard) as file:
        progress = _run(plan, file, source, settings, shard=shard, on_progress=on_progress)
    totals = merge_shards(folder, out, num_rows=len(plan), count=shard.count)
    if totals is not None and shard.count == 1:
        delete_folder(folder, shard)
    return DistillReport(
        out=None if totals is None else out,
        totals=file.totals if totals is None else totals,
        progress=progress,
        tau=source.tau,
    )


def require_other_file(data: Path, out: Path) -> None:
    """Check that two names are not those of one file.

    Raises:
        OptionError: If they are.
    """
    if out.exists() and out.samefile(data):
        raise OptionError(f"{str(out)!r} is the data, expected another file; choose a new name")


def _run(
    plan: RowPlan,
    file: ShardFile,
    source: AnswerSource,
    settings: DistillSettings,
    *,
    shard: Shard,
    on_progress: Callable[[DistillProgress], object],
) -> DistillProgress:
    """Answer the rows that are not finished, and keep them."""
    num_total = sum(map(len, plan.batches(settings.batch_size, shard)))
    num_resumed = len(file.finished)
    whole = source.answers_together and settings.is_sampled
    left = _left(plan.batches(settings.batch_size, shard), file.finished, whole=whole)
    start, num_new_tokens = perf_counter(), 0

    def report() -> DistillProgress:
        seconds = perf_counter() - start
        progress = DistillProgress(
            len(file.finished), num_total, num_resumed, num_new_tokens, seconds
        )
        on_progress(progress)
        return progress

    progress = report()
    for finished in source.answer(plan.read_rows(left), settings):
        new = file.append(finished)
        num_new_tokens += sum(row.num_tokens for row in new)
        progress = report()
    return progress


def _left(batches: Iterable[list[int]], finished: Set[int], *, whole: bool) -> Iterator[list[int]]:
    """Yield the rows of each batch that are not finished; if `whole`, all of one with such rows.

    What is finished in the meantime makes no difference, as its batches have been yielded.
    """
    for batch in batches:
        if rows := [row for row in batch if row not in finished]:
            yield batch if whole else rows
