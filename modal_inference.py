"""Draw on Modal's GPUs: one picture, thousands of them, or a service.

    modal run modal_inference.py --prompt "a lighthouse in a storm"
    modal run modal_inference.py --prompts-file prompts.jsonl --out-dir pictures --max-containers 20
    modal run modal_inference.py --prompt "a fox" --lora style.safetensors:0.8 --init-image photo.jpg --strength 0.6
    modal deploy modal_inference.py

The weights come from the volume that modal_volume.py fills. What would cost money for nothing is left out: weights and
arguments are checked before a container starts; nothing is retried that would fail again; the checkpoint is read where
it lies, without a copy; compiled kernels are kept on a second volume; the image's layers are in the order of how
seldom they change, and the program comes last, outside of it.

Settings that hold for the whole app come from the environment of `modal run` and `modal deploy`:
    SD_GPU       the GPU, A10 if not given; "none" for a container without one
    SD_CKPT_NAME the checkpoint of the service, a file in the volume or "demo"
    SD_OPT       the optimizations of the service; "default", if not given, is what suits the model and the GPU
    SD_AUTH      "proxy" (default): Modal's proxy-auth tokens; "basic": HTTP Basic, for browsers, with SD_USER and
                 SD_PASSWORD from the Modal Secret "sd-auth". The service is never open.
    SD_MAX_STEPS, SD_MAX_SIDE, ... the service's limits, as `python -m sd.serve --help` lists them

Only modal and what lies in this folder are needed here; torch is in the container.
"""

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import modal
import modal.experimental

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from sd import gpus  # noqa: E402
from sd.nearest import there_are  # noqa: E402
from sd.pictures import parameters  # noqa: E402
from sd.pictures.carried import carried, named_by  # noqa: E402
from sd.pictures.files import DEFAULT, left_to_draw, named, output_files  # noqa: E402
from sd.pictures.loras import refuse  # noqa: E402
from sd.pictures.model import ModelChoice  # noqa: E402
from sd.pictures.parameters import UserError, checked  # noqa: E402
from sd.pictures.plan import Job, Picture, plan  # noqa: E402
from sd.pictures.png_text import png_parameters  # noqa: E402
from sd.pictures.prompts_file import Entry, read_prompts  # noqa: E402
from sd.service.orders import limits_from_env  # noqa: E402
from sd.writing import write_whole  # noqa: E402

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion
    from sd.service.interrupted import EndsInWords

HOME = "/root"
"""Where a container has this file and what it needs: HERE, in the container."""

WEIGHTS = f"{HOME}/weights"
CACHE = f"{HOME}/cache"
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
GPUS: dict[str, gpus.Capability] = {
    "T4": (7, 5),
    "L4": (8, 9),
    "A10": (8, 6),
    "L40S": (8, 9),
    **dict.fromkeys(("A100", "A100-40GB", "A100-80GB"), (8, 0)),
    "RTX-PRO-6000": (12, 0),
    **dict.fromkeys(("H100", "H100!", "H200"), (9, 0)),
    **dict.fromkeys(("B200", "B200+"), (10, 0)),
}
"""Modal's names (https://modal.com/docs/guide/gpu), and what NVIDIA says that each can do. B200+ may be a B300."""

FILES = ("lora", "embedding", "vae")
"""Options of sd/inference.py that name files of the model on this machine: they are sent to the volume, each once, as
are those that pictures are drawn after."""

MOST_OF_A_PROMPT = 16
"""Pictures that one call returns; more come through a prompts file, one by one."""

TRITON = "triton==3.7.1"
"""What torch's wheel for CUDA asks for, named: without it, or with another, a paid GPU would run the slow kernels."""

OPENCV = "opencv-python-headless==5.0.0.93"
"""For --control-preprocess canny: whoever types it here cannot install it there."""

CHECK_TRITON = (
    "import triton.language; from importlib.metadata import requires; "
    f"assert any(r.replace(' ', '').startswith('{TRITON};') for r in requires('torch')), requires('torch')"
)

MINUTE = 60


# ---- settings


