"""One run of the command line: what it is asked to draw, and the pictures that this comes to. No model, no torch."""

import logging
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd.config import DTYPES
from sd.nearest import there_are
from sd.pictures.controls import controls_again, read_control
from sd.pictures.files import DEFAULT, Pictures, left_to_draw, named
from sd.pictures.formats import read_foreign, read_parameters
from sd.pictures.model import ModelChoice
from sd.pictures.parameters import PARAMETERS, UserError, checked, recorded
from sd.pictures.plan import Job, Picture, Plan, plan
from sd.pictures.prompts_file import Entry, read_prompts
from sd.pictures.provenance import embeddings_again, file_again, loras_again, vae_again
from sd.pictures.saving import STDOUT, Save, to_file, to_new_file, to_stdout
from sd.pictures.watching import Watching
from sd.printable import printable
from sd.samplers import OPTIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one run does.

    parameters: those of the command line that hold for all pictures; what is None is not given.
    out: None is output.png, or a name beside it that is free. place: where in a batch, and of how many, the one picture
    of --from-png was drawn.
    """

    prompt: Sequence[str] | None = None
    prompts_file: Path | None = None
    from_png: Path | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    out: str | None = None
    overwrite: bool = False
    batch_size: int | None = None
    save_quantized: Path | None = None
    list_opts: bool = False
    list_samplers: bool = False
    version: bool = False
    inspect: Path | None = None
    explain: bool = False
    preview: int | None = None
    preview_file: Path | None = None
    preview_decoder: Path | None = None
    save_steps: Path | None = None
    show: bool = False
    place: tuple[int, int] | None = None

    @property
    def random_seeds(self) -> bool:
        return self.parameters.get("seed") is None and not self.prompts_file

    @property
    def watching(self) -> Watching:
        """What is to be seen of the pictures while they form."""
        return Watching(self.preview, self.preview_file, self.save_steps, self.preview_decoder, self.show)

    @property
    def save(self) -> Save:
        """Where its pictures go."""
        if self.out == STDOUT:
            return to_stdout
        return to_file if self.out or self.overwrite else to_new_file


# ---- a picture again


def recalled(run: Run, model: ModelChoice) -> tuple[Run, ModelChoice, dict[str, object]]:
    """The run and the model with what they leave open filled from --from-png, and all that the picture says.

    Raises UserError, OSError or ValueError.
    """
    try:
        said = _said_by(run.from_png)
    except ValueError as error:
        raise UserError(f"--from-png: {str(error).removeprefix(f'{run.from_png} ')} ({run.from_png})") from None
    given = {name: value for name, value in run.parameters.items() if value is not None}
    if isinstance(said.get("prompt"), dict):
        raise UserError(f"--from-png: it is ComfyUI's, whose workflows are not read ({run.from_png})")
    known = checked(str(run.from_png), {one.name: said.get(one.name) for one in recorded() if one.name not in given})
    if "prompt" not in known:
        raise UserError(f"{run.from_png}: prompt is missing")
    if said.get("quantized") and not model.load_quantized:
        raise UserError(f"the picture was drawn with {said['quantized']}; name it with --load-quantized")
    if "sampler" in given:  # what was the other's is not this one's
        known = {name: value for name, value in known.items() if name not in ("schedule", *OPTIONS)}
    for one in (one for one in recorded() if one.file and one.name in known and one.name not in given):
        recorded_hash = said.get(f"{one.name}_hash")
        known[one.name] = file_again(one.option, known[one.name], recorded_hash, run.from_png.parent)
    if "control" in given:
        known.pop("control_preprocess", None)
    elif "control" in known:
        known["control"] = controls_again(known["control"], said, run.from_png.parent)
    prompt = run.prompt or [known.pop("prompt")]
    place = None if run.batch_size else _place_in_batch(said.get("batch"))
    run = replace(run, prompt=prompt, parameters={**known, **given}, place=place)
    return run, _recalled_model(model, said, run.from_png), said


def _said_by(file: Path) -> dict[str, object]:
    """What a picture says of itself; of what another program says and we have not, a line is logged."""
    if not file.exists():
        raise UserError(f"--from-png: there is no file {file}")
    try:
        return read_parameters(file)
    except ValueError:
        said, unknown = read_foreign(file)
        if unknown:
            ignored = ", ".join(f"{name} {value}" for name, value in unknown.items())
            log.warning("%s: not taken over: %s", file, ignored)
        return said


def _recalled_model(model: ModelChoice, said: Mapping[str, object], file: Path) -> ModelChoice:
    names = [name for name in ("device", "dtype", "opt", "prediction") if getattr(model, name) is None]
    known = {name: said[name] for name in names if isinstance(said.get(name), str)}
    if known.get("dtype") not in (None, *DTYPES):
        raise UserError(f"{file}: no dtype {known['dtype']!r}{there_are(known['dtype'], DTYPES)}")
    lora = model.lora if model.lora is not None else loras_again(said.get("loras"), file.parent)
    words = model.embedding if model.embedding is not None else embeddings_again(said.get("embeddings"), file.parent)
    files = {
        "lora": lora or None,
        "embedding": words or None,
        "vae": model.vae or vae_again(said.get("vae"), file.parent),
    }
    return replace(model, **known, **files, ema=model.ema or said.get("ema") is True)


def _place_in_batch(said: object) -> tuple[int, int] | None:
    """(place, size) as a picture says it, if that makes sense."""
    match said:
        case [int(place), int(size)] if 0 <= place < size <= 1024:
            return place, size
    return None


# ---- the pictures


def pictures_of(run: Run) -> Pictures:
    """The pictures of the run and their files. Raises UserError for all that is wrong without knowing the model."""
    if run.batch_size is not None and run.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {run.batch_size}")
    if bool(run.prompt) == bool(run.prompts_file):
        if (run.save_quantized or run.explain) and not run.prompts_file:
            return Pictures((), DEFAULT)
        raise UserError("say what to draw: --prompt TEXT or --prompts-file FILE, one of them")
    run.watching.check()
    shared = checked("", run.parameters)
    first_seed = shared.pop("seed", 0 if run.prompts_file else secrets.randbelow(2**32))
    jobs = plan(_entries(run), shared, first_seed)
    for line in (*ignored(run.parameters, jobs.firsts), *other_syntax(jobs.firsts)):
        log.warning("%s", line)
    pictures = _named(run, jobs)
    next(pictures.windows(), None)  # what is wrong with the first names is told now
    return pictures


def _named(run: Run, jobs: Plan) -> Pictures:
    """With files that are the run's own: unless --out names them, of random pictures such as are not there yet."""
    many = len(jobs) > 1 or run.prompts_file is not None
    if run.out == STDOUT and len(jobs) > 1:
        raise UserError("--out -: standard output takes one picture")
    if run.out == STDOUT and sys.stdout.isatty():
        raise UserError("--out -: standard output is a terminal; redirect it to a file or a program")
    out = None if run.out == STDOUT else run.out
    pictures = named(jobs, out or (DEFAULT if run.overwrite else None), many, run.random_seeds)
    return replace(pictures, sources=_sources(jobs.firsts))


