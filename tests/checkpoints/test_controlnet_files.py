"""Files of ControlNets: each layout is the same network, all tensors are used or named, hostile ones are one line."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.reference.oracles import diffusers_controlnet
from bench.reference.weights import original_layout, random_controlnet, schedule_buffers
from sd.checkpoints.errors import CheckpointError
from sd.controlnet import ControlNet
from sd.pipeline import StableDiffusion
from tests.weights import SHALLOW, random_models, shallow_pipeline

WITH_MIDDLE = ("time_embed.", "input_blocks.", "middle_block.")


@pytest.fixture(scope="module")
def net() -> ControlNet:
    return random_controlnet(SHALLOW, seed=5)


@pytest.fixture
def pipe() -> StableDiffusion:
    return shallow_pipeline()


def bare(net: ControlNet) -> dict[str, Tensor]:
    return dict(net.state_dict())


def original(net: ControlNet) -> dict[str, Tensor]:
    return {f"control_model.{name}": tensor for name, tensor in net.state_dict().items()}


def diffusers(net: ControlNet) -> dict[str, Tensor]:
    return dict(diffusers_controlnet(net, SHALLOW.unet).state_dict())


LAYOUTS = {"original": original, "without its prefix": bare, "diffusers": diffusers}


def added(pipe: StableDiffusion, path) -> dict[str, Tensor]:
    return pipe.controlnets.loaded[pipe.add_control(path)].state_dict()


def error_of(pipe: StableDiffusion, path) -> str:
    with pytest.raises(CheckpointError) as caught:
        pipe.add_control(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 700
    assert not pipe.controlnets.files
    return message


# ---- what opens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "pickle"])
def test_each_layout_is_the_same_network(pipe, net, tmp_path, layout, dtype, write):
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in layout(net).items()}
    write(tensors if write is save_file else {"state_dict": tensors}, path := tmp_path / "net.bin")
    loaded = added(pipe, path)
    assert loaded.keys() == net.state_dict().keys()
    assert all(torch.equal(loaded[name], t.to(dtype).float()) for name, t in net.state_dict().items())


def test_within_a_whole_checkpoint_the_rest_is_named(pipe, net, tmp_path, caplog):
    others = {**original_layout(random_models(SHALLOW)), **schedule_buffers()}
    torch.save({"state_dict": {**others, **original(net)}}, path := tmp_path / "whole.pth")
    with caplog.at_level(logging.WARNING):
        loaded = added(pipe, path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())
    assert "whole.pth: left out, since they are no part of a ControlNet: alphas_cumprod, betas, " in caplog.text
    assert f"and {len(others) - 8} more" in caplog.text


def test_a_tensor_too_many_is_named(pipe, net, tmp_path, caplog):
    save_file({**diffusers(net), "mystery.weight": torch.zeros(1)}, path := tmp_path / "net.safetensors")
    added(pipe, path)
    assert "mystery.weight" in caplog.text


@pytest.mark.parametrize("from_file", [True, False])
def test_differences_are_added_to_the_checkpoints_weights(net, shallow_checkpoint, tmp_path, from_file):
    """Also beside a LoRA or an edit of the UNet, which are no part of the checkpoint."""
    pipe = StableDiffusion.load(shallow_checkpoint, "cpu") if from_file else shallow_pipeline()
    plain = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    tensors = {
        f"control_model.{name}": (t.double() - plain[name].double()).float() if name.startswith(WITH_MIDDLE) else t
        for name, t in net.state_dict().items()
    }
    save_file({**tensors, "difference": torch.ones(1)}, path := tmp_path / "difference.safetensors")
    if from_file:
        pipe.unet.input_blocks[1][0].in_layers[2].weight.mul_(3)
    for name, tensor in added(pipe, path).items():
        assert torch.allclose(tensor, net.state_dict()[name], rtol=1e-6, atol=1e-6), name


def test_beside_an_inpainting_model_it_sees_the_latents(net, tmp_path):
    pipe = shallow_pipeline(in_channels=9)
    save_file(original(net), path := tmp_path / "net.safetensors")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in added(pipe, path).items())
    loaded = pipe.controlnets.loaded["net"]
    given = torch.randn(2, 9, 8, 8), torch.tensor(541), torch.randn(2, 77, 64), torch.zeros(2, 32, 8, 8)
    expected = net(given[0][:, :4], *given[1:])
    assert all(torch.equal(a, b) for a, b in zip(loaded(*given), expected, strict=True))


def test_differences_beside_an_inpainting_model(net, tmp_path):
    pipe = shallow_pipeline(in_channels=9)
    save_file({**original(net), "difference": torch.ones(1)}, path := tmp_path / "difference.safetensors")
    first, own = "input_blocks.0.0.weight", pipe.unet.state_dict()
    assert torch.allclose(added(pipe, path)[first], net.state_dict()[first] + own[first][:, :4])


def test_names_tell_files_apart(pipe, net, tmp_path):
    paths = [tmp_path / folder / "net.safetensors" for folder in ("a", "b", "c")]
    for path in paths:
        path.parent.mkdir()
        save_file(original(net), path)
    assert [pipe.add_control(path) for path in (*paths, paths[1])] == ["net", "net-2", "net-3", "net-2"]
    pipe.remove_controls("net-2")
    with pytest.raises(ValueError, match=r"no ControlNet 'net-2' was added; is it 'net-3'\? there are net, net-3"):
        pipe.remove_controls("net-2")
    assert pipe.add_control(paths[1]) == "net-2"
    pipe.remove_controls()
    assert not pipe.controlnets.files
    assert not pipe.controlnets.loaded


# ---- what does not


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_missing_or_misshapen_tensor_is_named_as_the_file_has_it(pipe, net, tmp_path, layout):
    tensors = layout(net)
    for name in list(tensors)[::9]:
        save_file({k: v for k, v in tensors.items() if k != name}, path := tmp_path / "missing.safetensors")
        assert f"lacks 1 of {len(tensors)} tensors: {name}" in error_of(pipe, path)
        save_file({**tensors, name: torch.zeros(3, 5, 7)}, path := tmp_path / "shape.safetensors")
        assert f"{name} is (3, 5, 7), not " in error_of(pipe, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(pipe, net, tmp_path, value):
    bad = net.zero_convs[1][0].bias.clone()
    bad[3] = value
    save_file({**original(net), "control_model.zero_convs.1.0.bias": bad}, path := tmp_path / "bad.safetensors")
    assert "control_model.zero_convs.1.0.bias holds NaN or infinite" in error_of(pipe, path)


OTHERS = {
    "SDXL": ({"label_emb.0.0.weight": 1, "control_model.zero_convs.0.0.weight": 1}, "Stable Diffusion XL"),
    "SDXL of diffusers": ({"add_embedding.linear_1.weight": 1, "controlnet_mid_block.weight": 1}, "Diffusion XL"),
    "Flux": ({"controlnet_x_embedder.weight": 1, "controlnet_blocks.0.weight": 1}, "Stable Diffusion 3 or Flux"),
    "Control-LoRA": ({"lora_controlnet": 1, "input_hint_block.0.weight": 1}, "a Control-LoRA"),
    "LLLite": ({"lllite_unet_input_blocks_1.down.0.weight": 1}, "a ControlNet-LLLite"),
    "T2I-Adapter": ({"adapter.body.0.in_conv.weight": 1}, "a T2I-Adapter"),
    "IP-Adapter": ({"image_proj.norm.weight": 1, "ip_adapter.1.to_k_ip.weight": 1}, "an IP-Adapter"),
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": 1}, "a LoRA: name it with --lora"),
    "checkpoint": ({"model.diffusion_model.out.2.bias": 1}, "a checkpoint: name it with --ckpt"),
    "anything": ({"a\x1b[31mb": 1}, "holds no ControlNet: a [31mb"),
    "nothing": ({}, "holds no ControlNet: it is empty"),
}


@pytest.mark.parametrize(("names", "words"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_called_by_their_name(pipe, tmp_path, names, words):
    save_file({name: torch.zeros(1) for name in names}, path := tmp_path / "other.safetensors")
    assert words in error_of(pipe, path)


def test_one_for_another_text_encoder_is_told(pipe, tmp_path):
    wide = random_controlnet(replace(SHALLOW, unet=replace(SHALLOW.unet, context_dim=1024)))
    save_file(diffusers_controlnet(wide, replace(SHALLOW.unet, context_dim=1024)).state_dict(), path := tmp_path / "2")
    assert "a ControlNet for Stable Diffusion 2.x: its text is 1024 wide, the model's 64" in error_of(pipe, path)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def strided(net: ControlNet) -> dict:
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in original(net).items()}


HOSTILE: dict[str, Callable[[ControlNet], object]] = {
    "code": lambda net: {**original(net), "control_model.zero_convs.0.0.bias": Evil()},
    "sizes that the file does not hold": strided,
    "integers": lambda net: {name: tensor.int() for name, tensor in original(net).items()},
    "complex numbers": lambda net: {name: tensor.to(torch.complex64) for name, tensor in original(net).items()},
    "sparse": lambda net: {name: tensor.to_sparse() for name, tensor in original(net).items()},
    "a difference of words": lambda net: {**original(net), "control_model.time_embed.0.bias": "1"},
    "a list": lambda net: [1, 2],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_one_line(pipe, net, tmp_path, content):
    torch.save(content(net), path := tmp_path / "hostile.pth")
    error_of(pipe, path)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_file_that_is_cut_off_is_one_line(pipe, net, tmp_path, layout):
    save_file(layout(net), path := tmp_path / "cut.safetensors")
    whole = path.read_bytes()
    for length in (0, 4, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        error_of(pipe, path)
