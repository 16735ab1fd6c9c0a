"""Engines that run the same Stable Diffusion weights on a CPU, and the process that each of them is measured in.

An engine is opened by a function of a Task, which returns a call for every part that it can run. Each lives in a
process of its own (`serve`), so that its threads, its settings and its peak of memory are its own. Other projects'
packages are imported where they are used. Memory is read from Linux's /proc.

Parts: `step` is one guided UNet step, two latents in one call; `decode` one picture's latents through the VAE;
`picture` a whole picture by DDIM; `glimpse` a picture of one step, all that stable-diffusion.cpp shows of a step.
"""

import functools
import importlib.util
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench import common
from bench.load import resident
from bench.reference.numbers import noise
from sd import optimizations
from sd.config import Config
from sd.ddpm import predict_x0
from sd.guidance import Conditions, Guided
from sd.kernels import native
from sd.kernels.allocator import freed_memory_kept
from sd.pipeline import StableDiffusion
from sd.schedules import alphas_cumprod

PROMPT = "a lighthouse in a storm"
SEED = 7
SCALE = 7.5
TIMESTEP = 481  # of `step`, in the middle of the schedule
FIRST_TIMESTEP = 981  # of `glimpse`


@dataclass(frozen=True)
class Task:
    """engine: as `find` takes it. size: pixels. parts: those that will be asked for. steps: of `picture`."""

    engine: str
    checkpoint: Path
    size: int
    parts: tuple[str, ...]
    threads: int
    steps: int = 20


@dataclass(frozen=True)
class Run:
    """One call: its seconds, the most bytes that the process held during it, and what it computed."""

    seconds: float
    peak: int
    output: np.ndarray


@dataclass(frozen=True)
class Opened:
    """An engine that is ready: the seconds that opening took, conversion included, and the peak of memory in it."""

    seconds: float
    peak: int


Calls = dict[str, Callable[[], Run]]


@dataclass(frozen=True)
class Engine:
    """label: its name in tables. open: see the module. needs: the package beside this project's, as pip is told."""

    label: str
    open: Callable[[Task], Calls]
    needs: str = ""

    @property
    def package(self) -> str:
        return self.needs.partition("==")[0]

    @property
    def hint(self) -> str:
        return f"skipped: pip install {self.needs}"

    @property
    def installed(self) -> bool:
        module = self.package.removesuffix("-python").replace("-", "_")
        return not module or importlib.util.find_spec(module) is not None


# ---- what is common to the engines in PyTorch


def measured(call: Callable[[], Tensor]) -> Run:
    reset_peak()
    start = time.perf_counter()
    output = call()
    return Run(time.perf_counter() - start, resident()["VmHWM"], output.float().numpy())


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load(task: Task) -> StableDiffusion:
    """The weights in memory of their own: a mapped file would count beside what an engine makes of them."""
    pipe = StableDiffusion.load(task.checkpoint, device="cpu", dtype=torch.float32)
    for model in (pipe.clip, pipe.unet, pipe.vae):
        copies = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.load_state_dict(copies, assign=True)
        model.requires_grad_(False)
    return pipe


def inputs(config: Config, size: int) -> dict[str, tuple[Tensor, ...]]:
    """The arguments of `step` (x, t, context) and `decode` (latents): the same numbers for every engine.

    The two latents of a guided step are the same.
    """
    side = size // config.vae.downsampling
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(SEED))
    x = random(1, config.unet.in_channels, side, side).repeat(2, 1, 1, 1)
    context = random(2, config.text.max_length, config.unet.context_dim)
    latents = random(1, config.vae.z_channels, side, side) / config.vae.scale_factor
    return {"step": (x, torch.tensor(TIMESTEP), context), "decode": (latents,)}


def calls_of(functions: dict[str, Callable[[], Tensor]]) -> Calls:
    return {part: functools.partial(measured, function) for part, function in functions.items()}


# ---- this project


