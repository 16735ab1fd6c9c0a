"""ControlNets against diffusers' own, from file to picture."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.oracles import ddim_scheduler, diffusers_controlnet, diffusers_pipeline
from bench.reference.weights import TINY, random_controlnet
from sd import optimizations
from sd.controlnet import Control, ControlNet
from sd.edits import region_around
from sd.noise import PictureNoise
from sd.pipeline import StableDiffusion
from tests.weights import tiny_pipeline

DRAW = {"steps": 4, "seed": 4, "sampler": "ddim", "height": 64, "width": 128}


def picture(seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def original(net: ControlNet) -> dict[str, Tensor]:
    return {f"control_model.{name}": tensor for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="module")
def nets() -> list[ControlNet]:
    return [random_controlnet(TINY, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def files(nets, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("controls")
    paths = [folder / "edges.safetensors", folder / "depth.safetensors"]
    for path, net in zip(paths, nets, strict=True):
        save_file(original(net), path)
    return paths


@pytest.fixture
def pipe() -> StableDiffusion:
    return tiny_pipeline()


# ---- the network


@torch.no_grad()
def test_it_is_that_of_diffusers_in_double_precision():
    net = random_controlnet(TINY, seed=1, dtype=torch.float64)
    theirs = diffusers_controlnet(net, TINY.unet)
    x, context = noise(2, 4, 16, 8, dtype=torch.float64), noise(2, 77, 64, seed=1, dtype=torch.float64)
    hint, t = noise(2, 3, 128, 64, seed=2, dtype=torch.float64), torch.tensor(541)
    ours = net(x, t, context, net.seen(hint))
    down, middle = theirs(x, t, context, hint, return_dict=False)
    assert len(ours) == len(down) + 1
    assert max(relative_error(a, b) for a, b in zip(ours, [*down, middle], strict=True)) < 1e-10


def test_without_controls_the_unet_is_the_plain_one(pipe):
    """And with residuals that are all zero."""
    given = noise(2, 4, 8, 8), torch.tensor(541), noise(2, 77, 64, seed=1)
    plain = pipe.unet(*given)
    net = random_controlnet(TINY)
    zeros = [torch.zeros_like(r) for r in net(*given, net.seen(torch.zeros(2, 3, 64, 64)))]
    assert torch.equal(pipe.unet(*given, *zeros), plain)


# ---- pictures


def drawn_by_diffusers(pipe, nets, kind=StableDiffusionControlNetPipeline, **given) -> np.ndarray:
    theirs = [diffusers_controlnet(net, TINY.unet) for net in nets]
    theirs = diffusers_pipeline(pipe, ddim_scheduler(), kind, controlnet=theirs if len(theirs) > 1 else theirs[0])
    start = PictureNoise([DRAW["seed"]], (4, 8, 16), pipe.device, torch.float32)()
    size = {"height": DRAW["height"], "width": DRAW["width"]}
    asked = {"num_inference_steps": DRAW["steps"], "guidance_scale": 7.5, "latents": start, **size}
    return pixels(theirs("a red fox", **asked, **given).images)


CASES = {
    "one": [(1.0, 0.0, 1.0)],
    "weight": [(0.6, 0.0, 1.0)],
    "its end": [(1.0, 0.0, 0.6)],
    "its start": [(1.0, 0.4, 1.0)],
    "two": [(0.7, 0.0, 0.75), (0.5, 0.25, 1.0)],
}


OPTIMIZED = [pytest.param(CASES["two"], names, id=f"two, {names}") for names in ("cpu", "exact,packed-qkv,time-cache")]


@pytest.mark.parametrize(
    ("numbers", "names"),
    [*(pytest.param(numbers, "none", id=case) for case, numbers in CASES.items()), *OPTIMIZED],
)
def test_pictures_are_those_of_diffusers(pipe, nets, files, numbers, names):
    shown = [picture(seed) for seed in range(len(numbers))]
    weights, starts, ends = (list(column) if len(column) > 1 else column[0] for column in zip(*numbers, strict=True))
    expected = drawn_by_diffusers(
        pipe,
        nets[: len(numbers)],
        image=shown if len(shown) > 1 else shown[0],
        controlnet_conditioning_scale=weights,
        control_guidance_start=starts,
        control_guidance_end=ends,
    )
    optimizations.apply(pipe, names)
    plain = pixels(pipe.generate("a red fox", **DRAW))
    control = [Control(pipe.add_control(f), s, *n) for f, s, n in zip(files, shown, numbers, strict=False)]
    drawn = pixels(pipe.generate("a red fox", **DRAW, control=control))
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(drawn - plain).max() > 8, "it changes the picture"
    other = [Control(one.name, picture(9), *n) for one, n in zip(control, numbers, strict=True)]
    assert np.abs(pixels(pipe.generate("a red fox", **DRAW, control=other)) - drawn).max() > 3, "it sees its picture"
    assert np.array_equal(pixels(pipe.generate("a red fox", **DRAW)), plain)


def test_where_pictures_draw_regions_of_their_own_each_sees_that_of_the_hint(pipe, files):
    """Two pictures in a batch are those that are drawn alone; and a hint is cropped as the picture is."""
    images, masks = [picture(3, (128, 128))] * 2, [Image.new("L", (128, 128)) for _ in range(2)]
    for mask, box in zip(masks, ((0, 0, 40, 40), (70, 80, 120, 120)), strict=True):
        mask.paste(255, box)
    control = [Control(pipe.add_control(files[0]), picture(5, (128, 128)))]
    asked = {**DRAW, "width": 64, "mask_padding": 8, "control": control}
    both = pixels(pipe.generate(["a fox", "a dog"], **{**asked, "seed": [1, 2]}, init_image=images, mask=masks))
    alone = [
        pipe.generate(prompt, **{**asked, "seed": seed}, init_image=image, mask=mask)[0]
        for prompt, seed, image, mask in zip(("a fox", "a dog"), (1, 2), images, masks, strict=True)
    ]
    assert np.abs(both - pixels(alone)).max() <= 1
    region = region_around(masks[0], 8, DRAW["height"], 64)
    for hint in (picture(6, (128, 128)), control[0].picture.copy()):
        same = hint == control[0].picture
        other = picture(7, (128, 128))
        other.paste(hint.crop(region), region)
        drawn = pipe.generate(
            "a fox",
            **{**asked, "seed": 1, "control": [Control(control[0].name, other)]},
            init_image=images[0],
            mask=masks[0],
        )
        assert (np.abs(pixels(drawn[0]) - both[0]).max() <= 1) == same, "only what lies in the region counts"


def test_a_control_that_was_not_added_or_says_nothing_is_refused(pipe, files):
    name = pipe.add_control(files[0])
    for control, words in [
        (Control("other", picture()), "no ControlNet 'other' was added; there are edges"),
        (Control(name, picture(), weight=float("nan")), "weight must be from -1000 to 1000, not nan"),
        (Control(name, picture(), start=0.5, end=0.5), "between two fractions of the steps"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipe.generate("a red fox", **DRAW, control=[control])
    with pytest.raises(ValueError, match="2 control_preprocess for 1 controls"):
        pipe.generate("a", **DRAW, control=[Control(name, picture())], control_preprocess=["none", "invert"])
