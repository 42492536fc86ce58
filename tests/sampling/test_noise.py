from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.sampling.noise import GeneratorStates, PositionNoise, generator_obstacle, undisturbed

CPU = torch.device("cpu")
VOCAB = 7


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def step_probs(step, batch):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(batch, VOCAB, generator=generator).softmax(-1)


def regular_generation(seed, batch, steps):
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
        plain, states = regular_generation(seed, batch, steps)
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
        plain, _ = regular_generation(seed, 2, 25)
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
def test_finish_leaves_the_generator_as_regular_generation_does(seed, drawn, used):
    used = min(used, drawn)
    with torch.random.fork_rng(devices=[]):
        _, states = regular_generation(seed, 2, max(drawn, 1))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_drawn_as_for_the_scores_of_its_step(dtype):
    probs = [step_probs(0, 2), step_probs(1, 2)[:, :4].to(dtype), step_probs(2, 2)]
    torch.manual_seed(3)
    expected = [torch.multinomial(step, 1)[:, 0] for step in probs]
    state = torch.get_rng_state()
    noise = noise_after(3, 2)
    noise.seek([0, 0], live=[True, True])
    noise.at_depth(2)  # drawn ahead for scores that have not been seen
    for step, known in enumerate(probs):
        noise.match(known, step)
        drawn = noise.at_depth(step)
        assert drawn.dtype == known.dtype
        assert torch.equal((known / drawn).argmax(1), expected[step])
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_an_ended_row_fits_that_of_the_others_after_a_change():
    noise = noise_after(1, 2)
    noise.seek([0, 0], live=[True, True])
    noise.at_depth(1)
    noise.seek([2, 1], live=[True, False])
    noise.match(torch.ones(2, 3, dtype=torch.float64), 2)
    assert noise.at_depth(0).shape == (2, 3)


@pytest.fixture
def accelerator(monkeypatch):
    """Return the generator of a device whose tensors are in fact on the CPU."""
    generator = torch.Generator().manual_seed(5)

    def empty(shape, *, dtype, device):
        drawn = torch.ones(shape, dtype=dtype)
        return SimpleNamespace(exponential_=partial(drawn.exponential_, generator=generator))

    module = SimpleNamespace(
        get_rng_state=lambda device: generator.get_state(),
        set_rng_state=lambda state, device: generator.set_state(state),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch, "empty", empty)
    return generator


def test_the_generator_that_is_put_back_is_that_of_the_device(accelerator):
    own, other = accelerator.get_state(), torch.get_rng_state()
    noise = PositionNoise(batch=1, vocab_size=VOCAB, device=torch.device("xpu"))
    noise.seek([0], live=[True])
    first = noise.at_depth(0)
    after_first = accelerator.get_state()
    noise.at_depth(3)
    torch.rand(1, dtype=torch.float32)  # on the CPU, where others draw
    moved = torch.get_rng_state()
    with noise.foreign_code(1):
        assert torch.equal(accelerator.get_state(), after_first)
    noise.finish(0)
    assert torch.equal(accelerator.get_state(), own)
    assert not torch.equal(moved, other)
    assert torch.equal(torch.get_rng_state(), moved)
    assert torch.equal(noise.at_depth(0), first)


def test_devices_whose_generator_cannot_be_restored_are_named(monkeypatch):
    assert generator_obstacle(CPU) is None
    assert generator_obstacle(torch.device("cuda")) is None
    assert generator_obstacle(torch.device("mps")) is None
    assert "'meta' cannot be saved" in generator_obstacle(torch.device("meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert "'xpu' cannot be saved" in generator_obstacle(torch.device("xpu"))


def test_draws_are_noticed_and_undone():
    states = GeneratorStates(CPU)
    expected = torch.get_rng_state()
    assert not states.changed()
    torch.rand(1)
    assert states.changed()
    states.restore()
    assert torch.equal(torch.get_rng_state(), expected)


def test_generator_of_another_device_is_that_of_its_module(monkeypatch):
    drawn = {"xpu:0": torch.zeros(1)}
    module = SimpleNamespace(
        get_rng_state=lambda device: drawn[str(device)],
        set_rng_state=lambda state, device: drawn.update({str(device): state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    states = GeneratorStates(torch.device("xpu", 0))
    drawn["xpu:0"] = torch.ones(1)
    assert states.changed()
    states.restore()
    assert drawn["xpu:0"] == torch.zeros(1)


def test_device_without_a_generator_is_left_out(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    assert not GeneratorStates(torch.device("xpu", 0)).changed()


def noise_and_state(*, draws: bool):
    torch.manual_seed(5)
    noise = PositionNoise(batch=2, vocab_size=7, device=CPU)
    found = [noise.at_depth(0)]
    for depth in (1, 3):
        with undisturbed(CPU, noise):
            found.append(noise.at_depth(depth))
            if draws:
                torch.rand(9)
            found.append(noise.at_depth(depth + 1))
            if draws:
                torch.rand(9)
    noise.finish(4)
    return torch.stack(found), torch.get_rng_state()


def test_noise_does_not_depend_on_what_drafting_code_draws():
    (noise, state), (expected, expected_state) = (noise_and_state(draws=d) for d in (True, False))
    assert torch.equal(noise, expected)
    assert torch.equal(state, expected_state)


def test_draws_without_noise_are_undone_also_after_an_error():
    state = torch.get_rng_state()

    def fail():
        torch.rand(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), undisturbed(CPU, None):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
