"""Levels, coefficients and trajectories against diffusers and k-diffusion, with a predictor that is no network."""

import importlib.util

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from bench.reference.numbers import relative_error
from bench.reference.oracles import ddim_scheduler, ddpm_scheduler
from sd import samplers, schedules
from sd.ddpm import add_noise, predict_x0
from sd.guidance import Conditions, Guided, from_picture, from_velocity
from sd.noise import PictureNoise
from sd.samplers import OPTIONS, SAMPLERS, choose, read
from sd.schedules import SCHEDULES, alphas_cumprod, spaced_timesteps
from tests import schedulers
from tests.sparing import sparing

STEPS = (1, 2, 3, 5, 20, 30, 50, 60, 999)
SHAPE = (1, 4, 8, 8)


def predictor(x: torch.Tensor, t: float) -> torch.Tensor:
    """Some smooth function that depends on x, on the position and on the timestep."""
    return torch.sin(3 * x + t / 100) + 0.1 * x.roll(1, dims=-1)


def draws(seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=dtype)


# ---- levels


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


SIGMAS = {key: value for key, value in schedulers.SCHEDULE.items() if key not in ("clip_sample", "timestep_spacing")}


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50, 999])
@pytest.mark.parametrize(
    ("name", "spacing", "options"),
    [
        ("leading", "leading", {}),
        ("trailing", "trailing", {}),
        ("linspace", "linspace", {}),
        ("karras", "linspace", {"use_karras_sigmas": True}),
        ("exponential", "linspace", {"use_exponential_sigmas": True}),
        ("beta", "linspace", {"use_beta_sigmas": True}),
        ("ztsnr", "trailing", {"rescale_betas_zero_snr": True}),
    ],
)
def test_schedules(name, spacing, options, steps):
    scheduler = EulerDiscreteScheduler(**SIGMAS, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(steps)
    ours = schedules.make(name, steps)
    # diffusers' are fp32, which has no more digits where sigma is 4096.
    np.testing.assert_allclose(ours.sigmas, scheduler.sigmas, rtol=3e-3 if name == "ztsnr" else 2e-5)
    np.testing.assert_allclose(ours.timesteps, scheduler.timesteps, atol=0.01)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_and_end_clean(name, steps):
    if name == "lcm" and steps > 50:
        with pytest.raises(ValueError, match="at most 50 steps, not"):
            schedules.make(name, steps)
        return
    one = schedules.make(name, steps)
    assert len(one) == len(one.timesteps) == len(one.sigmas) - 1 == steps
    assert list(one.sigmas) == sorted(set(one.sigmas), reverse=True)
    assert list(one.timesteps) == sorted(one.timesteps, reverse=True)
    assert one.sigmas[-1] == 0
    assert all(0 <= t <= 999 for t in one.timesteps)
    assert len({type(t) for t in one.timesteps}) == 1
    assert all(abs(one.abar_at(t) - abar) < 1e-9 for t, abar in zip(one.timesteps, one.abars, strict=False))
    middle = (one.sigmas[0] * max(one.sigmas[1], 0.03)) ** 0.5
    assert one.timesteps[0] >= one.timestep_at(min(middle, 14)) >= one.timestep_at(0.03) >= 0


def test_lcm_schedule():
    for steps in (1, 2, 3, 4, 7, 8, 50):
        scheduler = LCMScheduler(**{**schedulers.SCHEDULE, "steps_offset": 0})
        scheduler.set_timesteps(steps)
        assert list(schedules.make("lcm", steps).timesteps) == scheduler.timesteps.tolist()


def test_align_your_steps_are_the_ten_that_were_published():
    from diffusers.schedulers import AysSchedules

    np.testing.assert_allclose(
        schedules.make("align_your_steps", 10).sigmas, AysSchedules["StableDiffusionSigmas"], rtol=1e-9
    )
    np.testing.assert_allclose(
        schedules.make("align_your_steps", 10).timesteps, AysSchedules["StableDiffusionTimesteps"], atol=1.01
    )


def test_sgm_uniform():
    """DDPM's timesteps at every (999 / steps)-th, where log sigma is linear: Stability's LegacyDDPMDiscretization."""
    sigmas = np.array([((1 - a) / a) ** 0.5 for a in alphas_cumprod()])
    for steps in (1, 7, 20):
        times = np.linspace(999, 0, steps, endpoint=False)
        expected = [*np.exp(np.interp(times, np.arange(1000), np.log(sigmas))), 0]
        np.testing.assert_allclose(schedules.make("sgm_uniform", steps).sigmas, expected, rtol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("k_diffusion") is None, reason="k-diffusion: requirements-oracles.txt")
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 28, 50, 1000])
def test_uniform_is_that_of_k_diffusion(steps):
    """Between two whole timesteps log sigma is linear there, and sigma here: 1.5% where they are farthest apart."""
    levels = schedules.make(samplers.schedule_of("Euler Uniform", None), steps)
    whole = steps == 1 or 999 % (steps - 1) == 0
    expected = schedulers.k_diffusion_sigmas(steps)
    np.testing.assert_allclose(levels.sigmas, expected, rtol=1e-5 if whole else 0.015)
    assert relative_error(torch.tensor(schedules.make("leading", steps).sigmas), expected) > 0.02 or steps == 1000


