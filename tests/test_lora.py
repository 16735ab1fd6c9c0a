"""LoRAs beside diffusers and PEFT, on random adapters of every layout; in float64; taken out again to the bit."""

import json

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.reference.numbers import pixels, relative_error
from bench.reference.oracles import SCHEDULE, ddim_scheduler, diffusers_pipeline
from bench.reference.weights import TINY, TINY_SD2, write_safetensors
from sd import inference, model_loader, optimizations
from sd.checkpoints.lora import read_lora
from sd.model_loader import CheckpointError
from sd.optimizations import registry
from sd.pictures.png import read_parameters
from sd.pipeline import StableDiffusion
from tests.weights import random_models

DRAW = {"steps": 3, "seed": 4, "sampler": "ddim", "height": 64, "width": 64}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "tiny.safetensors"
    write_safetensors(path, random_models(TINY))
    return path


@pytest.fixture
def pipe(checkpoint) -> StableDiffusion:
    return StableDiffusion.load(checkpoint, device="cpu")


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def factors(layer: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """down and up of random numbers, about a tenth as large as the weight in all."""
    weight = layer.weight
    down = noise(rank, *weight.shape[1:], seed=seed) * weight[0].numel() ** -0.5
    return down, noise(weight.shape[0], rank, *[1] * (weight.ndim - 2), seed=seed + 1) * 0.3


def kohya(unet: nn.Module, text: nn.Module, convolutions: bool = True) -> Tensors:
    """As kohya's trainer names them, over diffusers' own module names. All of one rank: of several, diffusers 0.42
    loses the alpha of those layers whose rank is not the most frequent."""
    tensors: Tensors = {}
    for prefix, model in (("lora_unet_", unet), ("lora_te_", text)):
        for i, (name, layer) in enumerate(layers_of(model).items()):
            if prefix == "lora_te_" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            if isinstance(layer, nn.Conv2d) and not convolutions:
                continue
            rank = 3
            key = prefix + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = factors(layer, rank, seed=i)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank) / 2)
    return tensors


def peft(unet: nn.Module) -> Tensors:
    tensors: Tensors = {}
    for i, (name, layer) in enumerate(layers_of(unet).items()):
        if ".attn" in name or "conv1" in name:
            a, b = factors(layer, 2, seed=i)
            tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = a, b
    return tensors


def theirs_with(pipe: StableDiffusion, path, strength: float):
    theirs = diffusers_pipeline(pipe, ddim_scheduler())
    theirs.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [strength])
    # transformers 5.23 draws the encoder's own weights anew where an adapter wraps them.
    plain = pipe.clip.state_dict()
    for name, tensor in theirs.text_encoder.state_dict().items():
        if (own := name.replace(".base_layer", "").removeprefix("text_model.")) in plain:
            tensor.copy_(plain[own])
    return theirs


def their_pixels(theirs, pipe: StableDiffusion) -> np.ndarray:
    from sd.noise import PictureNoise

    side = 64 // pipe.config.vae.downsampling
    start = PictureNoise([DRAW["seed"]], (4, side, side), pipe.device, torch.float32)()
    picture = theirs(
        "a red fox", num_inference_steps=DRAW["steps"], guidance_scale=7.5, latents=start, height=64, width=64
    )
    return pixels(picture.images)


@pytest.fixture
def second(tmp_path) -> StableDiffusion:
    """Stable Diffusion 2, from its own layout: matrices before and after the transformers."""
    model_loader.save(tmp_path / "sd2.safetensors", TINY_SD2, *random_models(TINY_SD2, seed=2))
    return StableDiffusion.load(tmp_path / "sd2.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("family", "layout", "strength"),
    [("pipe", layout, s) for layout in ("kohya", "kohya, no convolutions", "PEFT") for s in (1.0, 0.6)]
    + [("second", "kohya", 0.6), ("second", "PEFT", 1.0)],
)
def test_pictures_are_those_of_diffusers_and_peft(request, tmp_path, family, layout, strength):
    pipe = request.getfixturevalue(family)
    plain = diffusers_pipeline(pipe, ddim_scheduler())
    text = plain.text_encoder
    tensors = peft(plain.unet) if layout == "PEFT" else kohya(plain.unet, text, layout == "kohya")
    save_file(tensors, path := tmp_path / "mine.safetensors")
    before = pixels(pipe.generate("a red fox", **DRAW))
    expected = their_pixels(theirs_with(pipe, path, strength), pipe)
    assert pipe.add_lora(path, strength) == "mine"
    drawn = pixels(pipe.generate("a red fox", **DRAW))
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(drawn - before).max() > 8, "it changes the picture"
    pipe.remove_loras()
    assert np.array_equal(pixels(pipe.generate("a red fox", **DRAW)), before)


