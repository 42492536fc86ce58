"""Train the demo block heads on the base's own answers, and estimate what they are worth.

`speclm train block` does the same from conversations; here the answers are token ids already, texts
of like length share a batch of about equally many tokens, and the budget is processor time: new
shards of answers are taken up while it runs.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.files.json_lines import parse_json_lines
from speclm.methods.block.checkpoint import BlockCheckpoint, write_block
from speclm.methods.block.config import KINDS
from speclm.methods.block.network import BlockHeads
from speclm.methods.block.objective import BlockObjective, BlockTrainingModel
from speclm.methods.block.training import load_block_heads, new_block_heads
from speclm.methods.block.tree import BlockProposerConfig
from speclm.training.conversations import Example
from speclm.training.dataset import collate_examples


def read_rows(shard: Path) -> list[Example]:
    """Read prompts with their answers; the loss counts the answers."""
    rows: list[Example] = []
    for found in parse_json_lines(shard):
        prompt, answer = found["prompt_ids"], found["answer_ids"]
        mask = [0] * len(prompt) + [1] * len(answer)
        if len(answer) > 1:
            rows.append({"input_ids": prompt + answer, "loss_mask": mask})
    return rows


def new_heads(base: PreTrainedModel, options: argparse.Namespace) -> BlockHeads:
    """Return heads to train: saved ones or new ones."""
    if options.start is not None:
        return load_block_heads(base, options.start)
    return new_block_heads(
        base,
        kind=options.kind,
        num_layers=options.num_layers,
        block_size=options.block_size,
        seed=options.seed,
        feature_layers=tuple(options.layers),
        **({"markov_rank": options.markov_rank} if options.kind == "dspark" else {}),
    )


class Answers:
    """Batches of the rows that were seen least, from shards that may still be written."""

    def __init__(self, folder: Path, *, num_tokens: int, chunk: int, seed: int) -> None:
        """Read batches of `num_tokens`, and look for new shards after every `chunk` rows."""
        self._folder, self._num_tokens, self._chunk = folder, num_tokens, chunk
        self._rng = random.Random(seed)
        self._read: set[Path] = set()
        self._rows: list[Example] = []
        self._num_seen: list[int] = []

    def batches(self) -> Iterator[list[Example]]:
        """Yield batches of rows of like length without end."""
        while True:
            for shard in sorted({*self._folder.glob("*.jsonl")} - self._read):
                self._read.add(shard)
                self._rows += read_rows(shard)
            self._num_seen += [0] * (len(self._rows) - len(self._num_seen))
            key = {i: (n, self._rng.random()) for i, n in enumerate(self._num_seen)}
            chosen = sorted(key, key=key.__getitem__)[: self._chunk]
            for index in chosen:
                self._num_seen[index] += 1
            yield from self._batched([self._rows[index] for index in chosen])

    def _batched(self, rows: list[Example]) -> list[list[Example]]:
        order = sorted(rows, key=lambda row: (len(row["input_ids"]), self._rng.random()))
        batches: list[list[Example]] = [[]]
        for row in order:
            if (len(batches[-1]) + 1) * len(row["input_ids"]) > self._num_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        self._rng.shuffle(batches)
        return batches

    def __str__(self) -> str:
        passes = sum(self._num_seen) / max(len(self._rows), 1)
        return f"{len(self._read)} shards, {len(self._rows)} rows, {passes:.2f} passes"


def save(folder: Path, heads: BlockHeads, num_target_layers: int) -> None:
    """Write heads in bfloat16; a reader finds old or new files but no parts."""
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in heads.state_dict().items()
    }
    checkpoint = BlockCheckpoint(config=heads.config, tensors=tensors)
    write_block(folder, checkpoint, num_target_layers=num_target_layers)


@torch.no_grad()
def report(name: str, model: BlockTrainingModel, rows: list[Example]) -> None:
    """Print what the heads guess on some answers, and the tau of chains and trees of guesses."""
    figures = []
    for num_nodes in (8, 16):
        tree = BlockProposerConfig(depth=model.heads.config.num_drafts, num_draft_tokens=num_nodes)
        base = model.view.model
        measured = BlockTrainingModel(base, model.heads, objective=model.objective, tree=tree)
        measured.eval()
        meter = measured.new_meter()
        for row in rows:
            batch = collate_examples([row])
            outputs = measured(**batch)
            outputs.pop("loss")
            meter.add(tokens=batch["input_ids"], **outputs)
        figures.append(meter.drain())
    model.train()
    best = " ".join(f"{value:.3f}" for key, value in figures[0].items() if key.endswith("_top1"))
    chain, *trees = figures[0]["estimated_tau"], *(found["estimated_tree_tau"] for found in figures)
    print(
        f"{name}: tau of the chain {chain:.3f}, of trees of 8 and 16 nodes "
        f"{trees[0]:.3f} and {trees[1]:.3f}, right by position: {best}",
        flush=True,
    )


def train(
    model: BlockTrainingModel,
    answers: Answers,
    held_out: dict[str, list[Example]],
    options: argparse.Namespace,
) -> None:
    """Minimise the loss until the time is over."""
    torch.manual_seed(options.seed)  # of the anchors
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    start, mean_loss, saved = time.process_time(), 0.0, 0
    model.train()
    for step, batch in enumerate(answers.batches(), 1):
        minutes = (time.process_time() - start) / 60
        share = minutes / options.minutes
        if share >= 1:
            break
        warmup = min(1.0, step / options.warmup_steps)
        rate = (
            options.learning_rate * warmup * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        outputs = model(**collate_examples(batch))
        loss: Tensor = outputs["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean_loss += loss.item() / options.report_every
        if step % options.report_every == 0:
            ranks = outputs["ranks"].flatten(0, 1)
            top1 = " ".join(f"{(r[r >= 0] == 0).float().mean():.2f}" for r in ranks.T)
            print(
                f"step {step}, {minutes:.1f} min: loss {mean_loss:.4f}, right {top1}; {answers}",
                flush=True,
            )
            mean_loss = 0.0
        if minutes // options.save_every > saved:
            saved += 1
            save(options.out, model.heads, model.view.num_layers)
            for task, rows in held_out.items():
                report(task, model, rows[: options.check])


def main() -> None:
    """Parse the command line, train and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("answers", type=Path, help="folder of shards to train on")
    parser.add_argument("held_out", type=Path, help="folder of shards to report on")
    parser.add_argument("out", type=Path, help="folder for the heads")
    parser.add_argument("--kind", choices=KINDS, default="dspark")
    parser.add_argument("--start", type=Path, help="folder of heads to go on from")
    parser.add_argument("--minutes", type=float, default=60.0, help="of processor time")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--markov-rank", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5, 8], help="features")
    parser.add_argument("--anchors", type=int, default=16, help="blocks of a text in a step")
    parser.add_argument("--token-weight", type=float, default=0.5)
    parser.add_argument("--distribution-weight", type=float, default=0.5)
    parser.add_argument("--distance-weight", type=float, default=0.0)
    parser.add_argument("--decay-length", type=float, default=4.0)
    parser.add_argument("--batch-tokens", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--chunk", type=int, default=2048, help="rows before a look for shards")
    parser.add_argument("--report-every", type=int, default=25)
    parser.add_argument("--save-every", type=float, default=10.0, help="minutes")
    parser.add_argument("--check", type=int, default=20, help="rows to report on at a save")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    heads = new_heads(base, options)
    print(f"{sum(weight.numel() for weight in heads.parameters()):,} parameters", flush=True)
    objective = BlockObjective(
        token_weight=options.token_weight,
        distribution_weight=options.distribution_weight,
        distance_weight=options.distance_weight,
        decay_length=options.decay_length,
        max_anchors=options.anchors,
    )
    model = BlockTrainingModel(base, heads, objective=objective)
    held_out = {
        task: read_rows(options.held_out / f"{task}_greedy-0000.jsonl") for task in ("sql", "gsm8k")
    }
    answers = Answers(
        options.answers, num_tokens=options.batch_tokens, chunk=options.chunk, seed=options.seed
    )
    train(model, answers, held_out, options)
    save(options.out, heads, model.view.num_layers)
    heads.bfloat16().float()  # as they are stored
    for task, rows in held_out.items():
        report(task, model, rows)


if __name__ == "__main__":
    main()