def open_ours(task: Task, opts: str = "none") -> Calls:
    pipe = StableDiffusion.load(task.checkpoint, device="cpu", dtype=torch.float32)  # mapped, as page-out wants it
    optimizations.apply(pipe, opts)
    if "keep-memory" in getattr(pipe, "optimizations", []):  # lasts for a picture, and a step is inside of one
        pipe.inside = freed_memory_kept()  # held: it ends with its last reference
        pipe.inside.__enter__()
    given = inputs(pipe.config, task.size)
    draw = functools.partial(our_picture, pipe, task.size)
    return calls_of(
        {
            "step": functools.partial(our_step, pipe, given["step"]),
            "decode": lambda: pipe.vae.decode(*given["decode"]),
            "picture": functools.partial(draw, task.steps),
            "warm-up": functools.partial(draw, 1),
            "glimpse": functools.partial(glimpse, pipe, task.size),
        }
    )


def open_without_compiler(task: Task) -> Calls:
    """What somebody has who installed no C++ compiler."""
    native.compiler = lambda: None
    native.attempt.cache_clear()
    return open_ours(task, "cpu")


def our_step(pipe: StableDiffusion, given: Sequence[Tensor]) -> Tensor:
    with pipe.call.halves(alike=True):  # whoever doubles the latents says so: here it is `inputs`
        return pipe.unet(*given)


def our_picture(pipe: StableDiffusion, size: int, steps: int) -> Tensor:
    images = pipe.generate(PROMPT, steps=steps, cfg_scale=SCALE, seed=SEED, height=size, width=size, sampler="ddim")
    return torch.from_numpy(np.asarray(images[0], np.float32))


