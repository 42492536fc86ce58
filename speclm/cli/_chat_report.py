"""Says how answers were generated."""

from collections.abc import Iterator

from speclm.chat import Answer, Chat
from speclm.stats import SpeculationStats


def describe(chat: Chat) -> Iterator[str]:
    """Yield lines on the last answer and on the whole conversation."""
    answers = chat.answers
    if not answers:
        yield "nothing has been answered yet"
        return
    yield _speed("last answer", answers[-1:])
    yield from _speculation(answers[-1].speculation)
    if len(answers) > 1:
        yield _speed(f"{len(answers)} answers", answers)
        yield from _speculation(chat.speculation)


def _speed(name: str, answers: list[Answer]) -> str:
    num_tokens = sum(len(answer.tokens) for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    num_prompt = sum(answer.num_prompt_tokens for answer in answers)
    num_read = num_prompt - sum(answer.num_reused_tokens for answer in answers)
    return (
        f"{name}: {num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s; "
        f"{num_read} of {num_prompt} prompt tokens had to be read"
    )


def _speculation(stats: SpeculationStats) -> Iterator[str]:
    if stats.fallbacks:
        yield f"  decoded plainly: {'; '.join(stats.fallbacks)}"
    if not stats.rounds:
        return
    histogram = enumerate(stats.accepted_length_histogram)
    phases = ", ".join(f"{name} {ms:.2f}" for name, ms in stats.milliseconds_per_round.items())
    yield f"  tau {stats.tau:.2f} over {stats.rounds} rounds"
    yield f"  rounds by accepted length: {', '.join(f'{n}: {rounds}' for n, rounds in histogram)}"
    yield f"  ms a round: {phases}; prefill {1e3 * stats.seconds['prefill']:.2f} in all"
    if stats.pause_summary is not None:
        yield f"  {stats.pause_summary}"
