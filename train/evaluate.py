"""Measure the demo model: does it draw what the prompt says, in combinations that training never showed?

    python train/evaluate.py --data train/build --samples 48                  # about 20 minutes on one CPU core
    python train/evaluate.py --data train/build --samples 400 --device cuda

Judges are train/classifier.py for concepts, trained on the real drawings alone, and train/checkers.py for the rest.
Each judges three sets: what the model drew, the same scenes truly rendered (the ceiling), and what the model drew
against the prompts of other pictures (the floor). Pictures are kept in --run: an interrupted evaluation goes on.
Writes REPORT.md and two contact sheets.

Axes: N pictures, B batch, H W pixels.
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

if not __package__:  # run as a script: find `sd` and `train`, and let train/ itself shadow nothing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.pictures.provenance import fingerprint
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from train import autoencoder, captions, checkers, classifier, export, figures
from train.captions import PLAIN, RELATIONS, SEEN_SHAPES, Bank, Data, Scene, Thing
from train.colours import recolour
from train.data import to_pixels
from train.state import write_atomically

log = logging.getLogger("evaluate")

# How many prompts of each kind there are, seen and held-out, as shares of --samples.
SHARES = {
    "plain": (0.75, 0.0),
    "colour": (0.5, 1.0),
    "background": (0.5, 1.0),
    "shape": (0.25, 0.25),
    "relation": (0.25, 0.25),
}
CONCEPT_KINDS = ("plain", "colour", "background")
# Rows of the tables: title, verdict, kind of prompt.
ROWS = (
    ("concept top-1, plain prompt", "top-1", "plain"),
    ("concept top-1, in a colour", "top-1", "colour"),
    ("concept top-1, on a background", "top-1", "background"),
    ("concept top-5, plain prompt", "top-5", "plain"),
    ("concept top-5, in a colour", "top-5", "colour"),
    ("concept top-5, on a background", "top-5", "background"),
    ("colour", "colour", "colour"),
    ("background", "background", "background"),
    ("shape and its colour", "shape", "shape"),
    ("relation of two shapes", "relation", "relation"),
)
TRIED_KINDS = ("colour", "background")  # whose held-out prompts compare scales of guidance
RECONSTRUCTED = 48  # pictures that the PSNR is measured on
SHEET = 18  # pictures of the held-out contact sheet
TEMPLATE_SIDE = 64  # pixels at which distances to drawings are measured


# --- prompts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A prompt with its scene; `seed` is its number among all trials, so that no seed is chosen."""

    kind: str
    held_out: bool
    scene: Scene
    prompt: str
    seed: int


def by_hash(data: Data, scenes: Iterable[Scene]) -> list[Scene]:
    """The scenes in an order that is the same on every machine and that nobody chose."""
    return sorted(scenes, key=lambda scene: captions.fraction("evaluate", captions.caption(data, scene)))


def seen_colour(data: Data, row: int) -> Scene | None:
    """One of the hues in which training shows the concept, and in which it is not drawn anyway."""
    concept = data.concepts[row]
    banned = {concept.natural, captions.held_out_colour(concept), PLAIN}
    choices = [colour for colour in concept.colours["3d"] if colour not in banned]
    if not choices:
        return None
    return Scene((Thing(row, colour=min(choices, key=lambda c: captions.fraction("seen", concept.codepoint, c))),))


def seen_background(data: Data, row: int) -> Scene:
    concept = data.concepts[row]
    choices = set(captions.BACKGROUNDS) - {PLAIN, captions.held_out_background(concept)}
    return Scene((Thing(row),), min(choices, key=lambda c: captions.fraction("seen", concept.codepoint, c)))


def relations() -> dict[bool, list[Scene]]:
    """Two shapes of different colours, each seen in training, by whether their relation is held out."""
    found: dict[bool, list[Scene]] = {False: [], True: []}
    for (first, second), relation in product(permutations(SEEN_SHAPES, 2), RELATIONS):
        if first[1] != second[1]:
            things = tuple(Thing(shape=shape, colour=colour) for shape, colour in (first, second))
            held_out = captions.held_out_relation(first[0], relation, second[0])
            found[held_out].append(Scene(things, relation=relation))
    return found