def leave(error: object, code: int = 2) -> None:
    """One line on stderr, and the exit code."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Modal's map, left halfway, would fill the screen
    print(f"{'error: ' if code == 2 else ''}{one_line(error)}", file=sys.stderr)
    raise SystemExit(code)


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_gpu(name: str) -> str:
    """The name of a GPU as Modal has it. Raises UserError: Modal itself would say so after the image is built."""
    if name.upper() not in GPUS:
        raise UserError(f"no GPU {name!r}{there_are(name, GPUS)}")
    return name.upper()


def check_opt(opt: str, gpu: str) -> None:
    """Of the optimizations that are named, that the GPU, or "none", can run them. Raises UserError.

    What a preset stands for is not looked at: of that, the container leaves out what cannot run there, and says so.
    """
    if missing := gpus.lacking(opt, GPUS.get(gpu, gpus.NONE)):
        name, needs = next(iter(missing.items()))
        here = "a container without a GPU" if gpu == "none" else f"{gpu} ({gpus.sm(GPUS[gpu])})"
        raise UserError(
            f"{name} needs {needs}; this is {here}: choose another GPU, or leave it out of the optimizations"
        )


def read_settings(environment: dict[str, str]) -> dict[str, str]:
    """Raises UserError or ValueError. Containers get the same ones: this file must define the same functions there."""
    defaults = {"SD_GPU": "A10", "SD_CKPT_NAME": CHECKPOINT, "SD_OPT": "default", "SD_AUTH": "proxy"}
    settings = {name: environment.get(name) or default for name, default in defaults.items()}
    if settings["SD_GPU"] != "none":
        settings["SD_GPU"] = check_gpu(settings["SD_GPU"])
    if settings["SD_AUTH"] not in ("proxy", "basic"):
        raise UserError(f'SD_AUTH must be "proxy" or "basic", not {settings["SD_AUTH"]!r}')
    if modal.is_local():  # a container has another GPU than this where --gpu names one
        check_opt(settings["SD_OPT"], settings["SD_GPU"])
    limits_from_env(environment)
    return settings | {name: value for name, value in environment.items() if name.startswith("SD_MAX_") and value}


try:
    SETTINGS = read_settings(dict(os.environ))
except (UserError, ValueError) as error:
    leave(error)
GPU = None if SETTINGS["SD_GPU"] == "none" else SETTINGS["SD_GPU"]


# ---- what a container is made of

app = modal.App("sd")
weights = modal.Volume.from_name("sd-weights", create_if_missing=True)
cache = modal.Volume.from_name("sd-cache", create_if_missing=True)
VOLUMES = {WEIGHTS: weights.with_mount_options(read_only=True), CACHE: cache}


def not_the_demo_model(path: Path) -> bool:
    """Of data/demo, what is not uploaded: pictures and reports."""
    return path.suffix not in (".safetensors", ".json")


def not_the_program(path: Path) -> bool:
    """Of sd/, what is not uploaded: bytecode, and weights that somebody put there."""
    return path.suffix not in (".py", ".html", ".css", ".js", ".cpp", ".h", ".json")


image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("build-essential")  # Triton and torch.compile call a C compiler when the first kernel runs
    .uv_pip_install(TRITON, OPENCV, requirements=[str(HERE / "requirements.txt")])
    # The image is not built where torch would have another Triton than its own, or none that can be imported.
    .run_commands(f'python -c "{CHECK_TRITON}"')
    .env(
        {
            "SD_ROOT": HOME,
            "SD_WEIGHTS": WEIGHTS,
            "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
            "TRITON_CACHE_DIR": f"{CACHE}/triton",
            "SD_CACHE": f"{CACHE}/sd",
            "TQDM_MININTERVAL": "1",
        }
    )
    # Named one by one: data/ is where checkpoints of gigabytes are put.
    .add_local_file(HERE / "data" / "vocab.json", f"{HOME}/data/vocab.json")
    .add_local_file(HERE / "data" / "merges.txt", f"{HOME}/data/merges.txt")
    .add_local_dir(HERE / "data" / "demo", f"{HOME}/data/demo", ignore=not_the_demo_model)
    .add_local_dir(HERE / "sd", f"{HOME}/sd", ignore=not_the_program)
    .add_local_file(HERE / "modal_infer.sh", f"{HOME}/modal_infer.sh")
)
RESOURCES = {
    "image": image,
    "gpu": GPU,
    "cpu": 2.0,
    "memory": 8 * 1024,
    "volumes": VOLUMES,
    "retries": 0,  # a prompt that fails, fails again: a retry would only pay for the GPU twice
}


def checkpoint_path(name: str) -> Path:
    """Where a checkpoint lies in the container: "demo", or a file of the volume."""
    return HERE / "data/demo/sd-demo.safetensors.index.json" if name == "demo" else HERE / "weights" / name


def in_container(files: str) -> dict[str, list[str]]:
    """What `sent` says -> the options of FILES, as the container has their files."""
    said = json.loads(files) if files else {}
    return {name: [str(HERE / "weights" / text) for text in said.get(name, ())] for name in FILES}


def lay_out(links: dict[str, str], folder: Path) -> None:
    """Files of the volume, by the names that jobs have for them, into a folder."""
    for name, file in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(HERE / "weights" / file)


def choice_of(files: dict[str, list[str]], **others: object) -> ModelChoice:
    """The options of FILES, as lists of texts, as a choice."""
    vae = files.get("vae")
    return ModelChoice(**{**files, "vae": Path(vae[0]) if vae else None}, **others)


class Kept:
    """What is compiled here, kept for later containers: the cache volume is committed when it has changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen = self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Path -> size and time of change; what vanishes meanwhile was a temporary file."""
        found = {}
        for path in self.folder.rglob("*"):
            with suppress(OSError):
                if path.is_file():
                    found[str(path)] = path.stat().st_size, path.stat().st_mtime_ns
        return found

    def commit(self) -> bool:
        """Commit if a file is new or another since the last time. That it fails costs time later, never a picture."""
        files = self._files()
        if files == self.seen:
            return False
        try:
            cache.commit()
        except Exception as error:
            print(f"what was compiled is not kept: {one_line(error)}", file=sys.stderr)
            return False
        self.seen = files
        return True


# ---- one prompt: modal_infer.sh in a container


@app.function(**RESOURCES, timeout=30 * MINUTE)
def infer(ckpt: str, flags: list[str], files: str = "", links: dict[str, str] | None = None) -> tuple[list[bytes], str]:
    """Run modal_infer.sh with the flags and `sent` files -> (the PNGs, ""), or ([], why it failed in one line)."""
    flags = [*flags, *(f"--{name}={text}" for name, texts in in_container(files).items() for text in texts)]
    kept = Kept(HERE / "cache")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as working:
        lay_out(links or {}, Path(working))
        out = f"--out={folder}/{{index:06}}.png"
        if error := run_script([str(HERE / "modal_infer.sh"), *flags, out], checkpoint_path(ckpt), working):
            return [], error
        kept.commit()
        return [file.read_bytes() for file in sorted(Path(folder).iterdir())], ""


def run_script(command: list[str], ckpt: Path, folder: str) -> str:
    """Run it in a folder, passing on what it prints as it comes; returns "" or, in one line, why it failed."""
    environment = {**os.environ, "SD_CKPT": str(ckpt), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE) as process:
        last = ""
        for line in lines_as_they_come(process.stderr):
            if not line.startswith(b"error: "):  # that one is the caller's to print
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            last = line.decode(errors="replace").strip() or last
    if process.returncode < 0:
        return f"{Path(command[0]).name} was ended by signal {-process.returncode}; was it out of memory?"
    return last.removeprefix("error: ") or f"exit code {process.returncode}" if process.returncode else ""


def lines_as_they_come(stream) -> Iterator[bytes]:
    """Lines, and each state of a progress bar, which ends in a carriage return."""
    held = b""
    while chunk := stream.read1():
        *lines, held = (held + chunk).replace(b"\r", b"\r\n").split(b"\n")
        for line in lines:
            yield line if line.endswith(b"\r") else line + b"\n"
    if held:
        yield held + b"\n"


# ---- many prompts, and the service: a model that stays loaded


class Warm:
    """Loads once a container. Its subclasses say what is then done with `pipe`."""

    ckpt = SETTINGS["SD_CKPT_NAME"]
    opt = SETTINGS["SD_OPT"]
    files = ""
    deployed = False

    @modal.enter(snap=True)
    def read(self) -> None:
        """The checkpoint into memory; of a deployed app, Modal keeps a snapshot of what is there afterwards.

        Without a call to CUDA: the snapshot is taken where there is no GPU, and torch would remember that. Without a
        mapped file either: Modal's documentation has weights in memory there, and says nothing of files of a volume.
        """
        from sd.checkpoints.mapped import into_memory

        dtype = "float32" if os.environ["SD_GPU"] == "none" else "float16"
        self.path = checkpoint_path(self.ckpt)
        self.choice = choice_of(in_container(self.files), device="cpu", dtype=dtype, opt=self.opt)
        self.pipe = self.choice.load_plain(self.path)
        if self.deployed:  # others have no snapshot, and need not copy
            for model in (self.pipe.clip, self.pipe.unet, self.pipe.vae):
                into_memory(model.parameters())
            self.pipe.note_loaded()  # a service has no LoRAs: they are as the file has them

    @modal.enter(snap=False)
    def wake(self) -> None:
        """Onto the GPU, and faster; kernels that are compiled here lie on the volume for the next container."""
        from sd.pipeline import default_device

        self.kept = Kept(HERE / "cache")
        self.pipe.to(default_device())
        self.choice.optimize(self.pipe)
        self.kept.commit()

    @modal.exit()
    def keep(self) -> None:
        """What was compiled for pictures of other sizes."""
        if hasattr(self, "kept"):  # not if it could not be loaded
            self.kept.commit()

    def facts(self) -> dict[str, object]:
        """What a picture's PNG says of the model and the machine."""
        return self.choice.facts(self.pipe, self.path)


