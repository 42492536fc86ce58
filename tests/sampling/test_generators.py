"""Default generators are put back to where they were found, and noise is drawn all the same."""

from types import SimpleNamespace

import pytest
import torch

from speclm.sampling import generators
from speclm.sampling.noise import GeneratorStates, PositionNoise, undisturbed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


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
    monkeypatch.setattr(generators.torch, "get_device_module", lambda _: module)
    states = GeneratorStates(torch.device("xpu", 0))
    drawn["xpu:0"] = torch.ones(1)
    assert states.changed()
    states.restore()
    assert drawn["xpu:0"] == torch.zeros(1)


def test_device_without_a_generator_is_left_out(monkeypatch):
    monkeypatch.setattr(generators.torch, "get_device_module", lambda _: SimpleNamespace())
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