# ---- each kind of change, against float64


def layer_and_key(pipe: StableDiffusion, path: str) -> tuple[nn.Module, str]:
    return pipe.unet.get_submodule(path), "lora_unet_" + path.replace(".", "_")


LINEAR = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV = "input_blocks.1.0.in_layers.2"


def kinds(out: int, inner: int, shape: torch.Size) -> dict[str, tuple[Tensors, Tensor]]:
    """Of a weight [out, inner, ...]: tensors, and the change that they are, written out in float64."""
    kernel = shape[2:]
    r = 3
    n = lambda *s, seed: noise(*s, seed=seed) * 0.2  # noqa: E731
    d = lambda t: t.double()  # noqa: E731
    flat = int(np.prod(shape[1:]))
    w1a, w1b, w2a, w2b = n(out, r, seed=1), n(r, flat, seed=2), n(out, r, seed=3), n(r, flat, seed=4)
    alpha = torch.tensor(1.5)
    found = {
        "hada": (
            {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": alpha},
            (d(w1a) @ d(w1b)) * (d(w2a) @ d(w2b)) * 0.5,
        )
    }
    full, whole = n(4, 2, seed=5), n(out // 4, inner // 2, *kernel, seed=6)
    blocks = torch.einsum("ab,cd...->acbd...", d(full), d(whole)).reshape(shape)
    found["lokr"] = {"lokr_w1": full, "lokr_w2": whole}, blocks
    a, b = n(out // 4, r, seed=7), n(r, flat // 2, seed=8)
    product = (d(a) @ d(b)).reshape(out // 4, inner // 2, *kernel)
    found["lokr, factored"] = (
        {"lokr_w1": full, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": alpha},
        torch.einsum("ab,cd...->acbd...", d(full), product).reshape(shape) * 0.5,
    )
    found["full"] = {"diff": n(*shape, seed=9)}, d(n(*shape, seed=9))
    if kernel:
        up, mid, down = n(out, r, 1, 1, seed=10), n(r, r, *kernel, seed=11), n(r, inner, 1, 1, seed=12)
        tucker = torch.einsum("or,rshw,si->oihw", d(up[:, :, 0, 0]), d(mid), d(down[:, :, 0, 0]))
        found["locon"] = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, tucker
    return found


def test_ranks_that_differ_by_layer(pipe, tmp_path):
    tensors, expected = {}, {}
    for i, (name, layer) in enumerate(layers_of(pipe.unet).items()):
        down, up = factors(layer, rank := 1 + i % 5, seed=i)
        key, alpha = f"lora_unet_{name.replace('.', '_')}", 0.5 + i % 3
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        delta = (up.flatten(1).double() @ down.flatten(1).double()).reshape(layer.weight.shape)
        expected[name] = layer.weight.double() + 1.3 * alpha / rank * delta
    save_file(tensors, file := tmp_path / "ranks.safetensors")
    pipe.add_lora(file, 1.3)
    merged = layers_of(pipe.unet)
    assert all(relative_error(merged[name].weight, weight) < 1e-6 for name, weight in expected.items())


@pytest.mark.parametrize("path", [LINEAR, CONV])
def test_merged_weights_in_float64(pipe, tmp_path, path):
    layer, key = layer_and_key(pipe, path)
    original = layer.weight.clone()
    for kind, (tensors, delta) in kinds(*original.shape[:2], original.shape).items():
        save_file({f"{key}.{name}": t for name, t in tensors.items()}, file := tmp_path / f"{kind}.safetensors")
        pipe.add_lora(file, 0.7)
        expected = original.double() + 0.7 * delta.reshape(original.shape)
        assert relative_error(layer.weight, expected) < 1e-6, kind
        assert relative_error(layer.weight, original) > 1e-3, kind
        pipe.remove_loras(kind)
        assert torch.equal(layer.weight, original), kind


@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize("columns", [False, True])
def test_dora(pipe, tmp_path, path, columns):
    layer, key = layer_and_key(pipe, path)
    original = layer.weight.clone()
    down, up = factors(layer, 2, seed=1)
    axis = 1 if columns else 0
    shape = [original.shape[i] if i == axis else 1 for i in range(original.ndim)]
    magnitude = noise(*shape, seed=3).abs() + 0.5
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    save_file({f"{key}.{name}": t for name, t in tensors.items()}, file := tmp_path / "dora.safetensors")
    pipe.add_lora(file, 1.0)
    moved = original.double() + (up.flatten(1).double() @ down.flatten(1).double()).reshape(original.shape)
    others = [i for i in range(original.ndim) if i != axis]
    expected = magnitude.double() * moved / moved.pow(2).sum(others, keepdim=True).sqrt()
    assert relative_error(layer.weight, expected) < 1e-6


def test_dora_against_peft(pipe, tmp_path):
    from peft import LoraConfig, get_peft_model

    layer = pipe.unet.get_submodule(LINEAR)
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False))
    model[0].weight.data.copy_(layer.weight)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True))
    part = wrapped.base_model.model[0]
    down, up = factors(layer, 2, seed=5)
    part.lora_A["default"].weight.data.copy_(down)
    part.lora_B["default"].weight.data.copy_(up)
    magnitude = part.lora_magnitude_vector["default"].weight.data.abs() + 0.3
    part.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
    name = f"unet.{LINEAR}"
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    save_file({f"{name}.{short}": t for short, t in tensors.items()}, file := tmp_path / "dora.safetensors")
    pipe.add_lora(file)
    x = noise(3, layer.in_features, seed=6)
    assert relative_error(layer(x), wrapped(x).detach()) < 1e-5


# ---- layouts


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    return {key.replace(old, new): t for key, t in tensors.items() for old, new in names.items() if old in key}


def test_every_layout_of_one_change(pipe, tmp_path):
    """The same layer, as eight kinds of files call it."""
    from sd.checkpoints.lora import diffusers_paths

    layer = pipe.unet.get_submodule(LINEAR)
    down, up = factors(layer, 2, seed=1)
    other = diffusers_paths(pipe.unet)[LINEAR]
    attention = other.removesuffix(".to_q")
    kohya_names, original = (f"lora_unet_{path.replace('.', '_')}" for path in (other, LINEAR))
    files = {
        "kohya": (f"{kohya_names}.lora_down.weight", f"{kohya_names}.lora_up.weight"),
        "original": (f"{original}.lora_down.weight", f"{original}.lora_up.weight"),
        "peft": (f"unet.{other}.lora_A.weight", f"unet.{other}.lora_B.weight"),
        "peft, bare": (f"base_model.model.{other}.lora_A.weight", f"base_model.model.{other}.lora_B.weight"),
        "peft, default": (f"unet.{other}.lora_A.default.weight", f"unet.{other}.lora_B.default.weight"),
        "diffusers": (f"unet.{other}.lora.down.weight", f"unet.{other}.lora.up.weight"),
        "processor": tuple(f"unet.{attention}.processor.to_q_lora.{part}.weight" for part in ("down", "up")),
        "first": ("unet:0:down", "unet:0:up"),
    }
    seen = []
    for name, (d, u) in files.items():
        save_file({d: down, u: up}, file := tmp_path / f"{name}.safetensors")
        pipe.add_lora(file)
        seen.append(layer.weight.clone())
        pipe.remove_loras()
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert not torch.equal(seen[0], layer.weight)


def test_the_first_published_layout_has_the_order_of_diffusers_modules(pipe):
    """cloneofsimo/lora numbered the linear layers of GEGLU and attention as diffusers 0.9 held them."""
    from sd.checkpoints.lora import layer_names

    names = layer_names(pipe.unet, pipe.clip)
    inner = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"]
    first = names["unet:0"][1].removesuffix(".attn1.to_q")
    assert [names[f"unet:{i}"][1] for i in range(5)] == [f"{first}.{part}" for part in inner]
    assert names["text_encoder:0"] == ("clip", "encoder.layers.0.self_attn.k_proj")
    assert names["text_encoder:3"] == ("clip", "encoder.layers.0.self_attn.out_proj")
    numbered = [names[key][1] for key in sorted((k for k in names if k.startswith("unet:")), key=lambda k: int(k[5:]))]
    assert numbered[-1].startswith("middle_block")
    blocks = sum(type(m).__name__ == "BasicTransformerBlock" for m in pipe.unet.modules())
    assert len(numbered) == len(set(numbered)) == 9 * blocks


def test_names_and_shapes_of_every_layer_are_diffusers(pipe):
    from sd.checkpoints.lora import diffusers_paths

    theirs = diffusers_pipeline(pipe, ddim_scheduler()).unet
    expected = {name: tuple(m.weight.shape) for name, m in layers_of(theirs).items()}
    paths = diffusers_paths(pipe.unet)
    assert {other: tuple(pipe.unet.get_submodule(path).weight.shape) for path, other in paths.items()} == expected


# ---- several, other strengths, and the end


@pytest.fixture
def files(pipe, tmp_path):
    plain = diffusers_pipeline(pipe, ddim_scheduler())
    save_file(kohya(plain.unet, plain.text_encoder), one := tmp_path / "one.safetensors")
    save_file(peft(plain.unet), two := tmp_path / "two.safetensors")
    return one, two


def weights(pipe: StableDiffusion) -> Tensors:
    parts = {"unet": pipe.unet, "clip": pipe.clip, "vae": pipe.vae}
    return {f"{part}.{name}": t.detach().clone() for part, m in parts.items() for name, t in m.state_dict().items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strengths_do_not_add_up_and_nothing_is_left(checkpoint, files, dtype):
    pipe = StableDiffusion.load(checkpoint, device="cpu", dtype=dtype)
    plain = weights(pipe)
    pipe.add_lora(files[0], 0.5)
    alone = weights(pipe)
    pipe.add_lora(files[1], 0.8)
    for strength in (0.1, -2.0, 0.0, 0.7, 0.5):
        pipe.set_lora("one", strength)
    both = weights(pipe)
    assert not same(both, alone)
    pipe.remove_loras("two")
    assert same(weights(pipe), alone)
    pipe.add_lora(files[1], 0.8)
    assert same(weights(pipe), both)
    pipe.set_lora("one", 0.0)
    pipe.set_lora("two", 0.0)
    assert same(weights(pipe), plain)
    pipe.remove_loras()
    assert same(weights(pipe), plain)
    assert pipe.as_loaded(list(weights(pipe)))


def test_weights_that_no_file_has_are_kept(files):
    pipe = StableDiffusion(TINY, *random_models(TINY, seed=3))
    plain = weights(pipe)
    pipe.add_lora(files[0])
    assert not same(weights(pipe), plain)
    pipe.remove_loras()
    assert same(weights(pipe), plain)


@pytest.mark.parametrize(
    "names", ["cpu", "exact", "fp16", "packed-qkv,kv-cache", "prepacked", "channels-last,pointwise-linear"]
)
def test_beside_optimizations(checkpoint, pipe, files, names):
    """Merged before them or after, the pictures are those of the plain model with the LoRA; undo leaves it in."""
    plain = StableDiffusion.load(checkpoint, device="cpu")
    plain.add_lora(files[0], 0.9)
    expected = pixels(plain.generate("a fox", **DRAW))
    bound = 8 if "fp16" in names else 1
    pipe.add_lora(files[0], 0.2)
    try:
        optimizations.apply(pipe, names)
    except optimizations.OptimizationError as error:
        pytest.skip(str(error))
    pipe.generate("a fox", **DRAW)
    pipe.set_lora("one", 0.9)
    assert np.abs(pixels(pipe.generate("a fox", **DRAW)) - expected).max() <= bound
    optimizations.undo(pipe)
    assert np.abs(pixels(pipe.generate("a fox", **DRAW)) - expected).max() <= 1
    pipe.remove_loras()
    untouched = StableDiffusion.load(checkpoint, device="cpu")
    assert same(weights(pipe), weights(untouched))


@pytest.mark.parametrize("names", ["bf16", "fp16"])
def test_undone_it_is_merged_into_the_weights_of_the_file(checkpoint, files, names):
    """Added in half precision, which rounds the weights under it."""
    plain, pipe = (StableDiffusion.load(checkpoint, device="cpu") for _ in range(2))
    untouched = weights(plain)
    plain.add_lora(files[0], 0.9)
    optimizations.apply(pipe, names)
    pipe.add_lora(files[0], 0.9)
    optimizations.undo(pipe)
    assert same(weights(pipe), weights(plain))
    pipe.remove_loras()
    assert same(weights(pipe), untouched)


def test_a_switch_that_fails_leaves_it_merged(checkpoint, files, monkeypatch):
    pipe = StableDiffusion.load(checkpoint, device="cpu")
    pipe.add_lora(files[0], 0.9)
    merged = weights(pipe)
    monkeypatch.setattr(registry, "_apply_one", fails_at("kv-cache", registry._apply_one))
    with pytest.raises(RuntimeError, match="kv-cache fails"):
        optimizations.apply(pipe, "bf16,packed-qkv,kv-cache")
    assert not pipe.optimizations
    assert same(weights(pipe), merged)
    pipe.remove_loras()
    assert same(weights(pipe), weights(StableDiffusion.load(checkpoint, device="cpu")))


def fails_at(name: str, apply_one):
    def apply(choice, patch):
        apply_one(choice, patch)
        if choice.name == name:
            raise RuntimeError(f"{name} fails")

    return apply


def test_weights_are_kept_no_longer_than_they_are_merged_into(files):
    pipe = StableDiffusion(TINY, *random_models(TINY, seed=3))
    for file in files:
        pipe.add_lora(file)
    pipe.remove_loras("one")
    assert pipe.loras._kept.keys() == pipe.loras.merged["two"].adapter.changes.keys()
    pipe.remove_loras()
    assert not pipe.loras._kept


def test_quantized_weights_are_refused_with_the_order_that_works(pipe, files):
    pipe.add_lora(files[0])
    merged = weights(pipe)
    optimizations.apply(pipe, "int8-weights")
    for call in (lambda: pipe.add_lora(files[1]), lambda: pipe.set_lora("one", 0.5), pipe.remove_loras):
        with pytest.raises(ValueError, match="by int8-weights: undo the optimizations, change LoRAs, apply again"):
            call()
    optimizations.undo(pipe)
    assert same(weights(pipe), merged)


# ---- what a file says, and what is wrong with it


def test_what_fits_nothing_is_named(pipe, tmp_path, caplog):
    layer, key = layer_and_key(pipe, LINEAR)
    down, up = factors(layer, 2, seed=1)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    more = {f"lora_unet_no_such_layer.lora_{part}.weight": noise(2, 2, seed=3) for part in ("down", "up")}
    more["other"] = noise(2, seed=4)
    tags = json.dumps({"folder": {"red fox": 7, "1girl": 31}})
    save_file(tensors | more, path := tmp_path / "odd.safetensors", metadata={"ss_tag_frequency": tags})
    with caplog.at_level("INFO", logger="sd"):
        pipe.add_lora(path)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "odd.safetensors changes 1 layers; left out" in line and "no_such_layer" in line and "other" in line
        for line in said
    )
    assert "odd.safetensors was trained with: 1girl, red fox" in said


def broken(pipe: StableDiffusion) -> dict[str, tuple[Tensors, str]]:
    layer, key = layer_and_key(pipe, LINEAR)
    down, up = factors(layer, 2, seed=1)
    good = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    text_key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    wide = {f"{text_key}.lora_down.weight": noise(2, 2048, seed=1), f"{text_key}.lora_up.weight": noise(32, 2, seed=2)}
    return {
        "empty": ({}, "holds no LoRA: it is empty"),
        "no LoRA": ({"a": up, "b": down}, "holds no LoRA: a, b"),
        "no layer of it": (renamed(good, {key: "lora_unet_elsewhere"}), "changes no layer of this model"),
        "half of it": ({f"{key}.lora_down.weight": down}, "a part is missing"),
        "another shape": (good | {f"{key}.lora_up.weight": up[:-1]}, r"do not fit a weight of \(32, 32\)"),
        "SDXL's text": (wide, "it is for Stable Diffusion XL"),
        "SDXL": (renamed(good, {key: "lora_te1_text_model"}), "a LoRA for Stable Diffusion XL"),
        "NaN": (good | {f"{key}.lora_up.weight": up * float("nan")}, "NaN or infinite"),
        "whole numbers": (good | {f"{key}.lora_up.weight": up.int()}, "not a plain tensor"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "empty",
        "no LoRA",
        "no layer of it",
        "half of it",
        "another shape",
        "SDXL's text",
        "SDXL",
        "NaN",
        "whole numbers",
    ],
)
def test_wrong_files_change_nothing(pipe, tmp_path, what):
    tensors, message = broken(pipe)[what]
    before = weights(pipe)
    save_file(tensors, path := tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        pipe.add_lora(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert same(weights(pipe), before)
    assert not pipe.loras.merged


def test_names_that_are_there_or_not(pipe, files):
    pipe.add_lora(files[0])
    with pytest.raises(ValueError, match="called one is merged already: set_lora"):
        pipe.add_lora(files[0])
    for call in (lambda: pipe.set_lora("two", 1.0), lambda: pipe.remove_loras("two")):
        with pytest.raises(ValueError, match="no LoRA 'two' is merged; there are one"):
            call()


def test_pickled_files_run_nothing(pipe, files, tmp_path):
    torch.save(load_file(files[1]), path := tmp_path / "two.pt")
    adapter = read_lora(path, pipe.unet, pipe.clip)
    assert adapter.changes.keys() == read_lora(files[1], pipe.unet, pipe.clip).changes.keys()


# ---- the command line


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--prompt", "a fox", "--steps", "2", "--seed", "1", "--height", "64", "--width", "64", "--device", "cpu"]
    return lambda *more: inference.main([*shared, "--ckpt", str(checkpoint), *map(str, more)])


def test_the_command_merges_records_and_finds_them_again(run, files, tmp_path, checkpoint):
    assert run("--out", "plain.png") == 0
    assert run("--out", "with.png", "--lora", f"{files[0]}:0.5", "--lora", files[1]) == 0
    assert not np.array_equal(pixels(tmp_path / "with.png"), pixels(tmp_path / "plain.png"))
    said = read_parameters(tmp_path / "with.png")["loras"]
    assert [(name, weight) for name, _, weight in said] == [("one.safetensors", 0.5), ("two.safetensors", 1.0)]
    again = ["--from-png", "with.png", "--ckpt", str(checkpoint), "--out", "again.png"]
    assert inference.main(again) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "with.png").read_bytes()
    files[0].rename(tmp_path / "gone.safetensors")
    assert inference.main(again) == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("nothing.safetensors", "--lora: there is no file nothing.safetensors"),
        ("nothing.safetensors:0.5", "--lora: there is no file nothing.safetensors"),
        ("one.safetensors:nan", "--lora: a strength must be a finite number, not nan"),
        ("one.safetensors:much", "--lora: there is no file one.safetensors:much"),
    ],
)
def test_what_is_no_lora_is_said_before_a_model_is_loaded(run, files, capsys, monkeypatch, option, message):
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("it is loaded"))
    assert run("--lora", option) == 2
    assert message in capsys.readouterr().err


