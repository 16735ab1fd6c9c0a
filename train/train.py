"""Train the demo model: the VAE, then text encoder and UNet. Goes on where the run's folder says it stopped.

    python train/train.py --data train/build --run train/runs/demo --time-limit 1080

The run's folder gets vae.pt and diffusion.pt (states to resume from), autoencoder.pt (the finished VAE), export/ (the
checkpoint in fp16), samples.png and grids/, reconstructions.png, loss.png, report.json and train.log.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: find `sd` and `train`, and let train/ itself shadow nothing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from sd.config import Config
from sd.images import to_pil
from sd.pipeline import StableDiffusion
from sd.vae import VAE
from train import autoencoder, captions, diffusion, export, figures
from train.data import Chunk, Chunks, Draw, Pool, kept_bank
from train.loop import Every, Progress, Trainer
from train.presets import PRESETS
from train.state import Clock, Stage, read_losses

log = logging.getLogger("train")

VAE_SEED, DIFFUSION_SEED = 1 << 40, 0  # added to chunk numbers: the stages see different pictures
SCALE_PICTURES = 4096  # that the latents' mean and scale are measured on
SHOWN_RECONSTRUCTIONS = 12


class Run:
    """One call of the trainer on a run's folder: what both stages share."""

    def __init__(self, args: argparse.Namespace, draw: Draw, started: float):
        self.args = args
        self.preset = PRESETS[args.preset]
        self.folder = Path(args.run)
        self.device = pick_device(args.device)
        self.clock = Clock(args.time_limit, self.preset.finish_seconds, args.time_after, started)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        self.draw = draw
        self.report = export.read_report(self.folder / "report.json")
        self.report |= {"preset": args.preset, **export.machine(self.device)}

    def chunks(self, seed: int) -> Chunks:
        config = self.preset.model
        return Chunks(self.draw, self.preset.chunk, config.text.max_length, self.args.seed + seed)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.args.seed)

    def resume(self, stage: Stage, path: Path) -> None:
        if path.exists():
            self.clock.resume(stage.load(path))
            log.info("resumed %s at step %d, %.0f s into the run", path.name, stage.step, self.clock.elapsed)

    def progress(self, steps: int | None, start: float, end: float) -> Progress:
        """Share of a stage that is done: of its steps if their number is given, else of its seconds in the run."""
        if steps is not None:
            return lambda step: step / steps
        return lambda step: (self.clock.elapsed - start) / max(1e-6, end - start)

    def train(self, trainer: Trainer, pool: Pool, progress: Progress, regular: Sequence[Every]) -> None:
        if self.args.compile and self.device.type == "cuda":
            trainer.compile()
        save = Every(self.preset.save_seconds, trainer.save)
        trainer.run(progress, [save, *regular], pool.advance)

    def note(self, name: str, stage: Stage, trainer: Trainer) -> None:
        """Put the stage's numbers into the report."""
        numbers = {
            "steps": stage.step,
            "batch": stage.batch,
            "samples_per_second": round(trainer.samples_per_second, 1),
            "loss": stage.losses[-1][2] if stage.losses else None,
            "done": stage.done,
            "skipped": trainer.skipped,
            "reloads": trainer.reloads,
        }
        self.report |= {name: numbers, "seconds": round(self.clock.elapsed, 1)}
        export.write_report(self.report, self.folder / "report.json")

    def draw_losses(self) -> None:
        paths = {name: self.folder / f"{name}.pt" for name in ("vae", "diffusion")}
        losses = {name: read_losses(path) for name, path in paths.items() if path.exists()}
        figures.loss_curve(losses, self.folder / "loss.png")


def train_vae(run: Run, finished: Path) -> None:
    """Stage one, up to `finished`: the file with the averaged VAE, written once the stage is done."""
    config, cfg = run.preset.model, run.preset.vae
    torch.manual_seed(run.args.seed)
    stage = autoencoder.new_stage(config, cfg, run.preset.weight_decay, run.generator())
    path = run.folder / "vae.pt"
    run.resume(stage, path)
    pool = Pool(run.chunks(VAE_SEED), partial(_place_pictures, run.device), cfg, stage.step, run.args.workers)
    share = 1.0 if run.args.stage == "vae" else run.preset.vae_share
    progress = run.progress(run.args.vae_steps, 0.0, share * run.clock.end)
    loss = autoencoder.VAELoss(config, cfg, pool.batch, progress, run.autocast)
    trainer = Trainer(stage, loss, path, run.clock, cfg.lr, cfg.warmup)
    run.train(trainer, pool, progress, [])
    if stage.done:
        config = autoencoder.finish(stage.ema.model.vae, config, pool.parts[0][:SCALE_PICTURES], run.autocast)
        autoencoder.save(finished, stage.ema.model.vae, config, run.clock.elapsed)
    run.report["vae_psnr_db"] = draw_reconstructions(run, stage.ema.model.vae, pool.parts[0][:SHOWN_RECONSTRUCTIONS])
    run.note("vae", stage, trainer)
    run.draw_losses()


