"""Count the draft tokens that the base would accept, from teacher-forced passes over its answers.

On an answer that the base itself wrote, a chain of guesses is accepted exactly as far as the
draft's choices equal the answer, so rounds can be replayed without a decoding loop.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.files.json_lines import parse_json_lines


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a draft model follows the base over a set of answers.

    Attributes:
        per_token: Share of answer tokens on which the draft's choice equals the base's.
        tau: Tokens per round, the bonus token included.
        per_depth: Share of rounds in which the guess at depth 1, 2, ... was accepted.
    """

    per_token: float
    tau: float
    per_depth: list[float]


def sampled_choices(
    answer: Tensor, base_logits: Tensor, draft_logits: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Draw the draft's choices under the noise that made the base choose the answer.

    Works on Gumbel noise: the winning value is independent of the winner, and every other value
    is a Gumbel variable cut off below it.

    Args:
        answer: The tokens that the base sampled at temperature 1, ``[seq]``.
        base_logits: Base logits at these positions, ``[seq, vocab]``.
        draft_logits: Draft logits at these positions, ``[seq, vocab]``.
        generator: Source of the noise.

    Returns:
        The draft's choice at every position, ``[seq]``.
    """
    base_log_probs = base_logits.double().log_softmax(-1)  # [seq, vocab]
    exponential = torch.empty_like(base_log_probs).exponential_(generator=generator)
    winner = torch.empty_like(base_log_probs[:, :1]).exponential_(generator=generator)  # [seq, 1]
    # In exponential terms: value_i = E_i / p_i, and the base takes the smallest.
    values = winner + exponential / base_log_probs.exp()
    values.scatter_(1, answer[:, None], winner)
    log_noise = values.log() + base_log_probs
    return (draft_logits.double().log_softmax(-1) - log_noise).argmax(-1)


def replay_rounds(agrees: list[bool], max_depth: int) -> list[int]:
    """Return the accepted length of each round over one answer.

    The first answer token comes from the prefill; every round then commits its accepted tokens
    and one bonus token.
    """
    accepted_lengths = []
    position = 1
    while position < len(agrees):
        length = 0
        while length < max_depth and position + length < len(agrees) and agrees[position + length]:
            length += 1
        accepted_lengths.append(length)
        position += length + 1
    return accepted_lengths


@torch.no_grad()
def measure(
    draft: PreTrainedModel, base: PreTrainedModel, shards: list[Path], *, max_depth: int = 5
) -> Agreement:
    """Replay rounds over the answers in some shards.

    Args:
        draft: The draft model.
        base: The model that wrote the answers, greedily or at temperature 1.
        shards: JSONL files written by ``distill.py``.
        max_depth: Guesses per round.
    """
    generator = torch.Generator().manual_seed(0)
    num_agreeing = num_tokens = num_committed = 0
    accepted_lengths: list[int] = []
    for shard in shards:
        for row in parse_json_lines(shard):
            answer = torch.tensor(row["answer_ids"])
            input_ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
            first = len(row["prompt_ids"]) - 1
            draft_logits = draft(input_ids).logits[0, first:-1]  # [seq, vocab]
            if row["temperature"]:
                base_logits = base(input_ids).logits[0, first:-1]
                choices = sampled_choices(answer, base_logits, draft_logits, generator=generator)
            else:
                choices = draft_logits.argmax(-1)
            agrees = (choices == answer).tolist()
            num_agreeing += sum(agrees)
            num_tokens += len(agrees)
            num_committed += len(agrees) - 1
            accepted_lengths += replay_rounds(agrees, max_depth)
    num_rounds = len(accepted_lengths)
    return Agreement(
        per_token=num_agreeing / num_tokens,
        tau=num_committed / num_rounds,
        per_depth=[
            sum(length > depth for length in accepted_lengths) / num_rounds
            for depth in range(max_depth)
        ],
    )


def main() -> None:
    """Parse the command line and print the figures of each shard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("draft", type=Path, help="folder of the draft model")
    parser.add_argument("shards", type=Path, nargs="+", help="JSONL files of held-out answers")
    parser.add_argument("--max-depth", type=int, default=5, help="guesses per round")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    draft = AutoModelForCausalLM.from_pretrained(args.draft, dtype=torch.float32)
    for shard in args.shards:
        figures = measure(draft, base, [shard], max_depth=args.max_depth)
        depths = " ".join(f"{share:.3f}" for share in figures.per_depth)
        print(
            f"{shard.stem}: per token {figures.per_token:.3f}, tau {figures.tau:.2f}, "
            f"per depth {depths}"
        )


if __name__ == "__main__":
    main()