@app.cls(**RESOURCES, env=SETTINGS, timeout=10 * MINUTE, scaledown_window=MINUTE, enable_memory_snapshot=True)
class Model(Warm):
    """Draws pictures of a prompts file, one a call."""

    ckpt: str = modal.parameter(default=CHECKPOINT)
    opt: str = modal.parameter(default="default")
    files: str = modal.parameter(default="")
    drawn = False

    @modal.enter(snap=False)
    def work(self) -> None:
        """Where the files lie that jobs name: there they are found by the names that somebody typed."""
        os.chdir(tempfile.mkdtemp())

    @modal.method()
    def draw(self, fields: dict, links: dict[str, str] | None = None) -> dict:
        """{"index", "values"} of a job -> {"index", "png"} or {"index", "error"}: one line, and whose it is."""
        job = Job(**fields, where="")
        try:
            lay_out(links or {}, Path())
            return {"index": job.index, "png": self.png(job)}
        except Exception as error:
            give_up_if_broken(error, self.pipe)
            return {"index": job.index, "error": one_line(error)}

    def png(self, job: Job) -> bytes:
        """The picture as a file that says how it was drawn, as sd/inference.py writes it."""
        from sd.pictures.drawing import NamedFiles, draw_batch
        from sd.pictures.png import to_png

        files = NamedFiles()
        (picture,) = draw_batch(self.pipe, [job], files.pictures([job]), [files.origin(job)])
        if not self.drawn:
            self.kept.commit()  # before the first is answered: then the other containers start
        self.drawn = True
        return to_png(picture, {**picture.info, **self.facts()})