def glimpse(pipe: StableDiffusion, size: int) -> Tensor:
    """The picture that stable-diffusion.cpp draws in one Euler step from the highest noise to none, as bytes [H, W, C].

    Its latents are noise of deviation sigma, over the variance-preserving ones here by 1 / sqrt(abar).
    """
    side, abar = size // pipe.config.vae.downsampling, alphas_cumprod()[FIRST_TIMESTEP]
    x = noise(1, pipe.config.vae.z_channels, side, side, seed=SEED) * (1 - abar) ** 0.5
    denoise = Guided(pipe.unet, Conditions(pipe.encode_prompts([PROMPT], [""]), SCALE))
    x0 = predict_x0(x, denoise(x, torch.tensor(FIRST_TIMESTEP)), abar)
    return ((pipe.decode(x0)[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round()


# ---- diffusers


def open_diffusers(
    task: Task, channels_last: bool = False, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> Calls:
    from bench.reference.oracles import ddim_scheduler, diffusers_pipeline

    ours = load(task)
    theirs = diffusers_pipeline(ours, ddim_scheduler()).to(dtype)
    if channels_last:
        theirs.unet.to(memory_format=torch.channels_last)
        theirs.vae.to(memory_format=torch.channels_last)
    if compiled:
        compile_frozen(theirs)
    given = inputs(ours.config, task.size)
    x, t, context = (part.to(dtype) if part.is_floating_point() else part for part in given["step"])
    latents = given["decode"][0].to(dtype)
    draw = functools.partial(
        their_picture, ours.tokenizer(["", PROMPT], ours.config.text.max_length), theirs, task.size
    )
    return calls_of(
        {
            "step": lambda: theirs.unet(x, t, encoder_hidden_states=context, return_dict=False)[0],
            "decode": lambda: theirs.vae.decode(latents, return_dict=False)[0],
            "picture": functools.partial(draw, task.steps),
            "warm-up": functools.partial(draw, 1),
        }
    )


def compile_frozen(theirs) -> None:
    """torch.compile with the weights as constants, which oneDNN then packs for its kernels."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    theirs.unet.forward = torch.compile(theirs.unet.forward, dynamic=False, fullgraph=True)
    theirs.vae.decode = torch.compile(theirs.vae.decode, dynamic=False, fullgraph=True)


def their_picture(tokens: Tensor, theirs, size: int, steps: int) -> Tensor:
    """We tokenize for both; everything after that is theirs."""
    negative, positive = theirs.text_encoder(tokens).last_hidden_state.chunk(2)
    result = theirs(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        guidance_scale=SCALE,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(SEED),
    )
    return torch.from_numpy(np.asarray(result.images[0], np.float32))


# ---- OpenVINO


class Positional(nn.Module):
    """A model of diffusers as a function of tensors alone, as converters want it."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *tensors: Tensor) -> Tensor:
        return getattr(self.model, self.method)(*tensors, return_dict=False)[0]


def open_openvino(task: Task, precision: str = "f32", int8: bool = False) -> Calls:
    """int8: the UNet's weights and activations, by NNCF's post-training quantization on calls of random numbers."""
    from bench.reference.oracles import diffusers_unet, diffusers_vae

    pipe = load(task)
    given = inputs(pipe.config, task.size)
    unet = diffusers_unet(pipe.unet, pipe.config.unet)
    vae = diffusers_vae(pipe.vae, pipe.config.vae)
    del pipe
    decode = by_openvino(vae, "decode", given["decode"], task, precision)
    return calls_of({"step": by_openvino(unet, "forward", given["step"], task, precision, int8), "decode": decode})


def by_openvino(
    model: nn.Module, method: str, arguments: tuple[Tensor, ...], task: Task, precision: str, int8: bool = False
) -> Callable[[], Tensor]:
    """A method of a model, converted for these arguments' shapes and compiled for the CPU in a precision.

    By way of a file, as it is deployed: compiled from memory it would keep PyTorch's weights beside its own.
    """
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        converted = openvino.convert_model(Positional(model, method), example_input=arguments)
        converted.reshape({i: list(argument.shape) for i, argument in enumerate(arguments)})
        if int8:
            converted = quantized_by_nncf(converted, arguments)
        openvino.save_model(converted, path, compress_to_fp16=False)
        del converted
        common.free_memory(torch.device("cpu"))
        compiled = openvino.compile_model(path, "CPU", options)
    arrays = [argument.numpy() for argument in arguments]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def quantized_by_nncf(model, arguments: Sequence[Tensor], calls: int = 4):
    """Static int8 with a range a tensor, calibrated on the arguments and others like them at other timesteps."""
    import nncf

    x, t, context = (argument.numpy() for argument in arguments)
    samples = [(x * (1 + 0.1 * i), np.asarray(t * 0 + 200 * i + 100), context) for i in range(calls)]
    return nncf.quantize(model, nncf.Dataset(samples), subset_size=calls, fast_bias_correction=True)


# ---- stable-diffusion.cpp


class Stopwatch:
    """What stable-diffusion.cpp's log tells of a picture: when it samples and decodes, and the memory meanwhile."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def hear(self, message: str) -> None:
        if "generating image:" in message or "decoding" in message:
            reset_peak()
            self.started = time.perf_counter()
        for sign, part in (("sampling completed", "step"), ("decode_first_stage completed", "decode")):
            if sign in message:
                self.seconds[part] = time.perf_counter() - self.started
                self.peaks[part] = resident()["VmHWM"]


def open_sdcpp(task: Task, wtype: str) -> Calls:
    """One step and the decoder of one picture, timed by the log: it has no call for either."""
    import stable_diffusion_cpp as cpp

    model = cpp.StableDiffusion(
        model_path=str(task.checkpoint),
        wtype=wtype,
        n_threads=task.threads,
        vae_decode_only=True,
        rng_type="cpu",  # PyTorch's numbers
        verbose=False,
    )
    watch = Stopwatch()

    @cpp.sd_log_callback
    def hear(level, text, data):
        watch.hear(text.decode(errors="replace"))

    cpp.sd_set_log_callback(hear, None)
    draw = functools.partial(sdcpp_picture, model, task.size)
    waiting: dict[str, Run] = {}

    def run(part: str, _keep=hear) -> Run:  # the library does not keep the callback alive
        if part not in waiting:
            output = draw()
            waiting.update({each: Run(watch.seconds[each], watch.peaks[each], output) for each in ("step", "decode")})
        return waiting.pop(part)

    return {part: functools.partial(run, part) for part in ("step", "decode")}


def sdcpp_picture(model, size: int) -> np.ndarray:
    abar = alphas_cumprod()[FIRST_TIMESTEP]
    images = model.generate_image(
        PROMPT,
        width=size,
        height=size,
        cfg_scale=SCALE,
        sample_method="euler",
        sigmas=f"{((1 - abar) / abar) ** 0.5},0",
        sample_steps=1,
        seed=SEED,
    )
    return np.asarray(images[0].convert("RGB"), np.float32)


# ---- the engines by name, and their process


NNCF = "nncf==3.4.0"
DIFFUSERS, OPENVINO, SDCPP = "diffusers==0.42.1", "openvino==2026.4.1", "stable-diffusion-cpp-python==0.4.7"

ENGINES = {
    "plain": Engine("ours, plain", open_ours),
    "diffusers": Engine("diffusers, eager", open_diffusers, DIFFUSERS),
    "diffusers-cl": Engine(
        "diffusers, channels_last", functools.partial(open_diffusers, channels_last=True), DIFFUSERS
    ),
    "diffusers-compiled": Engine(
        "diffusers, channels_last, compiled, frozen",
        functools.partial(open_diffusers, channels_last=True, compiled=True),
        DIFFUSERS,
    ),
    "diffusers-bf16": Engine(
        "diffusers, bf16, eager", functools.partial(open_diffusers, dtype=torch.bfloat16), DIFFUSERS
    ),
    "diffusers-bf16-cl": Engine(
        "diffusers, bf16, channels_last",
        functools.partial(open_diffusers, channels_last=True, dtype=torch.bfloat16),
        DIFFUSERS,
    ),
    "diffusers-bf16-compiled": Engine(
        "diffusers, bf16, channels_last, compiled, frozen",
        functools.partial(open_diffusers, channels_last=True, compiled=True, dtype=torch.bfloat16),
        DIFFUSERS,
    ),
    "openvino-bf16": Engine("OpenVINO, bf16", functools.partial(open_openvino, precision="bf16"), OPENVINO),
    "openvino-int8": Engine(
        "OpenVINO, int8 by NNCF, bf16 else", functools.partial(open_openvino, precision="bf16", int8=True), NNCF
    ),
    "ours-pytorch": Engine("ours, cpu, no C++ compiler", open_without_compiler),
    "openvino": Engine("OpenVINO, f32", open_openvino, OPENVINO),
    "sdcpp-f16": Engine("stable-diffusion.cpp, f16", functools.partial(open_sdcpp, wtype="f16"), SDCPP),
    "sdcpp-q8_0": Engine("stable-diffusion.cpp, q8_0", functools.partial(open_sdcpp, wtype="q8_0"), SDCPP),
    "sdcpp-f32": Engine("stable-diffusion.cpp, f32", functools.partial(open_sdcpp, wtype="f32"), SDCPP),
}


def find(name: str) -> Engine:
    """A key of ENGINES, or `ours:OPTS`, this project with optimizations. Raises ValueError."""
    if name.startswith("ours:"):
        opts = name.removeprefix("ours:")
        return Engine(f"ours, {opts}", functools.partial(open_ours, opts=opts))
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}; there are ours, {', '.join(ENGINES)}")
    return ENGINES[name]


def serve(pipe: Connection, task: Task) -> None:
    """Open the engine, send Opened; then for each part received send a Run. A failure is sent as one line."""
    try:
        torch.set_num_threads(task.threads)
        with torch.inference_mode():
            start = time.perf_counter()
            calls = find(task.engine).open(task)
            common.free_memory(torch.device("cpu"))
            pipe.send(Opened(time.perf_counter() - start, resident()["VmHWM"]))
            while part := pipe.recv():
                pipe.send(calls[part]())
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send(next(iter(f"{type(error).__name__}: {error}".splitlines()), "")[:200])


def write_checkpoint(weights: str, path: Path) -> None:
    """`random` or `tiny` weights in the original layout, in fp32."""
    common.load_pipeline(weights, torch.device("cpu"), torch.float32).save(path)