def _sources(jobs: Sequence[Job]) -> frozenset[Path]:
    """What pictures are drawn from."""
    files = [one.name for one in recorded() if one.file]
    named = {Path(getattr(job, name)) for job in jobs for name in files if getattr(job, name)}
    for text in (text for job in jobs for text in job.control or ()):
        with suppress(ValueError):  # which check_controls tells, with its line
            named.add(read_control(text).picture)
    return frozenset(named)


def ignored(given: Mapping[str, object], jobs: Sequence[Job]) -> Iterator[str]:
    """Of what was given for all pictures, what changes none of them, and why."""
    for one in (PARAMETERS[name] for name, value in given.items() if value is not None):
        if not any(one.says_something(job.values) for job in jobs):
            others = " or ".join(PARAMETERS[name].option for name in one.beside)
            yield f"{one.option} changes nothing without {others}"
    if given.get("negative_prompt") and all(job.cfg_scale == 1 for job in jobs):
        yield "--negative-prompt changes nothing where --cfg-scale is 1"


THEIRS = re.compile(r"<lora:[^<>]+>|\(\(|\[\[|\[[^\[\]]*:[^\[\]]*:\s*[\d.]+\s*\]|\[[^\[\]|]+\|[^\[\]]+\]")
"""What AUTOMATIC1111's web UI reads, and nobody writes who means these signs."""


def other_syntax(jobs: Iterable[Job]) -> Iterator[str]:
    """That prompts look like another program's, where nobody has said which syntax is theirs."""
    texts = (text for job in jobs if job.prompt_syntax is None for text in (job.prompt, job.negative_prompt))
    if found := next(filter(None, map(THEIRS.search, texts)), None):
        yield f"{printable(found[0])} is read as text; --prompt-syntax a1111 reads it as AUTOMATIC1111's web UI does"


def _entries(run: Run) -> list[Entry]:
    if run.prompts_file:
        return read_prompts(run.prompts_file)
    return [Entry("", checked("", {"prompt": prompt})) for prompt in run.prompt]


def not_there_yet(pictures: list[Picture], run: Run, same: Mapping[str, object], several: bool) -> list[Picture]:
    """Of several pictures, those to draw on a second run; a single one is drawn again. Raises UserError where another
    picture has the name, or somebody's file."""
    if run.overwrite:
        return pictures
    if not several:
        for _, file in pictures:
            if run.out not in (None, STDOUT) and file.is_file() and not _is_ours(file):
                raise UserError(f"{file} is there, and no picture of this program; --overwrite, or another --out")
        return pictures
    return left_to_draw(pictures, read_parameters, same, ignore=["seed"] if run.random_seeds else [])


def _is_ours(file: Path) -> bool:
    try:
        return bool(read_parameters(file))
    except (OSError, ValueError):
        return False


def check_init_images(jobs: Sequence[Job]) -> None:
    """That each, and each mask, is there and can be read; the pixels are read when its turn comes. Raises UserError."""
    files = [one for one in recorded() if one.file]
    named = {(getattr(job, one.name), one.option): job.where for job in reversed(jobs) for one in files}
    for (name, option), where in named.items():
        if name:
            from sd.images import check_readable

            try:
                check_readable(name)
            except ValueError as error:
                raise UserError(f"{where or option}: {error}") from None
