"""Train the demo EAGLE heads on the base's own answers, and estimate what they are worth.

`speclm train eagle` and `speclm train eagle3` do the same from conversations; here the answers are
token ids already, and texts of like length share a batch of about equally many tokens.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.adaptive.acceptance_rates import Ranks, replay_rounds
from speclm.files.json_lines import parse_json_lines
from speclm.methods.eagle.checkpoint import EagleCheckpoint, write_eagle
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.objective import EagleObjective, EagleTrainingModel
from speclm.methods.eagle.training import (
    load_eagle_heads,
    new_eagle_heads,
)
from speclm.training.acceptance_meter import turns
from speclm.training.conversations import Example
from speclm.training.dataset import choose_columns, collate_examples, count_tokens


def read_rows(folder: Path, pattern: str = "*.jsonl") -> list[Example]:
    """Read prompts with their answers; the loss counts the answers."""
    rows = []
    for shard in sorted(folder.glob(pattern)):
        for found in parse_json_lines(shard):
            prompt, answer = found["prompt_ids"], found["answer_ids"]
            mask = [0] * len(prompt) + [1] * len(answer)
            if len(answer) > 1:
                rows.append({"input_ids": prompt + answer, "loss_mask": mask})
    return rows


def new_heads(
    base: PreTrainedModel, rows: list[Example], options: argparse.Namespace
) -> EagleHeads:
    """Return heads to train: saved ones, or new ones, of which EAGLE-3's guess what is frequent."""
    if options.start is not None:
        return load_eagle_heads(base, options.start)
    columns = None
    if options.kind == "eagle3":
        counts = count_tokens(rows, vocab_size=base.config.vocab_size)
        columns = choose_columns(counts, options.draft_vocab_size)
        share = counts[columns].sum() / counts.sum()
        print(f"{len(columns)} tokens cover {share:.4f} of the answers", flush=True)
    return new_eagle_heads(base, kind=options.kind, columns=columns, seed=options.seed)


def make_batches(rows: list[Example], num_tokens: int, rng: random.Random) -> list[list[Example]]:
    """Return rows of like length together, in random order."""
    order = sorted(rows, key=lambda row: (len(row["input_ids"]), rng.random()))
    batches: list[list[Example]] = [[]]
    for row in order:
        if (len(batches[-1]) + 1) * len(row["input_ids"]) > num_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches


def train(model: EagleTrainingModel, rows: list[Example], options: argparse.Namespace) -> None:
    """Minimise the loss over some epochs."""
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)  # of the noise on features
    epochs = [make_batches(rows, options.batch_tokens, rng) for _ in range(options.epochs)]
    num_steps = sum(map(len, epochs))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    start, mean_loss = time.perf_counter(), 0.0
    model.train()
    for step, batch in enumerate((batch for epoch in epochs for batch in epoch), 1):
        warmup = min(1.0, step / options.warmup_steps)
        cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmup * cosine
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the CPU has it
            loss: Tensor = model(**collate_examples(batch))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean_loss += loss.item() / options.report_every
        if step % options.report_every == 0:
            seconds = time.perf_counter() - start
            print(f"step {step} of {num_steps}: loss {mean_loss:.4f}, {seconds:.0f} s", flush=True)
            mean_loss = 0.0


@torch.no_grad()
def report(name: str, model: EagleTrainingModel, rows: list[Example]) -> None:
    """Print what the heads guess on some answers, and the tau of chains of guesses."""
    model.eval()
    texts: list[Ranks] = []
    for row in rows:
        batch = collate_examples([row])
        texts += turns(model(**batch)["ranks"], batch["loss_mask"])
    best = [
        [ranks[step] == 0 for text in texts for ranks in text if ranks[step] >= 0]
        for step in range(model.objective.num_measured)
    ]
    shares = " ".join(f"{sum(right) / len(right):.3f}" for right in best)
    chains = tuple((0,) * depth for depth in range(1, len(best) + 1))
    tau = sum(map(len, texts)) / sum(len(replay_rounds(text, chains)) for text in texts)
    print(f"{name}: tau {tau:.3f}, right by step: {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("answers", type=Path, help="folder of shards to train on")
    parser.add_argument("held_out", type=Path, help="folder of shards to report on")
    parser.add_argument("out", type=Path, help="folder for the heads")
    parser.add_argument("--kind", choices=("eagle", "eagle3"), default="eagle3")
    parser.add_argument("--start", type=Path, help="folder of heads to go on from")
    parser.add_argument("--draft-vocab-size", type=int, default=3072)
    parser.add_argument("--num-steps", type=int, default=5, help="guesses in a row to train")
    parser.add_argument("--decay", type=float, default=0.8, help="weight of a step to the last")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1600)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.0, help="on the features of eagle")
    parser.add_argument("--distribution-weight", type=float, default=1.0)
    parser.add_argument("--feature-weight", type=float, default=0.0)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--limit", type=int, help="rows, for a trial")
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    rows = read_rows(options.answers)
    random.Random(options.seed).shuffle(rows)
    rows = rows[: options.limit]
    heads = new_heads(base, rows, options)
    objective = EagleObjective(
        num_steps=options.num_steps,
        num_measured=options.num_steps,
        decay=options.decay,
        distribution_weight=options.distribution_weight,
        feature_weight=options.feature_weight,
        noise=options.noise,
    )
    model = EagleTrainingModel(base, heads, objective=objective)
    train(model, rows, options)
    heads.bfloat16()  # as they are stored
    checkpoint = EagleCheckpoint(config=heads.config, tensors=heads.state_dict())
    write_eagle(options.out, checkpoint, num_target_layers=base.config.num_hidden_layers)
    heads.float()
    for task in ("sql", "gsm8k"):
        report(task, model, read_rows(options.held_out, f"{task}_greedy-*.jsonl"))


if __name__ == "__main__":
    main()