def scenes(data: Data) -> dict[tuple[str, bool], list[Scene]]:
    """Every kind of scene, seen and held-out, in the order in which they are used."""
    rows = range(len(data.concepts))
    found = {
        ("plain", False): [Scene((Thing(row),)) for row in rows],
        ("colour", False): [scene for row in rows if (scene := seen_colour(data, row))],
        ("background", False): [seen_background(data, row) for row in rows],
        ("shape", False): [Scene((Thing(shape=shape, colour=colour),)) for shape, colour in SEEN_SHAPES],
    }
    found |= {(kind, True): held_out for kind, held_out in captions.held_out_scenes(data).items()}
    found |= {("relation", held_out): pairs for held_out, pairs in relations().items()}
    return {key: by_hash(data, group) for key, group in found.items()}


def make_trials(data: Data, samples: int) -> list[Trial]:
    """All trials, the kinds spread evenly, so that any first part of the list is a smaller evaluation."""
    planned = []
    for (kind, held_out), group in scenes(data).items():
        count = round(samples * SHARES[kind][held_out])
        planned += [((n + 0.5) / count, kind, held_out, group[n % len(group)]) for n in range(count)]
    planned.sort(key=lambda plan: plan[0])
    return [
        Trial(kind, held_out, scene, captions.caption(data, scene), seed)
        for seed, (_, kind, held_out, scene) in enumerate(planned)
    ]


# --- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artist:
    """Draws prompts with fixed settings, and keeps what it drew in `folder`."""

    pipe: StableDiffusion
    folder: Path
    steps: int
    sampler: str
    batch: int

    def draw(self, jobs: Sequence[tuple[str, int]], scale: float, until: float = math.inf) -> list[Image.Image]:
        """Pictures of (prompt, seed) pairs; fewer, the first of them, if time.monotonic() passes `until`."""
        missing = [job for job in jobs if not self._path(job, scale).exists()]
        for start in tqdm(range(0, len(missing), self.batch), desc=f"drawing at {scale:g}", mininterval=5):
            if time.monotonic() > until:
                break
            self._draw_batch(missing[start : start + self.batch], scale)
        drawn = []
        for path in (self._path(job, scale) for job in jobs):
            if not path.exists():
                break
            drawn.append(Image.open(path).convert("RGB"))
        return drawn

    def _draw_batch(self, jobs: Sequence[tuple[str, int]], scale: float) -> None:
        prompts, seeds = zip(*jobs, strict=True)
        pictures = self.pipe.generate(
            prompts, steps=self.steps, cfg_scale=scale, seed=list(seeds), sampler=self.sampler
        )
        for job, picture in zip(jobs, pictures, strict=True):
            self._path(job, scale).parent.mkdir(parents=True, exist_ok=True)
            figures.save_picture(picture, self._path(job, scale))

    def _path(self, job: tuple[str, int], scale: float) -> Path:
        prompt, seed = job
        return self.folder / f"{scale:g}" / f"{seed:05d} {prompt}.png"


def render_truth(data: Data, trials: Sequence[Trial]) -> list[Image.Image]:
    """The trials' scenes as training would have drawn them, at middle sizes and places."""
    things = dict.fromkeys(thing for trial in trials for thing in trial.scene.things if thing.concept is not None)
    sprites = np.stack([captions.premultiply(_coloured(data, thing)) for thing in things])
    bank = Bank(sprites, {(t.concept, t.style, t.colour): number for number, t in enumerate(things)})
    return [Image.fromarray(captions.render(bank, trial.scene)) for trial in trials]


def _coloured(data: Data, thing: Thing) -> ndarray:
    drawing = data.drawings[thing.style][thing.concept]
    if thing.colour is None:
        return drawing
    return recolour(drawing, data.concepts[thing.concept].surfaces[thing.style], thing.colour)


