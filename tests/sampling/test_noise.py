import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.sampling.noise import PositionNoise

CPU = torch.device("cpu")
VOCAB = 7


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def step_probs(step, batch):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(batch, VOCAB, generator=generator).softmax(-1)


def decode_plainly(seed, batch, steps):
    """Tokens that `torch.multinomial` draws step by step, and the generator's state after each."""
    torch.manual_seed(seed)
    tokens, states = [], [torch.get_rng_state()]
    for step in range(steps):
        tokens.append(torch.multinomial(step_probs(step, batch), 1)[:, 0])
        states.append(torch.get_rng_state())
    return torch.stack(tokens), states  # [steps, batch]


def noise_after(seed, batch):
    torch.manual_seed(seed)
    return PositionNoise(batch=batch, vocab_size=VOCAB, device=CPU)


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), steps=st.integers(1, 8))
def test_argmax_over_noise_is_what_multinomial_draws(seed, batch, steps):
    with torch.random.fork_rng(devices=[]):
        plain, states = decode_plainly(seed, batch, steps)
        noise = noise_after(seed, batch)
        noise.seek([0] * batch, live=[True] * batch)
        for step in range(steps):
            choice = (step_probs(step, batch) / noise.at_depth(step)).argmax(1)
            assert torch.equal(choice, plain[step])
        assert torch.equal(torch.get_rng_state(), states[steps])


@given(
    seed=st.integers(0, 10**6),
    advances=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5),
)
def test_ragged_rows_get_the_noise_of_their_own_position(seed, advances):
    with torch.random.fork_rng(devices=[]):
        plain, _ = decode_plainly(seed, 2, 25)
        noise = noise_after(seed, 2)
        at = [0, 0]
        for advance in advances:
            noise.seek(at, live=[True, True])
            for depth in range(4):
                drawn = noise.at_depth(depth)
                for row in range(2):
                    probs = step_probs(at[row] + depth, 2)[row]
                    assert torch.equal(drawn[row], noise.row(row, depth))
                    assert (probs / drawn[row]).argmax() == plain[at[row] + depth, row]
            at = [step + more for step, more in zip(at, advance, strict=True)]


@given(seed=st.integers(0, 10**6), drawn=st.integers(0, 9), used=st.integers(0, 9))
def test_finish_leaves_the_generator_as_plain_decoding_does(seed, drawn, used):
    used = min(used, drawn)
    with torch.random.fork_rng(devices=[]):
        _, states = decode_plainly(seed, 2, max(drawn, 1))
        noise = noise_after(seed, 2)
        noise.seek([0, 0], live=[True, True])
        for step in range(drawn):
            noise.at_depth(step)
        noise.finish(used)
        assert torch.equal(torch.get_rng_state(), states[used])


def test_rows_that_no_live_row_needs_are_dropped():
    noise = noise_after(1, 2)
    noise.seek([0, 0], live=[True, True])
    later = noise.at_depth(5)
    noise.seek([4, 1], live=[True, False])
    assert sorted(noise._matrices) == [4, 5]
    assert torch.equal(noise.row(0, 1), later[0])
    behind = noise.at_depth(0)  # the ended row's noise is gone, and read by nobody
    assert torch.isfinite(behind).all()
    assert (behind > 0).all()


def test_drawing_for_an_ended_row_does_not_move_the_generator():
    noise = noise_after(1, 2)
    noise.seek([0, 0], live=[True, True])
    noise.at_depth(3)
    state = torch.get_rng_state()
    noise.seek([3, 1], live=[True, False])
    noise.at_depth(0)
    assert torch.equal(state, torch.get_rng_state())


def test_device_is_that_of_the_logits():
    assert noise_after(0, 1).device == CPU