def test_ddim_of_the_web_ui():
    """Every (1000 // steps)-th level of training from the second on."""
    for steps in (1, 2, 20, 50):
        expected = [*torch.tensor(schedules.sigmas_of(alphas_cumprod()))[1 :: 1000 // steps].flip(0).tolist(), 0]
        levels = schedules.make(samplers.read_schedule("DDIM"), steps)
        np.testing.assert_allclose(levels.sigmas, expected, rtol=1e-6)


def test_beta_quantiles():
    from scipy.stats import beta

    for alpha in (0.6, 1.0, 2.5):
        for share in (0.0, 1e-6, 0.1, 0.5, 0.77, 1.0):
            assert abs(schedules.beta_quantile(share, alpha) - beta.ppf(share, alpha, alpha)) < 1e-12


# ---- trajectories

EVERY_SIGMA = ("leading", "trailing", "linspace", "karras", "exponential", "beta", "sgm_uniform", "align_your_steps")
CASES = {  # name: schedules, options
    "ddpm": (("leading", "trailing"), [{}]),
    "ddim": (("leading", "trailing"), [{}, {"eta": 0.7}, {"eta": 1.0}]),
    "plms": (("leading",), [{}]),
    "euler": (EVERY_SIGMA, [{}]),
    "euler_a": (EVERY_SIGMA, [{}]),
    "heun": (EVERY_SIGMA, [{}]),
    "dpm2": (EVERY_SIGMA, [{}]),
    "lms": (EVERY_SIGMA, [{}]),
    "dpmpp_2m": (EVERY_SIGMA, [{}, {"solver_order": 1}, {"solver_order": 3}]),
    "dpmpp_2m_sde": (EVERY_SIGMA, [{}]),
    "dpmpp_sde": (EVERY_SIGMA, [{}]),
    "unipc": (EVERY_SIGMA, [{}, {"solver_order": 1}, {"solver_order": 3}]),
    "deis": (EVERY_SIGMA, [{}, {"solver_order": 1}, {"solver_order": 3}]),
    "lcm": (("lcm",), [{}]),
    "tcd": (("lcm",), [{}, {"eta": 0.6}]),
}
TRAJECTORIES = [
    (name, schedule, options) for name, (every, sets) in CASES.items() for schedule in every for options in sets
]


@pytest.mark.parametrize(
    ("name", "schedule", "options"),
    sparing(TRAJECTORIES, lambda case: case[1] in ("leading", "karras", "lcm")),
    ids=str,
)
def test_against_diffusers(name, schedule, options):
    for steps in (1, 2, 5, 10, 20, 50, 999):
        if schedule == "lcm" and steps > 50:
            continue
        whole = schedules.make(schedule, steps)
        # The second one is a picture's, noised so far: img2img.
        parts = [whole] if name == "plms" or steps == 999 else [whole, whole.last(max(1, int(steps * 0.6)))]
        for levels in parts:
            ours = list(choose(name, options)(predictor, draws(0)(), levels, draws(1)))
            theirs = list(getattr(schedulers, name)(levels, predictor, draws(0)(), draws(1), **options))
            assert len(ours) == len(theirs) == len(levels)
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                # Of a thousand steps, a cubic in log sigma over each loses ten digits to cancellation.
                bound = 1e-5 if options.get("solver_order") == 3 and name == "deis" and steps == 999 else 1e-6
                assert relative_error(a, b) < bound, (steps, step)


K_DIFFUSION = {
    "euler_a": "euler_ancestral",
    "heun": "heun",
    "dpm2": "dpm_2",
    "lms": "lms",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
}


@pytest.mark.skipif(importlib.util.find_spec("k_diffusion") is None, reason="k-diffusion: requirements-oracles.txt")
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_against_k_diffusion(name):
    noisy = "s_noise" in SAMPLERS[name].defaults
    for schedule in ("leading", "karras", "exponential"):
        for options in (
            [{"eta": eta, "s_noise": s} for eta, s in ((1.0, 1.0), (0.4, 0.9), (0.0, 1.0))] if noisy else [{}]
        ):
            for steps in (2, 5, 20, 50):
                levels = schedules.make(schedule, steps)
                *_, ours = choose(name, options)(predictor, draws(0)(), levels, draws(1))
                given = levels, predictor, draws(0)(), draws(1)
                assert relative_error(ours, schedulers.k_diffusion(K_DIFFUSION[name], *given, **options)) < 1e-9


def test_every_sampler_is_compared():
    assert set(CASES) | set(K_DIFFUSION) == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(name):
    """Deterministic ones approach one picture, those of higher order faster."""
    if any(option in SAMPLERS[name].defaults for option in ("s_noise",)) or name in ("ddpm", "lcm", "tcd"):
        pytest.skip("draws noise")
    gentle = lambda x, t: torch.sin(x / 2 + t / 500)  # noqa: E731
    errors = []
    *_, exact = choose("dpmpp_2m", {"solver_order": 3})(gentle, draws(0)(), schedules.make("karras", 1000), None)
    for steps in (20, 40):
        *_, x = choose(name)(gentle, draws(0)(), schedules.make("karras", steps), None)
        errors.append(relative_error(x, exact))
    assert errors[1] < errors[0] < 0.05
    if name in ("heun", "dpm2", "dpmpp_2m", "unipc"):
        assert errors[0] / errors[1] > 2.8


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
    assert relative_error(add_noise(x, noise, alphas_cumprod()[t]), expected) < 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_inputs_are_not_changed_and_what_is_yielded_may_be(name):
    """A consumer may write to what it is given: the sampler goes on from that."""
    levels, start = schedules.make(SAMPLERS[name].schedule, 6), draws(0)()
    before = start.clone()
    first = [x.clone() for x in choose(name)(predictor, start, levels, draws(1))]
    second = list(choose(name)(predictor, start, levels, draws(1)))
    assert torch.equal(start, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    changed = []
    for i, x in enumerate(choose(name)(predictor, start, levels, draws(1))):
        changed.append(x.clone())
        if i == 2:
            x.add_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], changed[:3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[3:], changed[3:], strict=True))


ON_PICTURES = [name for name in SAMPLERS if name not in ("ddpm", "plms", "lms", "deis", "lcm", "tcd")]


@pytest.mark.parametrize("name", ON_PICTURES)
def test_a_step_starts_from_what_was_written(name):
    """A network that always sees one picture: what x holds beside it shrinks as s does, at each step.

    Samplers that keep slopes are left out: theirs are not of what was written.
    """
    levels, picture = schedules.make("karras", 12), draws(0)()

    def sees_one_picture(x, t):
        abar = levels.abar_at(t)
        return (x - abar**0.5 * picture) / (1 - abar) ** 0.5

    still = {"eta": 0.0} if "eta" in SAMPLERS[name].defaults else {}
    steps = choose(name, still)(sees_one_picture, draws(1)(), levels, None)
    for i in range(1, 8):
        x = next(steps)
        if i == 6:
            written = x.copy_(draws(2)()).clone()
    before, after = levels.abars[6:8]
    left = ((1 - after) / (1 - before)) ** 0.5 * (written - before**0.5 * picture)
    assert relative_error(x, after**0.5 * picture + left) < 1e-9


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.8])
def test_tcd_takes_whole_shares_of_a_timestep(eta):
    """(1 - 0.3) * 90 is 63, but not in floating-point numbers of double precision."""
    levels = schedules.at_timesteps([990, 900, 180, 90])
    ours = choose("tcd", {"eta": eta})(predictor, draws(0)(), levels, draws(1))
    theirs = schedulers.tcd(levels, predictor, draws(0)(), draws(1), eta=eta)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-6