def stack(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


# --- the judges ----------------------------------------------------------------------------------------------------


def open_classifier(path: Path, data: Data, seconds: float, device: torch.device) -> classifier.Classifier:
    """The judge of concepts, trained for `seconds` if `path` does not hold one."""
    if not path.exists():
        sprites = torch.from_numpy(data.drawings["3d"]).permute(0, 3, 1, 2)
        sides = (classifier.SIDE, classifier.SIDE)
        small = torch.cat([F.interpolate(part.float(), sides, mode="area") for part in sprites.split(128)])
        model = classifier.train_classifier(small.round().byte(), torch.arange(len(small)), seconds, device)
        write_atomically(path, lambda temporary: torch.save(model.state_dict(), temporary))
    model = classifier.Classifier(len(data.concepts)).to(device, memory_format=torch.channels_last)
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return model.eval()


Verdicts = dict[str, bool]


def judge(picture: ndarray, ranks: Sequence[int], trial: Trial) -> Verdicts:
    """Whether uint8 [H, W, 3], whose likeliest concepts are `ranks`, shows what the trial asks for."""
    if trial.kind == "relation":
        return {"relation": shows_relation(picture, trial.scene)}
    thing = trial.scene.things[0]
    if trial.kind == "shape":
        found = [(shape, colour) for shape, colour, _ in checkers.find_shapes(picture)]
        return {"shape": found == [(thing.shape, thing.colour)]}
    verdicts = {"top-1": thing.concept == ranks[0], "top-5": thing.concept in ranks}
    if trial.kind == "colour":
        verdicts["colour"] = checkers.dominant_colour(picture) == thing.colour
    if trial.kind == "background":
        verdicts["background"] = checkers.background_colour(picture) == trial.scene.background
    return verdicts


def shows_relation(picture: ndarray, scene: Scene) -> bool:
    """Whether both shapes of the scene, and nothing else, are there in their colours and in the relation."""
    found = {(shape, colour): centre for shape, colour, centre in checkers.find_shapes(picture)}
    wanted = [(thing.shape, thing.colour) for thing in scene.things]
    if set(found) != set(wanted):
        return False
    return checkers.relation(found[wanted[0]], found[wanted[1]]) == scene.relation


def judge_all(pictures: Sequence[Image.Image], ranks: Tensor, trials: Sequence[Trial]) -> list[Verdicts]:
    return [
        judge(np.asarray(picture), row, trial)
        for picture, row, trial in zip(pictures, ranks.tolist(), trials, strict=True)
    ]


def shuffled(trials: Sequence[Trial]) -> list[Trial]:
    """For each trial another of its kind, half of them further on: the prompts that the floor is judged by."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for n, trial in enumerate(trials):
        groups.setdefault((trial.kind, trial.held_out), []).append(n)
    other = {n: group[(k + len(group) // 2) % len(group)] for group in groups.values() for k, n in enumerate(group)}
    return [trials[other[n]] for n in range(len(trials))]


@dataclass(frozen=True)
class Share:
    """`hits` of `count`."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's 95% confidence interval (1927), which holds for few samples and for shares near 0 and 1."""
        p, n = self.value, self.count
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        spread = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - spread), min(1.0, middle + spread)

    def __str__(self) -> str:
        if not self.count:
            return "-"
        low, high = self.interval()
        return f"{self.value:.0%} ({low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class Results:
    """Trials with the verdicts on the model's pictures, the true ones, and the model's under other prompts."""

    trials: Sequence[Trial]
    model: Sequence[Verdicts]
    truth: Sequence[Verdicts]
    floor: Sequence[Verdicts]

    def shares(self, verdict: str, keep: Callable[[Trial], bool]) -> tuple[Share, Share, Share]:
        """Of the trials that `keep` says: how many pass, drawn by the model, rendered, and shuffled."""
        chosen = [n for n, trial in enumerate(self.trials) if keep(trial) and verdict in self.model[n]]
        sets = (self.model, self.truth, self.floor)
        return tuple(Share(sum(verdicts[n][verdict] for n in chosen), len(chosen)) for verdicts in sets)


# --- memorized or not ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearness:
    """Plain prompts' pictures against all drawings: RMS difference of pixels, of 255."""

    own_is_nearest: Share
    to_nearest: float  # medians
    to_own: float
    between_drawings: float  # from a drawing to the nearest other one


