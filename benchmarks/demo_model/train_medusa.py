"""Train the demo Medusa heads on the base's own answers, and estimate what they are worth.

The base is frozen, so its hidden states are computed once and kept in memory; `speclm train medusa`
computes them at every step instead, and needs no more than conversations.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.adaptive.acceptance_rates import Ranks, replay_rounds
from speclm.files.json_lines import parse_json_lines
from speclm.methods.medusa.checkpoint_writing import write_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig, medusa_checkpoint
from speclm.methods.medusa.proposer import STATIC_TREE
from speclm.target import TargetView
from speclm.tree.static import RankPaths, trim_paths

FORWARD_ROWS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the base.

    Attributes:
        hidden: Hidden states that its tokens were chosen from, ``[tokens, hidden]``.
        tokens: The tokens of the answer.
        top_ids: The base's likeliest tokens at each of its positions, ``[tokens, k]``.
        top_probs: Their shares of the probability of all of them, ``[tokens, k]``.
        is_greedy: Whether the tokens were chosen without sampling.
    """

    hidden: Tensor
    tokens: Tensor
    top_ids: Tensor
    top_probs: Tensor
    is_greedy: bool

    def targets(self, num_heads: int) -> Tensor:
        """Return the token that each head should guess, -1 behind the end, ``[tokens, heads]``."""
        padded = F.pad(self.tokens[1:], (0, num_heads), value=-1)
        return padded.unfold(0, num_heads, 1)


@torch.no_grad()
def read_answers(base: PreTrainedModel, shards: list[Path]) -> list[Answer]:
    """Read answers of at least two tokens and compute the hidden states in them."""
    rows = []
    for shard in shards:
        tensors = load_file(shard.with_suffix(".safetensors"))
        start = 0
        for row in parse_json_lines(shard):
            stop = start + len(row["answer_ids"])
            row["top_ids"] = tensors["ids"][start:stop]
            row["top_probs"] = tensors["log_probs"][start:stop].float().softmax(-1).half()
            start = stop
            if len(row["answer_ids"]) > 1:
                rows.append(row)
    rows.sort(key=lambda row: len(row["prompt_ids"]) + len(row["answer_ids"]))
    answers = []
    for start in range(0, len(rows), FORWARD_ROWS):
        batch = rows[start : start + FORWARD_ROWS]
        texts = [torch.tensor(row["prompt_ids"] + row["answer_ids"]) for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # padding comes last
        hidden = base.get_decoder()(padded).last_hidden_state  # [rows, seq, hidden]
        for row, states in zip(batch, hidden, strict=True):
            first = len(row["prompt_ids"]) - 1
            tokens = torch.tensor(row["answer_ids"])
            chosen_from = states[first : first + len(tokens)].to(torch.bfloat16)
            is_greedy = row["temperature"] == 0
            answers.append(
                Answer(chosen_from.clone(), tokens, row["top_ids"], row["top_probs"], is_greedy)
            )
    return answers


def train(
    heads: MedusaHeads, view: TargetView, answers: list[Answer], options: argparse.Namespace
) -> None:
    """Minimise the cross-entropy of every head, those further ahead counting less.

    Part of it is taken against the base's own distribution of the token, the rest against the
    token.
    """
    hidden = torch.cat([answer.hidden for answer in answers])
    targets = torch.cat([answer.targets(heads.num_heads) for answer in answers])
    top_ids = torch.cat([answer.top_ids for answer in answers])
    top_probs = torch.cat([answer.top_probs for answer in answers])
    roots = (targets[:, 0] >= 0).nonzero()[:, 0]
    ahead = torch.arange(1, heads.num_heads + 1)
    weights = options.decay ** (ahead - 1)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(heads.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    start = time.perf_counter()
    mean_loss = 0.0
    for step in range(1, options.steps + 1):
        warmup = min(1.0, step / options.warmup_steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmup * cosine
        chosen = roots[torch.randint(len(roots), (options.batch_size,), generator=generator)]
        wanted = targets[chosen]  # [rows, heads]
        # Where there is no target, another answer's position is read and not counted.
        places = (chosen[:, None] + ahead).clamp(max=len(hidden) - 1)
        ids = torch.cat([wanted.clamp(min=0)[:, :, None], top_ids[places].long()], dim=2)
        soft = options.soft_weight * top_probs[places].float()
        hard = torch.full_like(soft[:, :, :1], 1 - options.soft_weight)
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the CPU has it
            logits = heads(hidden[chosen].float(), lm_head=view.head_logits)
        likely = (torch.cat([hard, soft], dim=2) * logits.gather(2, ids)).sum(2)
        losses = (logits.float().logsumexp(2) - likely) * (wanted >= 0)  # [rows, heads]
        loss = (losses.sum(0) / (wanted >= 0).sum(0).clamp(min=1) * weights).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        mean_loss += loss.item() / options.report_every
        if step % options.report_every == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {mean_loss:.3f}, {seconds:.0f} s", flush=True)
            mean_loss = 0.0


@torch.no_grad()
def rank_answers(heads: MedusaHeads, view: TargetView, answers: list[Answer]) -> list[Ranks]:
    """Return the rank that each head gave to the token that came, for every root."""
    texts: list[Ranks] = []
    for answer in answers:
        wanted = answer.targets(heads.num_heads)[:-1]  # nothing follows the last token
        logits = heads(answer.hidden[:-1].float(), lm_head=view.head_logits)
        right = logits.gather(2, wanted.clamp(min=0)[:, :, None])
        texts.append((logits > right).sum(2).masked_fill(wanted < 0, -1).tolist())
    return texts


def report(name: str, texts: list[Ranks], paths: RankPaths) -> None:
    """Print what the heads guess on some answers."""
    best = [
        [ranks[head] == 0 for text in texts for ranks in text if ranks[head] >= 0]
        for head in range(len(texts[0][0]))
    ]
    shares = " ".join(f"{sum(right) / len(right):.3f}" for right in best)
    tau = sum(map(len, texts)) / sum(len(replay_rounds(text, paths)) for text in texts)
    print(f"{name}: tau {tau:.3f}, right by head: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("answers", type=Path, help="folder of shards to train on")
    parser.add_argument("held_out", type=Path, help="folder of shards to report on")
    parser.add_argument("out", type=Path, help="folder for the heads")
    parser.add_argument("--num-heads", type=int, default=5)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--soft-weight", type=float, default=0.7)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    base.requires_grad_(requires_grad=False)
    view = TargetView(base)
    numbers = MedusaHeadsConfig(
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        num_heads=options.num_heads,
        num_layers=options.num_layers,
    )
    heads = MedusaHeads(numbers)
    heads.init_weights_(base.lm_head.weight, generator=torch.Generator().manual_seed(options.seed))
    answers = read_answers(base, sorted(options.answers.glob("*.jsonl")))
    train(heads, view, answers, options)

    heads.bfloat16().float()  # as they are stored
    greedy = [answer for answer in answers if answer.is_greedy]
    texts = rank_answers(heads, view, greedy)
    paths = trim_paths(STATIC_TREE, max_depth=options.num_heads)
    report("trained on, greedy", texts, paths)
    for shard in sorted(options.held_out.glob("*.jsonl")):
        report(shard.stem, rank_answers(heads, view, read_answers(base, [shard])), paths)
    heads.bfloat16()
    write_medusa(options.out, medusa_checkpoint(heads))


if __name__ == "__main__":
    main()