def train_diffusion(run: Run, vae: VAE, config: Config, vae_seconds: float) -> None:
    """Stage two, with an export at every save, so that whenever it ends there is a model to use."""
    cfg = run.preset.diffusion
    run.clock.resume(vae_seconds)
    torch.manual_seed(run.args.seed)
    stage = diffusion.new_stage(config, cfg, run.preset.weight_decay, run.generator())
    path = run.folder / "diffusion.pt"
    run.resume(stage, path)
    chunks = run.chunks(DIFFUSION_SEED)
    place = diffusion.LatentPlacer(vae, config.vae.scale_factor, stage.extra["tokens"], run.device, run.autocast)
    pool = Pool(chunks, place, cfg, stage.step, run.args.workers)
    empty = chunks.tokenizer("", config.text.max_length).to(run.device)
    loss = diffusion.DiffusionLoss(cfg, empty, pool.batch, run.autocast)
    trainer = Trainer(stage, loss, path, run.clock, cfg.lr, cfg.warmup)
    pipe = StableDiffusion(config, stage.ema.model.clip, stage.ema.model.unet, vae, chunks.tokenizer)

    def publish() -> None:
        run.report["bytes"] = export.export_checkpoint(pipe, stage.extra["tokens"].ids(), run.folder / "export")
        run.report["parameters"] = export.parameter_counts(pipe, len(stage.extra["tokens"].ids()))
        run.note("diffusion", stage, trainer)

    def draw() -> None:
        draw_samples(run, pipe, stage.step)

    regular = [Every(run.preset.save_seconds, publish), Every(run.preset.sample_seconds, draw)]
    run.train(trainer, pool, run.progress(run.args.diffusion_steps, vae_seconds, run.clock.end), regular)
    publish()
    draw()
    run.draw_losses()


def draw_reconstructions(run: Run, vae: VAE, pictures: Tensor) -> float:
    """Write reconstructions.png, originals above decoded ones; returns the PSNR in dB."""
    output, psnr = autoencoder.reconstruct(vae, pictures)
    both = to_pil(torch.cat([autoencoder.to_pixels(pictures), output]))
    names = ["original"] * len(pictures) + [f"decoded ({psnr:.1f} dB)"] * len(pictures)
    figures.save_picture(figures.contact_sheet(both, names, len(pictures)), run.folder / "reconstructions.png")
    log.info("reconstructions: %.2f dB", psnr)
    return round(psnr, 2)


def draw_samples(run: Run, pipe: StableDiffusion, step: int) -> None:
    """Write samples.png, and the same picture under its step in grids/: the fixed prompts by the averaged weights."""
    prompts = figures.SAMPLE_PROMPTS
    pictures = pipe.generate(
        prompts, steps=run.preset.sample_steps, cfg_scale=run.preset.cfg_scale, seed=0, sampler="ddim"
    )
    sheet = figures.contact_sheet(pictures, prompts, columns=6)
    for path in (run.folder / "grids" / f"step_{step:07d}.png", run.folder / "samples.png"):
        figures.save_picture(sheet, path)


def _place_pictures(device: torch.device, chunk: Chunk) -> tuple[Tensor]:
    return (torch.from_numpy(chunk[0]).to(device),)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train(args: argparse.Namespace, draw: Draw, started: float) -> None:
    """Train what args.stage names, from where args.run stopped, on pictures that `draw` draws.

    `started` is when the call began, by time.monotonic.
    """
    run = Run(args, draw, started)
    (run.folder / "grids").mkdir(parents=True, exist_ok=True)
    finished = run.folder / "autoencoder.pt"
    if args.stage != "diffusion" and not finished.exists():
        train_vae(run, finished)
    if args.stage != "vae" and finished.exists() and not run.clock.stop():
        train_diffusion(run, *autoencoder.load(finished, run.device))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="train/build", help="folder that train/prepare.py wrote (%(default)s)")
    parser.add_argument("--run", default="train/runs/demo", help="the run's folder (%(default)s)")
    parser.add_argument("--stage", choices=("vae", "diffusion", "all"), default="all")
    parser.add_argument("--everyday", action="store_true", help="only the concepts that a newcomer would type first")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument(
        "--time-limit", type=float, default=1080.0, help="seconds that this call may take (%(default)s)"
    )
    parser.add_argument("--time-after", type=float, default=0.0, help="seconds that later calls of this run will add")
    parser.add_argument("--vae-steps", type=int, help="end the VAE's stage by steps, not by time")
    parser.add_argument("--diffusion-steps", type=int, help="end the second stage by steps, not by time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on CUDA")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def log_to(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(folder / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", handlers=handlers)


def open_data(folder: Path, run: Path, everyday: bool) -> Draw:
    """Scenes of train/captions.py without those held out. The drawings, in all colours, are rendered once for a run."""
    data = captions.load(folder, everyday)
    bank = kept_bank(run, partial(captions.render_bank, data, processes=os.cpu_count() or 1))
    return captions.Dataset(data, bank).draw


def main() -> None:
    started = time.monotonic()
    args = parse()
    log_to(Path(args.run))
    try:
        draw = open_data(Path(args.data), Path(args.run), args.everyday)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # every batch has one shape
    train(args, draw, started)


if __name__ == "__main__":
    main()