def nearness(data: Data, trials: Sequence[Trial], pictures: Sequence[Image.Image]) -> Nearness:
    drawings = [Trial("plain", False, Scene((Thing(row),)), "", 0) for row in range(len(data.concepts))]
    templates = _flat(render_truth(data, drawings))
    plain = [n for n, trial in enumerate(trials) if trial.kind == "plain"]
    own = torch.tensor([trials[n].scene.things[0].concept for n in plain])
    distances = _rms(_flat([pictures[n] for n in plain]), templates)
    between = _rms(templates, templates).fill_diagonal_(math.inf)
    nearest = distances.min(dim=1)
    return Nearness(
        Share(int((nearest.indices == own).sum()), len(plain)),
        nearest.values.median().item(),
        distances.gather(1, own[:, None]).median().item(),
        between.min(dim=1).values.median().item(),
    )


def _flat(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures -> fp32 [N, values], smaller, so that a shift by a pixel counts less."""
    sides = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    return F.interpolate(stack(pictures).float(), sides, mode="area").flatten(1)


def _rms(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b) / math.sqrt(a.shape[1])


# --- the report ----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def score_table(results: Results, keep: Callable[[Trial], bool]) -> str:
    """Seen and held-out combinations side by side."""
    rows = []
    for title, verdict, kind in ROWS:
        row: list[object] = [title]
        for held_out in (False, True):
            shares = results.shares(verdict, lambda t, k=kind, h=held_out: t.kind == k and t.held_out == h and keep(t))
            row += [shares[0].count or "-", shares[0], *(f"{s.value:.0%}" if s.count else "-" for s in shares[1:])]
        if row[1] != "-" or row[5] != "-":
            rows.append(row)
    columns = ("pictures", "model", "real", "shuffled")
    return table(["score", *(f"{side}: {c}" for side in ("seen", "held-out") for c in columns)], rows)


def target_table(results: Results) -> str:
    """What is aimed at, on held-out prompts."""
    rows: list[Sequence[object]] = []
    for title, kinds in (("", TRIED_KINDS), (", in a colour", ("colour",)), (", on a background", ("background",))):
        model, truth, _ = results.shares("top-1", lambda trial, kinds=kinds: trial.held_out and trial.kind in kinds)
        ratio = model.value / truth.value if truth.hits else math.nan
        reached = f"{ratio:.0%}, that is {model} of {truth.value:.0%}"
        rows.append((f"concept top-1 / ceiling{title}", "80%", reached, model.count))
    for verdict, target in (("colour", "85%"), ("background", "90%")):
        share = results.shares(verdict, lambda trial: trial.held_out)[0]
        rows.append((verdict, target, share, share.count))
    return table(["held-out prompts", "aim", "reached", "pictures"], rows)


def scale_table(tried: dict[float, Results]) -> str:
    """Held-out colours and backgrounds at several scales of guidance."""
    rows = []
    for scale, results in sorted(tried.items()):
        shares = [results.shares(verdict, lambda _: True)[0] for verdict in ("top-1", "colour", "background")]
        rows.append((f"{scale:g}", *(f"{share.hits} of {share.count}" for share in shares)))
    return table(["guidance", "concept top-1", "colour", "background"], rows)


REPORT = """# What the demo model draws

Written by train/evaluate.py; every number comes from the run named at the end.

{concepts:,} concepts, {everyday} of them everyday ones. {pictures} of {planned} planned pictures, {side}x{side}
pixels, by {sampler} in {steps} steps with guidance {scale:g}. Prompts are taken in the order of a hash of their words
and seeds count from 0: none is chosen by hand.

- **Seen** combinations of a concept with a colour or background may have been in training; **held-out** ones never
  were (train/captions.py): each recolourable concept lacks one hue, each concept one background, 20% of pairs of shape
  and colour and 10% of relations are left out.
- **model**: the model's pictures, with Wilson 95% confidence intervals. **real**: the same scenes truly rendered, with
  the same judges: the ceiling. **shuffled**: the model's pictures judged by prompts of other pictures: the floor.
- Concepts are judged by a small network trained on the real drawings alone (train/classifier.py), all else by counting
  pixels (train/checkers.py).

## Aims

{targets}
A ratio to a low ceiling says little: where "real" is far below 100%, the judge itself does not recognize the drawing,
as with many recoloured ones, since it learned other shifts of hue. Intervals are wide where pictures are few.

## All concepts

{all_scores}
Relations are those of two flat shapes, which the checkers can find; both shapes must be right too. Pairs of concepts
("a cat left of a dog") are not scored.

## Everyday concepts only

{everyday_scores}
## Memorized, and not

**Plain concepts are memorized**: a prompt such as "a fox" has one or two drawings behind it, and the model reproduces
the drawing. What is claimed to generalize is recombination alone: colours, backgrounds, shapes and relations of the
held-out columns above.

{nearness}
Distances are medians of the root mean square difference of pixels (of 255) at {template}x{template}.

## Guidance

The first {tried} held-out prompts for colours and backgrounds, the same seeds. With so few pictures this tells a bad
scale from a good one and no more.

{scales}
## Autoencoder

PSNR of reconstructions, {reconstructed} true pictures of the prompts above, in fp32: {psnr:.1f} dB.

## Pictures

The fixed list of train/figures.py, seeds 0, 1, ...; the last row is held out:

![the fixed prompts](prompts.png)

The first held-out prompts for colours and backgrounds; + passes its colour or background check, - fails it, and ? is a
picture in which the classifier names another concept:

![held-out prompts](held-out.png)

## Run

    {command}

{machine}
"""


def nearness_table(near: Nearness) -> str:
    rows = [
        ("pictures of plain prompts whose nearest drawing is the prompt's own", near.own_is_nearest),
        ("distance from picture to nearest drawing", f"{near.to_nearest:.1f}"),
        ("distance from picture to the prompt's own drawing", f"{near.to_own:.1f}"),
        ("distance from a drawing to the nearest other drawing", f"{near.between_drawings:.1f}"),
    ]
    return table(["nearest training image", ""], rows)


def machine_lines(pipe: StableDiffusion, ckpt: Path) -> str:
    facts = export.machine(pipe.device) | {"dtype": str(pipe.dtype).removeprefix("torch.")}
    facts |= {"numpy": np.__version__, "checkpoint": f"{ckpt.name} ({fingerprint(ckpt)})"}
    return table(["", ""], facts.items())


def held_out_sheet(results: Results, pictures: Sequence[Image.Image]) -> Image.Image:
    """The first held-out pictures, captioned with how they were judged."""
    shown = [n for n, t in enumerate(results.trials) if t.held_out and t.kind in TRIED_KINDS][:SHEET]
    texts = []
    for trial, verdicts in ((results.trials[n], results.model[n]) for n in shown):
        marks = ("+" if verdicts[trial.kind] else "-") + ("" if verdicts["top-1"] else "?")
        texts.append(f"{marks} {trial.prompt}")
    return figures.contact_sheet([pictures[n] for n in shown], texts, columns=6)


# --- all of it -----------------------------------------------------------------------------------------------------


class Evaluation:
    """The data, the model and the judges, loaded."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.data = captions.load(args.data)
        self.pipe = StableDiffusion.load(args.ckpt, args.device)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.pipe.vae.to(memory_format=torch.channels_last)
        batch = args.batch or (256 if self.pipe.device.type == "cuda" else 8)
        folder = args.run / f"{fingerprint(args.ckpt)}-{args.sampler}{args.steps}"
        self.artist = Artist(self.pipe, folder, args.steps, args.sampler, batch)
        self.classifier = open_classifier(
            args.run / "classifier.pt", self.data, args.classifier_seconds, self.pipe.device
        )

    def results(self, trials: Sequence[Trial], pictures: Sequence[Image.Image]) -> Results:
        truth = render_truth(self.data, trials)
        ranks, true_ranks = (classifier.rank(self.classifier, to_pixels(stack(p))) for p in (pictures, truth))
        return Results(
            trials,
            judge_all(pictures, ranks, trials),
            judge_all(truth, true_ranks, trials),
            judge_all(pictures, ranks, shuffled(trials)),
        )

    def draw(self, trials: Sequence[Trial], scale: float, until: float = math.inf) -> list[Image.Image]:
        return self.artist.draw([(trial.prompt, trial.seed) for trial in trials], scale, until)

    def try_scales(self, trials: Sequence[Trial]) -> dict[float, Results]:
        chosen = [t for t in trials if t.held_out and t.kind in TRIED_KINDS][: self.args.tried]
        scales = sorted({*self.args.try_scales, self.args.cfg_scale})
        return {scale: self.results(chosen, self.draw(chosen, scale)) for scale in scales}

    def psnr(self, trials: Sequence[Trial]) -> float:
        pictures = stack(render_truth(self.data, trials[:RECONSTRUCTED])).to(self.pipe.device)
        return autoencoder.reconstruct(self.pipe.vae.float(), pictures)[1]

    def run(self) -> None:
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + args.time_limit
        trials = make_trials(self.data, args.samples)
        tried = self.try_scales(trials)
        sheet = self.artist.draw([(p, seed) for seed, p in enumerate(figures.SAMPLE_PROMPTS)], args.cfg_scale)
        figures.save_picture(figures.contact_sheet(sheet, figures.SAMPLE_PROMPTS, columns=6), args.out / "prompts.png")
        pictures = self.draw(trials, args.cfg_scale, until)
        if not pictures:
            sys.exit("evaluate: --time-limit left no time to draw")
        trials = trials[: len(pictures)]
        results = self.results(trials, pictures)
        figures.save_picture(held_out_sheet(results, pictures), args.out / "held-out.png")
        self.write(results, tried, nearness(self.data, trials, pictures), self.psnr(trials))

    def write(self, results: Results, tried: dict[float, Results], near: Nearness, psnr: float) -> None:
        args = self.args
        everyday = [concept.everyday for concept in self.data.concepts]

        def is_everyday(trial: Trial) -> bool:
            return trial.kind in CONCEPT_KINDS and everyday[trial.scene.things[0].concept]

        text = REPORT.format(
            concepts=len(everyday),
            everyday=sum(everyday),
            pictures=len(results.trials),
            planned=len(make_trials(self.data, args.samples)),
            sampler=args.sampler.upper(),
            steps=args.steps,
            scale=args.cfg_scale,
            side=self.pipe.config.image_size,
            targets=target_table(results),
            all_scores=score_table(results, lambda _: True),
            everyday_scores=score_table(results, is_everyday),
            nearness=nearness_table(near),
            template=TEMPLATE_SIDE,
            tried=args.tried,
            scales=scale_table(tried),
            reconstructed=min(RECONSTRUCTED, len(results.trials)),
            psnr=psnr,
            command=command(args),
            machine=machine_lines(self.pipe, args.ckpt),
        )
        write_atomically(args.out / "REPORT.md", lambda temporary: temporary.write_text(text.rstrip() + "\n"))
        print(text)


def command(args: argparse.Namespace) -> str:
    """What measures the same again, in whatever time it takes."""
    words = ["python train/evaluate.py", f"--samples {args.samples}", f"--steps {args.steps}"]
    words += [f"--sampler {args.sampler}", f"--cfg-scale {args.cfg_scale:g}", f"--tried {args.tried}"]
    words += ["--try-scales", *(f"{scale:g}" for scale in args.try_scales)] if args.try_scales else []
    return " ".join([*words, f"--device {args.device}"] if args.device else words)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=DEMO_CHECKPOINT, help="the model (the demo model)")
    parser.add_argument("--data", type=Path, default=Path("train/build"), help="what prepare.py wrote (%(default)s)")
    parser.add_argument("--samples", type=int, default=48, help="held-out prompts of a kind, seen: half (%(default)s)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance (%(default)s)")
    parser.add_argument("--try-scales", type=float, nargs="*", default=[], help="other guidance to compare with it")
    parser.add_argument("--tried", type=int, default=40, help="prompts to compare scales on (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (the best there is)")
    parser.add_argument("--batch", type=int, help="pictures drawn together (CPU 8, CUDA 256)")
    parser.add_argument("--classifier-seconds", type=float, default=300.0, help="to train the judge (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds to draw in; then report on those")
    parser.add_argument("--run", type=Path, default=Path("train/runs/evaluate"), help="where work is kept")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="where the report goes (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    args = parse()
    try:
        evaluation = Evaluation(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    evaluation.run()


if __name__ == "__main__":
    main()
