"""Training on a CPU in seconds: losses fall, a killed and resumed run equals an undisturbed one, the export draws."""

import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sd.clip import CLIP
from sd.config import Config
from sd.pipeline import StableDiffusion
from sd.vae import VAE
from train import autoencoder
from train import train as trainer
from train.data import Chunks, Pool
from train.diffusion import Denoiser
from train.loop import BAD_STEPS_IN_A_ROW, Trainer
from train.losses import NoiseLoss, scaled_gradient, ssim, stratified_timesteps
from train.presets import PRESETS
from train.state import EMA, Clock, Stage, adamw, learning_rate

TINY = PRESETS["tiny"]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
STEPS = ("--vae-steps", "40", "--diffusion-steps", "40")


def draw_squares(n: int, seed: int) -> Iterator[tuple[np.ndarray, str]]:
    """Squares of one of three colours, somewhere on white."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        name = rng.choice(list(COLOURS))
        picture = np.full((32, 32, 3), 255, dtype=np.uint8)
        y, x = rng.integers(0, 16, 2)
        picture[y : y + 16, x : x + 16] = COLOURS[name]
        yield picture, f"a {name} square"


def train(folder: Path, stage: str = "all") -> None:
    limits = ["--time-limit", "600", "--workers", "0", "--device", "cpu", *STEPS]
    trainer.train(
        trainer.parse(["--run", str(folder), "--preset", "tiny", "--stage", stage, *limits]),
        draw_squares,
        time.monotonic(),
    )


def train_saving_often(folder: Path, stage: str) -> None:
    """For a process that will be killed."""
    torch.set_num_threads(1)
    trainer.PRESETS["tiny"] = replace(TINY, save_seconds=0.1)
    train(folder, stage)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def flatten(value, name: str = "") -> dict[str, object]:
    """Nested dicts, lists and tuples to leaves by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flatten(item, f"{name}/{key}").items()}
    return {name: value}


def timeless(state: dict) -> dict[str, object]:
    """A stage's state as leaves by path, without what the clock wrote into it."""
    losses = [(step, loss) for step, _, loss in state["losses"]]
    return flatten({**state, "losses": losses, "elapsed": None})


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_loss_falls(run, stage):
    losses = [loss for _, _, loss in read(run / f"{stage}.pt")["losses"]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_killed_stage_resumes_bit_identically(run, tmp_path, stage):
    if stage == "diffusion":
        shutil.copy(run / "autoencoder.pt", tmp_path)
    state = tmp_path / f"{stage}.pt"
    kill_once_saved(state, stage)
    assert not read(state)["done"]
    train(tmp_path, stage)
    straight, resumed = timeless(read(run / state.name)), timeless(read(state))
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        same = torch.equal(value, resumed[key]) if isinstance(value, torch.Tensor) else value == resumed[key]
        assert same, key


def kill_once_saved(state: Path, stage: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=train_saving_often, args=(state.parent, stage))
    process.start()
    while not state.exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_export_loads_strictly_and_draws(run):
    pipe = StableDiffusion.load(run / "export" / "sd-demo.safetensors.index.json", device="cpu")
    assert pipe.config.vae.scale_factor != TINY.model.vae.scale_factor
    pictures = pipe.generate(["a red square", "a word it never saw"], steps=3, cfg_scale=2, seed=0, sampler="ddim")
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    averaged = read(run / "diffusion.pt")["ema"]
    weight = pipe.unet.out[2].weight
    torch.testing.assert_close(weight, averaged["unet.out.2.weight"].half().float(), rtol=0, atol=0)
    used = pipe.clip.embeddings.token_embedding.weight.abs().sum(dim=1).nonzero().flatten()
    assert used.tolist() == read(run / "diffusion.pt")["extra"]["tokens"]["ids"].tolist()


def test_run_leaves_its_pictures_and_numbers(run):
    for name in ("samples.png", "reconstructions.png", "loss.png", "report.json"):
        assert (run / name).stat().st_size > 0
    report = trainer.export.read_report(run / "report.json")
    assert report["vae"]["done"]
    assert report["diffusion"]["steps"] == 40
    assert report["bytes"] == sum(file.stat().st_size for file in (run / "export").iterdir())


# The parts


def chunks() -> Chunks:
    return Chunks(draw_squares, size=4, length=8, seed=0)


def place(chunk):
    return tuple(torch.from_numpy(part) for part in chunk)


@pytest.mark.parametrize("step", [0, 1, 5, 17, 40])
def test_pool_is_rebuilt_as_it_was(step):
    settings = TINY.vae
    straight = Pool(chunks(), place, settings, step=0, workers=0)
    for s in range(step + 1):
        straight.advance(s)
    rebuilt = Pool(chunks(), place, settings, step=step, workers=0)
    rebuilt.advance(step)
    assert all(torch.equal(a, b) for a, b in zip(straight.parts, rebuilt.parts, strict=True))


def test_workers_deliver_chunks_in_order():
    alone = Pool(chunks(), place, TINY.vae, step=0, workers=0)
    helped = Pool(chunks(), place, TINY.vae, step=0, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(alone.parts, helped.parts, strict=True))


def test_centred_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = VAE(TINY.model.vae).double().eval()
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before, logvar = vae.encode(pixels)
        decoded = vae.decode(before)
        autoencoder.centre_latents(vae, before.mean(dim=(0, 2, 3)))
        after, same_logvar = vae.encode(pixels)
        torch.testing.assert_close(vae.decode(after), decoded)
    torch.testing.assert_close(same_logvar, logvar)
    assert after.mean(dim=(0, 2, 3)).abs().max() < 1e-12


def test_new_denoiser_predicts_nothing():
    model = Denoiser(TINY.model)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    assert model(torch.randn(2, 4, 4, 4), torch.tensor([1, 900]), tokens).abs().max() == 0


def test_noise_loss_weights_the_clean_end_down():
    loss = NoiseLoss(gamma=5.0, device=torch.device("cpu"))
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    snr = abar / (1 - abar)
    np.testing.assert_allclose(loss.weight, np.minimum(snr, 5) / snr, rtol=1e-5)
    error = loss(torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), torch.tensor([0, 500, 999]))
    np.testing.assert_allclose(error, (np.minimum(snr, 5) / snr)[[0, 500, 999]].mean(), rtol=1e-5)