# ---- what LoRAs bring beside changes


def test_four_steps_of_a_latent_consistency_lora(pipe, tmp_path):
    """As published: the UNet alone, convolutions too, alpha an eighth of the rank."""
    plain = diffusers_pipeline(pipe, ddim_scheduler())
    tensors = {k: t for k, t in kohya(plain.unet, nn.Module()).items() if k.startswith("lora_unet_")}
    save_file(tensors, path := tmp_path / "lcm-lora.safetensors")
    theirs = theirs_with(pipe, path, 1.0)
    theirs.scheduler = LCMScheduler(**{key: value for key, value in SCHEDULE.items() if key != "timestep_spacing"})
    generator = torch.Generator().manual_seed(4)
    shared = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64}
    expected = pixels(theirs("a red fox", generator=generator, **shared).images)
    pipe.add_lora(path)
    drawn = pixels(pipe.generate("a red fox", steps=4, cfg_scale=1, seed=4, sampler="lcm", height=64, width=64))
    assert np.abs(drawn - expected).max() <= 1


def test_words_that_a_file_teaches(pipe, tmp_path):
    layer = pipe.unet.get_submodule(LINEAR)
    down, up = factors(layer, 2, seed=1)
    vectors = {f"<s{i}>": 0.1 * noise(pipe.config.text.width, seed=i) for i in (1, 2)}
    save_file({"unet:0:down": down, "unet:0:up": up, **vectors}, file := tmp_path / "first.safetensors")
    before = pipe.encode_prompts(["a <s1><s2> fox"], None)
    pipe.add_lora(file)
    assert torch.equal(pipe.words.vectors(), torch.stack([vectors["<s1>"], vectors["<s2>"]]))
    with_words = pipe.encode_prompts(["a <s1><s2> fox"], None)
    assert relative_error(with_words, before) > 1e-3
    pipe.remove_loras()
    assert not pipe.words
    assert torch.equal(pipe.encode_prompts(["a <s1><s2> fox"], None), before)
    save_file({"unet:0:down": down, "unet:0:up": up, "<s1>": torch.zeros(1024)}, file)
    with pytest.raises(CheckpointError, match="<s1> has vectors of 1024"):
        pipe.add_lora(file)