def give_up_if_broken(error: Exception, pipe: "StableDiffusion") -> None:
    """After an error that is not the picture's own, have Modal send this container no more of them.

    A GPU that has failed fails at once for every further picture, and so would take most of them off the queue.
    """
    from sd.pictures.drawing import is_out_of_memory, release

    if is_out_of_memory(error):
        release(pipe.device)
    elif not isinstance(error, ValueError):
        modal.experimental.stop_fetching_inputs()


AUTH_SECRETS = [modal.Secret.from_name("sd-auth", required_keys=["SD_USER", "SD_PASSWORD"])]


# One container: a GPU that is idle for two minutes is given back, and a crowd waits or is told to come again rather
# than renting ten. It takes many requests at once so that it can say so; it draws one picture at a time.
@app.cls(
    **RESOURCES,
    env=SETTINGS,
    secrets=AUTH_SECRETS if SETTINGS["SD_AUTH"] == "basic" else [],
    timeout=10 * MINUTE,
    scaledown_window=2 * MINUTE,
    max_containers=1,
    enable_memory_snapshot=True,
)
@modal.concurrent(max_inputs=100)
class Service(Warm):
    """sd/serve.py's app over HTTP."""

    deployed = True

    @modal.asgi_app(requires_proxy_auth=SETTINGS["SD_AUTH"] == "proxy")
    def web(self) -> "EndsInWords":
        from sd.service.access import auth_from_env
        from sd.service.app import create_app
        from sd.service.interrupted import EndsInWords

        # Without a password in the Secret this raises: no service rather than an open one.
        auth = auth_from_env(os.environ) if SETTINGS["SD_AUTH"] == "basic" else None
        return EndsInWords(create_app(self.pipe, limits_from_env(os.environ), auth, self.facts()))