# ---- what networks predict


@pytest.mark.parametrize("wrapper", [from_velocity, from_picture])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "dpm2"])
def test_what_the_network_predicts_is_nothing_to_a_sampler(wrapper, name):
    levels = schedules.make("karras", 7)

    def other(x: torch.Tensor, t: float) -> torch.Tensor:
        """The same network, if it predicted the velocity or the picture."""
        eps, abar = predictor(x, t), levels.abar_at(t)
        x0 = predict_x0(x, eps, abar)
        return x0 if wrapper is from_picture else abar**0.5 * eps - (1 - abar) ** 0.5 * x0

    plain = list(choose(name)(predictor, draws(0)(), levels, None))
    wrapped = list(choose(name)(wrapper(other, levels.abar_at), draws(0)(), levels, None))
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(wrapped, plain, strict=True))


@pytest.mark.parametrize(("kind", "wrapper"), [("v_prediction", from_velocity), ("sample", from_picture)])
def test_predictions_against_diffusers(kind, wrapper):
    levels = schedules.make("trailing", 10)
    sigmas = {**schedulers.BETAS, "timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = schedulers._prepared(DPMSolverMultistepScheduler(**sigmas), levels)
    theirs = schedulers.multistep(scheduler, levels, predictor, draws(0)(), draws(1))
    ours = choose("dpmpp_2m")(wrapper(predictor, levels.abar_at), draws(0)(), levels, None)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_ztsnr_with_velocity_starts_from_noise_alone():
    """Where nothing of the picture is left, eps is no information; v is."""
    levels = schedules.make("ztsnr", 20)
    scheduler = DDIMScheduler(
        **{**schedulers.SCHEDULE, "timestep_spacing": "trailing"},
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(20)
    expected = draws(0)()
    for t, x in zip(
        scheduler.timesteps,
        choose("ddim")(from_velocity(predictor, levels.abar_at), expected, levels, None),
        strict=True,
    ):
        expected = scheduler.step(predictor(expected, t.item()), t, expected).prev_sample
        assert relative_error(x, expected) < 1e-3


# ---- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DDIM", ("ddim", None)),
        ("Euler a", ("euler_a", None)),
        ("Euler ancestral", ("euler_a", None)),
        ("k_euler_a", ("euler_a", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("dpm++ 3m sde karras", ("dpmpp_3m_sde", "karras")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("dpmpp-2m", ("dpmpp_2m", None)),
        ("LMS Karras", ("lms", "karras")),
        ("PNDM", ("plms", None)),
        ("UniPC", ("unipc", None)),
        ("Euler SGM Uniform", ("euler", "sgm_uniform")),
        ("DPM++ 2M Uniform", ("dpmpp_2m", "linspace")),
        ("Euler DDIM", ("euler", "leading")),
        ("Euler AYS", ("euler", "align_your_steps")),
        ("LCM", ("lcm", None)),
        ("DPM2", ("dpm2", None)),
    ],
)
def test_names_as_people_write_them(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize("text", ["", "karras", "DPM++", "euler b", "ddim plms"])
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match=r"^no sampler .*there are ddpm, ddim"):
        read(text)
    with pytest.raises(ValueError, match=r"^no schedule"):
        samplers.read_schedule(text or "x") if text != "karras" else samplers.read_schedule("karas")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"eta": 0.5}, "the sampler ddpm has no eta; it takes no such options"),
        ("euler_a", {"solver_order": 2}, "the sampler euler_a has no solver_order; it takes eta, s_noise"),
        ("dpmpp_2m", {"solver_order": 4}, "solver_order of dpmpp_2m must be from 1 to 3, not 4"),
    ],
)
def test_options_that_a_sampler_does_not_take(name, options, message):
    with pytest.raises(ValueError, match=message):
        choose(name, options)


def test_equal_choices_are_equal():
    assert choose("dpmpp_2m", {"eta": None}) == choose("DPM++ 2M")
    assert len({choose("ddim"), choose("ddim", {"eta": 0.0}), choose("ddim", {"eta": 0.5})}) == 3
    assert all(set(one.defaults) <= set(OPTIONS) for one in SAMPLERS.values())


def test_the_listing_names_all():
    text = samplers.listing()
    assert all(name in text for name in (*SAMPLERS, *SCHEDULES))


class TestGuidance:
    context = torch.cat([torch.full((2, 1, 1), 10.0), torch.full((2, 1, 1), 20.0)])

    def predict(self, x, t, context):
        self.batch = x.shape[0]
        return x * context[:, :, :, None]

    def test_formula_and_order_of_the_halves(self):
        x = torch.ones(2, 4, 8, 8)
        guided = Guided(self.predict, Conditions(self.context, 7.5))(x, 1)
        assert torch.equal(guided, torch.full_like(x, 10 + 7.5 * 10))
        assert self.batch == 4

    def test_no_second_half_at_scale_1(self):
        x = torch.ones(2, 4, 8, 8)
        assert torch.equal(Guided(self.predict, Conditions(self.context[2:], 1))(x, 1), 20 * x)
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
