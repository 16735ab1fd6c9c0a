"""Whole pictures by each sampler beside diffusers' pipeline with the scheduler of that name, as it comes."""

import diffusers
import pytest
import torch
from PIL import Image

from bench.reference.numbers import pixels
from bench.reference.oracles import SCHEDULE, diffusers_pipeline
from sd.pipeline import StableDiffusion
from tests.sparing import sparing
from tests.test_pipeline import NEGATIVE, PROMPTS, SMALL, detailed, differ
from tests.weights import random_models

BETAS = {key: value for key, value in SCHEDULE.items() if key not in ("clip_sample", "timestep_spacing")}
KARRAS = {"use_karras_sigmas": True}
CASES = [
    ("euler", "leading", "EulerDiscreteScheduler", {}),
    ("euler", "trailing", "EulerDiscreteScheduler", {}),
    ("euler", "karras", "EulerDiscreteScheduler", KARRAS),
    ("euler_a", "leading", "EulerAncestralDiscreteScheduler", {}),
    ("euler_a", "linspace", "EulerAncestralDiscreteScheduler", {}),
    ("heun", "linspace", "HeunDiscreteScheduler", {}),
    ("dpm2", "linspace", "KDPM2DiscreteScheduler", {}),
    ("lms", "leading", "LMSDiscreteScheduler", {}),
    ("plms", None, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    ("dpmpp_2m", "karras", "DPMSolverMultistepScheduler", KARRAS),
    ("dpmpp_2m_sde", "karras", "DPMSolverMultistepScheduler", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    ("unipc", "karras", "UniPCMultistepScheduler", KARRAS),
    ("deis", "karras", "DEISMultistepScheduler", KARRAS),
    ("lcm", None, "LCMScheduler", {}),
    ("tcd", None, "TCDScheduler", {}),
]
NOW = ("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
ROUNDING = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
"""These tell the network whole timesteps on karras, where ours are between them."""


def by_diffusers(pipe: StableDiffusion, scheduler) -> Image.Image:
    """Twenty steps of the first prompt, seed 11."""
    theirs = diffusers_pipeline(pipe, scheduler)
    size, shared = {"height": 32, "width": 48}, {"num_inference_steps": 20, "guidance_scale": 7.5}
    return theirs(
        PROMPTS[0], negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(11), **size, **shared
    ).images[0]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, *random_models(SMALL, seed=3))


@pytest.mark.parametrize(("sampler", "schedule", "scheduler", "options"), sparing(CASES, lambda case: case[2] in NOW))
def test_a_picture_against_diffusers(pipe, sampler, schedule, scheduler, options):
    spacing = {"timestep_spacing": schedule} if schedule in ("leading", "trailing", "linspace") else {}
    given = {"eta": 0.0} if sampler == "tcd" else {}  # which is what their pipeline passes on
    (ours,) = pipe.generate(PROMPTS[0], NEGATIVE, 20, 7.5, 11, 32, 48, sampler, schedule=schedule, **given)
    theirs = by_diffusers(pipe, getattr(diffusers, scheduler)(**BETAS, **spacing, **options))
    assert detailed(ours)
    assert differ(ours, theirs) <= (3 if scheduler in ROUNDING else 1)
    (another,) = pipe.generate(PROMPTS[0], NEGATIVE, 20, 7.5, 12, 32, 48, sampler, schedule=schedule, **given)
    assert abs(pixels(another) - pixels(ours)).mean() > 5