# ---- the command line


def with_parameters(function: Callable[..., None]) -> Callable[..., None]:
    """A flag for each parameter and FILES in place of **given: Modal makes them of the function's signature."""
    own = list(inspect.signature(function).parameters.values())[:-1]
    only = {"kind": inspect.Parameter.KEYWORD_ONLY, "default": None}
    kinds = {**{one.name: one.check.kind for one in parameters.flags()}, **dict.fromkeys(FILES, str)}
    more = [inspect.Parameter(name, annotation=kind | None, **only) for name, kind in kinds.items()]
    function.__signature__ = inspect.Signature([*own, *more])
    function.__annotations__ = {one.name: one.annotation for one in (*own, *more)}
    return function


@app.local_entrypoint()
@with_parameters
def main(
    prompt: str | None = None,
    prompts_file: str | None = None,
    opt: str = "default",
    ckpt: str = CHECKPOINT,
    gpu: str | None = None,
    max_containers: int = 10,
    out: str | None = None,
    out_dir: str = "pictures",
    overwrite: bool = False,
    **given: object,
):
    """Draw a --prompt into --out, or the prompts of --prompts-file into --out-dir, on Modal."""
    try:
        if bool(prompt) == bool(prompts_file):
            raise UserError("say what to draw: --prompt TEXT or --prompts-file FILE, one of them")
        choice = named_files({name: given.pop(name, None) for name in FILES})
        shared = checked("", {name: several(name, value) for name, value in given.items()})
        check_options(max_containers, opt)
        check_opt(opt, check_gpu(gpu) if gpu else SETTINGS["SD_GPU"])
        options = gpu_options(gpu)
        if prompts_file:
            pictures, needed = plan_file(prompts_file, shared, Path(out_dir), ckpt, overwrite, choice)
            files, links = sent(choice, needed, check_weights(ckpt)) if pictures else ("", {})
            model = Model.with_options(**options, max_containers=max_containers)(ckpt=ckpt, opt=opt, files=files)
            draw_file(pictures, model, links, len(os.listdir(out_dir)))
        else:
            pictures, needed = plan_prompt(prompt, shared, DEFAULT if overwrite and out is None else out)
            if not overwrite:
                check_free(pictures)
            files, links = sent(choice, needed, check_weights(ckpt))
            draw_prompt(pictures, infer.with_options(**options) if options else infer, ckpt, opt, files, links)
    except (UserError, ValueError, OSError, modal.exception.Error) as error:
        leave(error)
    except KeyboardInterrupt:  # of itself, Modal's client would say that all went well
        leave("interrupted; what is written stays, and the same command goes on with a prompts file", 130)


def several(name: str, value: object) -> object:
    """Modal takes each flag once: of what may be given more than once, the values are separated by commas."""
    repeated = isinstance(value, str) and isinstance(parameters.PARAMETERS[name].check, parameters.Several)
    return value.split(",") if repeated else value


def gpu_options(gpu: str | None) -> dict:
    """What containers are asked for on another GPU than this file's. Raises UserError."""
    if not gpu:
        return {}
    gpu = check_gpu(gpu)
    return {"gpu": gpu, "env": {**SETTINGS, "SD_GPU": gpu}}


def check_options(max_containers: int, opt: str) -> None:
    """Raises UserError or ValueError. Of --opt, only where torch is installed here too."""
    if max_containers < 1:
        raise UserError(f"--max-containers must be at least 1, not {max_containers}")
    if opt in ("default", "exact", "original", "fast", "none", "") or importlib.util.find_spec("torch") is None:
        return
    from sd import optimizations

    optimizations.check(opt)