def test_timesteps_cover_the_schedule_evenly():
    t = stratified_timesteps(50, torch.Generator().manual_seed(0))
    assert sorted((t // 20).tolist()) == list(range(50))


def test_ssim_of_equal_and_of_opposite_pictures():
    picture = 0.5 + 0.2 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture).item() == pytest.approx(1)
    assert ssim(picture, 1 - picture) < -0.8


def test_scaled_gradient_has_the_size_it_was_given():
    x = torch.randn(8, requires_grad=True)
    gradient = scaled_gradient((1000 * x).sin().sum(), (x**2).sum(), at=x, ratio=0.3)
    assert gradient.norm().item() == pytest.approx(0.3 * (2 * x).norm().item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls():
    assert learning_rate(0, 0.0, warmup=10, peak=1.0) == pytest.approx(0.1)
    assert learning_rate(50, 0.0, warmup=10, peak=1.0) == pytest.approx(1.0)
    assert learning_rate(50, 1.2, warmup=10, peak=1.0) == pytest.approx(0.01)


def test_clock_over_two_calls():
    first = Clock(limit=100, reserve=10, after=60, started=time.monotonic() - 89)
    assert (first.end, first.stop()) == (140, False)
    first.resume(50)  # the end of a stage in the same call: nothing is counted twice
    assert first.elapsed == pytest.approx(89, abs=1)
    second = Clock(limit=60, reserve=10, started=time.monotonic() - 20)
    second.resume(first.elapsed)
    assert second.elapsed == pytest.approx(89, abs=1)
    assert second.end == pytest.approx(89 + 30, abs=1)
    second.started -= 31
    assert second.stop()


# Robustness


def new_trainer(folder: Path, loss) -> Trainer:
    model = nn.Linear(2, 1)
    generator = torch.Generator().manual_seed(0)
    stage = Stage(model, EMA(model, 0.9), adamw(model, 1e-2, 0.0), generator, batch=8)
    return Trainer(stage, loss, folder / "state.pt", Clock(60, 0), peak_lr=1e-2, warmup=1)


def squared_output(model, stage):
    loss = model(torch.ones(stage.batch, 2)).square().mean()
    return loss, loss.detach()


def test_bad_steps_are_skipped_and_then_the_state_is_read_again(tmp_path):
    def not_a_number(model, stage):
        loss, reported = squared_output(model, stage)
        return loss * float("nan"), reported

    trainer = new_trainer(tmp_path, squared_output)
    trainer.step(0.0)
    trainer.save()
    saved = trainer.stage.model.weight.clone()
    trainer.loss = not_a_number
    for _ in range(BAD_STEPS_IN_A_ROW):
        trainer.step(0.0)
        assert torch.equal(trainer.stage.model.weight, saved)
    assert (trainer.skipped, trainer.reloads, trainer.stage.lr_scale) == (BAD_STEPS_IN_A_ROW, 1, 0.5)
    trainer.loss = squared_output
    trainer.step(0.0)
    assert trainer.stage.step == 2
    assert not torch.equal(trainer.stage.model.weight, saved)


def test_batch_is_halved_when_memory_runs_out(tmp_path):
    def hungry(model, stage):
        if stage.batch > 2:
            raise torch.OutOfMemoryError
        return squared_output(model, stage)

    trainer = new_trainer(tmp_path, hungry)
    for _ in range(3):
        trainer.step(0.0)
    assert (trainer.stage.batch, trainer.stage.step) == (2, 1)


def test_demo_fits_its_budget():
    """30 MB in fp16 with 3,000 token rows, and shapes that the pipeline takes."""
    config: Config = PRESETS["demo"].model
    with torch.device("meta"):
        clip, denoiser, vae = CLIP(config.text), Denoiser(config), VAE(config.vae)
    rows = (config.text.vocab_size - 3000) * config.text.width
    count = sum(p.numel() for module in (denoiser, vae) for p in module.parameters()) - rows
    assert 2 * count < 30e6
    assert clip.final_layer_norm.weight.numel() == config.unet.context_dim
    config.check_size(config.image_size, config.image_size)
