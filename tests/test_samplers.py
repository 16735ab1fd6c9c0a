"""Timesteps, coefficients and whole trajectories against diffusers' schedulers, with a predictor that is no network."""

import pytest
import torch

from bench.reference.numbers import relative_error
from bench.reference.oracles import ddim_scheduler, ddpm_scheduler
from sd.ddpm import add_noise, alphas_cumprod, ddpm, predict_x0, spaced_timesteps
from sd.guidance import Guided
from sd.samplers import SAMPLERS, PictureNoise, ddim

STEPS = (1, 3, 20, 30, 50, 60, 999)
SHAPE = (1, 4, 8, 8)


def predictor(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some smooth function that depends on x, on the position and on the timestep."""
    return torch.sin(3 * x + t.to(x.dtype) / 100) + 0.1 * x.roll(1, dims=-1)


def draws(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("make", [ddpm_scheduler, ddim_scheduler])
def test_timesteps(steps, make):
    scheduler = make()
    scheduler.set_timesteps(steps)
    assert spaced_timesteps(steps) == scheduler.timesteps.tolist()


def test_a_thousand_steps_visit_every_timestep():
    assert spaced_timesteps(1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_that_cannot_be(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        spaced_timesteps(steps)


@pytest.mark.parametrize("steps", STEPS)
def test_previous_timesteps(steps):
    scheduler = ddpm_scheduler()
    scheduler.set_timesteps(steps)
    timesteps = spaced_timesteps(steps)
    expected = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    assert [*timesteps[1:], -1] == expected


def test_noise_schedule():
    expected = ddpm_scheduler().alphas_cumprod.double()
    assert relative_error(torch.tensor(alphas_cumprod()), expected) < 1e-6


@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_trajectory(steps):
    scheduler = ddpm_scheduler()
    scheduler.set_timesteps(steps)
    expected = start = draws(0)()
    generator = torch.Generator().manual_seed(1)
    ours = ddpm(predictor, start, spaced_timesteps(steps), draws(1))
    for t, x in zip(scheduler.timesteps, ours, strict=True):
        expected = scheduler.step(predictor(expected, t), t, expected, generator=generator).prev_sample
        assert relative_error(x, expected) < 1e-4


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_trajectory(steps):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    expected = start = draws(0)()
    ours = ddim(predictor, start, spaced_timesteps(steps), None)
    for t, x in zip(scheduler.timesteps, ours, strict=True):
        expected = scheduler.step(predictor(expected, t), t, expected).prev_sample
        assert relative_error(x, expected) < 1e-4


@pytest.mark.parametrize("make", [ddpm_scheduler, ddim_scheduler])
def test_predicted_picture_is_not_clipped(make):
    """Latents reach beyond [-1, 1]; a scheduler left at its default would clip them."""
    scheduler = make()
    scheduler.set_timesteps(50)
    x, eps = 5 * draws(0)(), draws(1)()
    expected = scheduler.step(eps, 981, x, **({"generator": None})).pred_original_sample
    ours = predict_x0(x, eps, alphas_cumprod()[981])
    assert ours.abs().max() > 1
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("t", [1, 400, 981])
def test_add_noise(t):
    x, noise = draws(0)(), draws(1)()
    expected = ddpm_scheduler().add_noise(x, noise, torch.tensor([t]))
    assert relative_error(add_noise(x, noise, t), expected) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_inputs_are_not_changed(name):
    start = draws(0)()
    before = start.clone()
    first = list(SAMPLERS[name](predictor, start, spaced_timesteps(5), draws(1)))
    second = list(SAMPLERS[name](predictor, start, spaced_timesteps(5), draws(1)))
    assert torch.equal(start, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestGuidance:
    context = torch.cat([torch.full((2, 1, 1), 10.0), torch.full((2, 1, 1), 20.0)])

    def predict(self, x, t, context):
        self.batch = x.shape[0]
        return x * context[:, :, :, None]

    def test_formula_and_order_of_the_halves(self):
        x = torch.ones(2, 4, 8, 8)
        guided = Guided(self.predict, self.context, 7.5)(x, torch.tensor(1))
        assert torch.equal(guided, torch.full_like(x, 10 + 7.5 * 10))
        assert self.batch == 4

    def test_no_second_half_at_scale_1(self):
        x = torch.ones(2, 4, 8, 8)
        assert torch.equal(Guided(self.predict, self.context[2:], 1)(x, torch.tensor(1)), 20 * x)
        assert self.batch == 2


class TestNoise:
    def test_a_picture_gets_the_same_noise_alone_and_in_a_batch(self):
        batch = PictureNoise([5, 6], SHAPE[1:], torch.device("cpu"), torch.float32)
        alone = PictureNoise([6], SHAPE[1:], torch.device("cpu"), torch.float32)
        for _ in range(3):
            assert torch.equal(batch()[1:], alone())

    def test_draws_are_those_of_the_seed_in_fp32_whatever_the_dtype(self):
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(PictureNoise([7], SHAPE[1:], torch.device("cpu"), dtype)(), expected.to(dtype))