def check_weights(ckpt: str) -> set[str]:
    """The files in the volume: that is asked of Modal, without a container. Raises UserError unless ckpt is there."""
    there = {entry.path.lstrip("/") for entry in weights.listdir("/", recursive=True)}
    if ckpt != "demo" and ckpt not in there:
        hint = "run `modal run modal_volume.py`, or see `modal run modal_volume.py --list`"
        raise UserError(f"{ckpt} is not in the volume sd-weights: {hint}")
    return there


# ---- files of this machine


def named_files(given: dict[str, str | None]) -> ModelChoice:
    """The options of FILES, several of one separated by commas: Modal takes each flag once. Raises UserError."""
    choice = choice_of({name: [text] if name == "vae" else text.split(",") for name, text in given.items() if text})
    choice.check_files()
    if choice.vae and choice.vae.is_dir():
        raise UserError(f"--vae: {choice.vae} is a folder; name the file in it, as diffusion_pytorch_model.safetensors")
    return choice


def sent(choice: ModelChoice, needed: Mapping[str, Path], there: set[str]) -> tuple[str, dict[str, str]]:
    """Have the files of the choice in the volume, whose files are `there`, and those that pictures are drawn after.

    -> which they are, for `in_container`; and of the latter, by the names that jobs have for them, for `lay_out`.

    One lies under the hash of its content: so it is sent once, and another one of the same name does not replace it.
    """
    files = {
        "lora": choice.loras(),
        "embedding": choice.embeddings(),
        "vae": [(choice.vae, None)] if choice.vae else [],
    }
    paths = {*(path for pairs in files.values() for path, _ in pairs), *needed.values()}
    named = {path: f"files/{sha256(path)[:16]}/{path.name}" for path in sorted(paths)}
    if missing := {path: name for path, name in named.items() if name not in there}:
        names = [path.name for path in missing]
        print(f"sending {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}", flush=True)
        with weights.batch_upload(force=True) as batch:  # two commands may send the same
            for path, name in missing.items():
                batch.put_file(path, f"/{name}")
    said = {
        option: [named[path] if value is None else f"{named[path]}:{value}" for path, value in pairs]
        for option, pairs in files.items()
        if pairs
    }
    return json.dumps(said) if said else "", {name: named[path] for name, path in needed.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- one prompt


def plan_prompt(prompt: str, shared: dict[str, object], out: str | None) -> tuple[list[Picture], Mapping[str, Path]]:
    """The pictures of one prompt and what they are drawn after: out is None for output.png, or what is free after it.

    Raises UserError.
    """
    if shared.get("num_images", 1) > MOST_OF_A_PROMPT:
        raise UserError(f"--num-images: at most {MOST_OF_A_PROMPT} of one --prompt; a --prompts-file takes any number")
    shared = dict(shared)
    first_seed = shared.pop("seed", secrets.randbelow(2**32))
    asked = carried(plan([Entry("", checked("", {"prompt": prompt}))], shared, first_seed))
    refuse(asked.plan)
    pictures = list(named(asked.plan, out, many=len(asked.plan) > 1, random=True))
    if other := next((file for _, file in pictures if file.suffix.lower() != ".png"), None):
        raise UserError(f"--out: {other} must end in .png: that is what the container returns")
    return pictures, asked.files


def check_free(pictures: Sequence[Picture]) -> None:
    """That no file of somebody's is written over: one that is there is a picture of this program. Raises UserError."""
    for _, file in pictures:
        try:
            png_parameters(file)
        except OSError:  # there is none
            continue
        except ValueError:
            told = f"{file} is there, and no picture of this program"
            raise UserError(f"{told}; --overwrite, or another --out") from None


def draw_prompt(
    pictures: Sequence[Picture], function: modal.Function, ckpt: str, opt: str, files: str, links: Mapping[str, str]
) -> None:
    """Draw them in one container, with the files that are `sent`, and write them."""
    job, _ = pictures[0]
    values = {**job.values, "num_images": len(pictures)}
    said = (one for one in parameters.flags() if one.says_something(values))
    asked = (parameters.PARAMETERS["prompt"], *said)
    flags = [word for one in asked for word in one.words(values[one.name])]
    pngs, error = function.remote(ckpt, [*flags, f"--opt={opt}"], files, dict(links))
    if error:
        raise UserError(error)
    for (drawn, file), png in zip(pictures, pngs, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, png)
        print(f"{file}  seed {drawn.seed}")


# ---- many prompts


def plan_file(
    path: str, shared: dict[str, object], folder: Path, ckpt: str, overwrite: bool, choice: ModelChoice | None = None
) -> tuple[list[Picture], Mapping[str, Path]]:
    """The pictures of a prompts file that are not in the folder yet, and what those are drawn after.

    Raises UserError.
    """
    shared = dict(shared)
    first_seed = shared.pop("seed", 0)
    asked = carried(plan(read_prompts(path), shared, first_seed))
    refuse(asked.plan)
    folder.mkdir(parents=True, exist_ok=True)
    files = output_files(f"{folder}/{{index:05}}-{{seed}}.png", asked.plan, many=True)
    pictures = list(zip(asked.plan, files, strict=True))
    if not overwrite:
        same = {"checkpoint": checkpoint_path(ckpt).name, **(choice or ModelChoice()).recorded_files()}
        pictures = left_to_draw(pictures, png_parameters, same)
    needed = set().union(*(named_by(job) for job, _ in pictures)) if asked.files else set()
    return pictures, {name: file for name, file in asked.files.items() if name in needed}


def draw_file(pictures: Sequence[Picture], model: "Model", links: Mapping[str, str], there: int) -> None:
    """Draw them in many containers, writing each as it comes. Raises UserError at the end if any failed."""
    if not pictures:
        print("all pictures are there already; --overwrite draws them again")
        return
    print(f"{len(pictures)} pictures to draw" + (f", {there} files are there" if there else ""))
    failures = write_results(results_of(model, pictures, links), pictures)
    for job, file in pictures:
        if job.index in failures:
            print(f"failed: {file}  ({job.where}: {failures[job.index]})", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(pictures)} pictures failed; run the same command to try them again")


def results_of(model: "Model", pictures: Sequence[Picture], links: Mapping[str, str]) -> Iterator[object]:
    """What `Model.draw` returns for each, as it comes; an exception for one whose container was lost.

    The first picture is drawn alone: if the model does not load, one container has found out, not all of them, and
    what it compiles lies on the volume when the others start. Raises UserError then.
    """
    fields = (asked_of(job, links) for job, _ in pictures)
    try:
        first = model.draw.remote(*next(fields))
    except Exception as error:
        raise UserError(f"no picture can be drawn: {one_line(error)}") from None
    yield first
    yield from model.draw.starmap(fields, order_outputs=False, return_exceptions=True)


def asked_of(job: Job, links: Mapping[str, str]) -> tuple[dict[str, object], dict[str, str]]:
    """What `Model.draw` takes: the job, and of the links those that it needs."""
    needed = named_by(job) if links else ()
    return {"index": job.index, "values": job.values}, {name: links[name] for name in needed}


def write_results(results: Iterable[object], pictures: Sequence[Picture]) -> dict[int, str]:
    """Write each picture as it comes; returns the others' indices with the reason. One picture is held at a time."""
    files = {job.index: file for job, file in pictures}
    failures: dict[int, str] = {}
    lost = "no answer"
    progress = Progress(len(files))
    left = set(files)
    for result in results:
        if isinstance(result, BaseException):  # of a container, not of a picture: it does not say which
            lost = one_line(result)
            continue
        left.discard(result["index"])
        if "png" in result:
            write_whole(files[result["index"]], result["png"])
        else:
            failures[result["index"]] = result["error"]
        progress.show(len(files) - len(left), len(failures))
    return failures | dict.fromkeys(left, lost)


class Progress:
    """A bar of whole lines, at most one every two seconds: Modal's own spinner owns the terminal's last line."""

    def __init__(self, total: int, pause: float = 2.0):
        self.total = total
        self.pause = pause
        self.start = time.monotonic()
        self.next = 0.0

    def show(self, done: int, failed: int) -> None:
        now = time.monotonic()
        if now < self.next and done < self.total:
            return
        self.next = now + self.pause
        seconds = (now - self.start) / done * (self.total - done)
        filled = 30 * done // self.total
        bar = "#" * filled + "-" * (30 - filled)
        rest = f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"
        print(f"[{bar}] {done}/{self.total}, {failed} failed, {rest}", flush=True)
