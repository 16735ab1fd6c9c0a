"""What smaller claims of the documents stand on: `python bench/asides.py batches previews`.

batches    four pictures alone over four in a batch, by the demo model: why a CPU draws one by one
previews   what the fit to the demo model takes, and one preview
controls   a guided step with a ControlNet over one without, random weights of SD 1.5's shapes
lora       what merging one into SD 1.5's shapes takes
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from bench import common, fidelity
from bench.reference.numbers import noise
from bench.reference.weights import random_controlnet
from sd import optimizations
from sd.config import SD15
from sd.controlnet import ControlNet
from sd.guidance import Conditions, Guided, Residuals
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.previews import Previews

ROUNDS = 7


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(over: Callable[[], object], under: Callable[[], object]) -> str:
    """Of what two calls take, one after the other: the median of some rounds, and their spread."""
    over(), under()
    found = [seconds(over) / seconds(under) for _ in range(ROUNDS)]
    return f"{statistics.median(found):.2f}x [{min(found):.2f}, {max(found):.2f}]"


def draw(pipe: StableDiffusion, numbers: Sequence[int]) -> None:
    pipe.generate([fidelity.PROMPTS[i] for i in numbers], steps=12, seed=list(numbers))


def batches() -> Iterator[str]:
    for names in ("none", "cpu"):
        pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
        optimizations.apply(pipe, names)
        found = ratio(lambda: [draw(pipe, [i]) for i in range(4)], lambda: draw(pipe, range(4)))  # noqa: B023
        yield f"four alone over four in a batch, --opt {names}: {found}"


def previews() -> Iterator[str]:
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
    fits = [seconds(lambda: Previews(pipe)) for _ in range(ROUNDS)]
    show, latents = Previews(pipe), noise(1, pipe.config.vae.z_channels, 16, 16)
    shown = [seconds(lambda: show(latents)) for _ in range(10 * ROUNDS)]
    yield f"the fit {statistics.median(fits):.3f} s, one preview {1e3 * statistics.median(shown):.2f} ms"


def controls() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        save_file(random_controlnet(SD15).state_dict(), path := Path(folder, "net.safetensors"))
        for names in ("none", "cpu", "cpu-bf16,cpu"):
            pipe = common.random_pipeline(SD15)
            optimizations.apply(pipe, names)
            net = pipe.controlnets.loaded[pipe.add_control(path)]
            for side in (256, 512):
                found = _beside(pipe, net, side // 8)
                yield f"--opt {names}, a step with a ControlNet over one without, {side}x{side}: {found}"
            del pipe, net


def _beside(pipe: StableDiffusion, net: ControlNet, grid: int) -> str:
    x, context = noise(1, 4, grid, grid), noise(2, 77, pipe.config.unet.context_dim)
    with torch.inference_mode():
        residuals = (Residuals(net, net.seen(noise(1, 3, 8 * grid, 8 * grid).sigmoid())),)
        plain = Guided(pipe.unet, Conditions(context, 7.5), pipe.call)
        both = Guided(pipe.unet, Conditions(context, 7.5, residuals=residuals), pipe.call)
        return ratio(lambda: both(x, 541), lambda: plain(x, 541))


def lora() -> Iterator[str]:
    pipe = common.random_pipeline(SD15)
    tensors = {}
    for i, (name, layer) in enumerate(pipe.unet.named_modules()):
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = noise(4, layer.in_features, seed=i)
            tensors[f"{key}.lora_up.weight"] = noise(layer.out_features, 4, seed=i)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, path := Path(folder, "a.safetensors"))
        first = seconds(lambda: pipe.add_lora(path))
    again = [seconds(lambda: pipe.set_lora("a", 0.5 + i / 10)) for i in range(ROUNDS)]  # noqa: B023
    out = seconds(pipe.remove_loras)
    yield (
        f"a LoRA of rank 4 in SD 1.5's {len(tensors) // 2} attention layers, whose weights no file has: the first time "
        f"{first:.2f} s, another strength {statistics.median(again):.2f} s, taken out {out:.2f} s"
    )


ASIDES = {one.__name__: one for one in (batches, previews, controls, lora)}


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in ASIDES]:
        print(f"asides.py: no {unknown[0]}; there are {', '.join(ASIDES)}", file=sys.stderr)
        return 2
    for name in names or ASIDES:
        for line in ASIDES[name]():
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
