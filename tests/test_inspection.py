"""`--inspect FILE`: any file is named, with how to use it; nothing in it runs."""

import time

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel
from safetensors.torch import load_file, save_file

from sd import inference
from sd.checkpoints.errors import CheckpointError
from sd.inspection import inspect
from sd.pipeline import DEMO_CHECKPOINT
from tests.weights import shallow_pipeline, tiny_pipeline


def told(path) -> dict[str, str]:
    lines = inspect(path).splitlines()
    assert all(line.isprintable() for line in lines)
    return {
        name: text.strip() for name, _, text in (line.partition(" ") for line in lines if not line.startswith("left"))
    }


@pytest.fixture
def tensors(tmp_path):
    shallow_pipeline().save(tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors")


def test_a_checkpoint(tmp_path, tensors):
    more = {"v_pred": torch.zeros(0), "model_ema.decay": torch.zeros(1), "lora_te_x.alpha": torch.zeros(1)}
    save_file({name: t.half() for name, t in {**tensors, **more}.items()}, tmp_path / "a.safetensors")
    said = told(tmp_path / "a.safetensors")
    assert said["kind"] == "a checkpoint of Stable Diffusion 1.x: text encoder, UNet and VAE"
    assert said["prediction"] == "v (velocity)"
    count = sum(t.numel() for t in tensors.values())
    assert said["numbers"] == f"{count:,} in float16, in {len(tensors)} tensors"
    assert "--ema takes it" in said["averaged"]
    assert said["missing"] == "nothing"
    assert said["use"] == f"--ckpt {tmp_path}/a.safetensors"
    assert "left over   lora_te_x.alpha" in inspect(tmp_path / "a.safetensors")


def test_an_incomplete_checkpoint(tmp_path, tensors):
    gone = "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file({name: t for name, t in tensors.items() if name != gone}, tmp_path / "a.safetensors")
    assert told(tmp_path / "a.safetensors")["missing"] == gone


def test_an_inpainting_model(tmp_path):
    tiny_pipeline(unet={"in_channels": 9}).save(tmp_path / "a.safetensors")
    said = told(tmp_path / "a.safetensors")
    assert said["kind"].startswith("an inpainting model")
    assert said["use"].endswith("--init-image PICTURE --mask MASK")


def test_the_demo_model_in_a_moment():
    start = time.process_time()
    assert told(DEMO_CHECKPOINT)["kind"].startswith("a checkpoint of emoji demo")
    assert time.process_time() - start < 5  # a guard against reading it all, not a benchmark


def lora(width: int = 768) -> dict[str, torch.Tensor]:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    return {
        f"{layer}.lora_down.weight": torch.zeros(4, width),
        f"{layer}.lora_up.weight": torch.zeros(320, 4),
        f"{text}.lora_down.weight": torch.zeros(8, 768),
        f"{text}.lora_up.weight": torch.zeros(3072, 8),
        "<s1>": torch.zeros(768),
        "strange": torch.zeros(1),
    }


def test_a_lora(tmp_path):
    metadata = {"ss_tag_frequency": '{"a": {"a fox": 20, "snow": 3}}'}
    save_file(lora(), tmp_path / "a.safetensors", metadata=metadata)
    said = told(tmp_path / "a.safetensors")
    assert said["kind"] == "a LoRA for Stable Diffusion 1.x"
    assert said["changes"] == "1 layers of the text encoder, 1 layers of the UNet"
    assert (said["rank"], said["words"], said["triggers"]) == ("4 to 8", "<s1>", "a fox, snow")
    assert "left over  strange" in inspect(tmp_path / "a.safetensors")
    assert said["use"].startswith(f"--lora {tmp_path}/a.safetensors or")


@pytest.mark.parametrize(("width", "family"), [(1024, "Stable Diffusion 2.x"), (2048, "Stable Diffusion XL")])
def test_a_lora_of_another_family(tmp_path, width, family):
    save_file(lora(width), tmp_path / "a.safetensors")
    use = told(tmp_path / "a.safetensors")["use"]
    assert use == f"not here: it is for {family}" or (width == 1024 and use.endswith(f"beside a --ckpt of {family}"))


def test_controlnets(tmp_path):
    theirs = ControlNetModel(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=768,
                             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    assert told(tmp_path / "a.safetensors")["kind"] == "a ControlNet for Stable Diffusion 1.x, diffusers' layout"
    key = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    own = {"control_model.input_hint_block.0.weight": torch.zeros(16, 3, 3, 3), key: torch.zeros(320, 1024)}
    save_file({**own, "difference": torch.zeros(0)}, tmp_path / "b.safetensors")
    said = told(tmp_path / "b.safetensors")
    assert said["kind"] == "a ControlNet for Stable Diffusion 2.x, the original layout"
    assert said["weights"] == "differences to those of Stable Diffusion 1.5"
    assert said["use"] == f"--control {tmp_path}/b.safetensors:PICTURE, beside a --ckpt of Stable Diffusion 2.x"


def test_learned_words(tmp_path):
    torch.save({"string_to_param": {"*": torch.zeros(3, 768)}, "name": "x"}, tmp_path / "toy.pt")
    said = told(tmp_path / "toy.pt")
    assert said["words"] == "toy (3 vectors)"
    assert said["use"] == f"--embedding {tmp_path}/toy.pt, then the word in a prompt"
    save_file({"emb_params": torch.zeros(3, 1024)}, tmp_path / "b.safetensors")
    assert told(tmp_path / "b.safetensors")["use"].endswith("beside a --ckpt of Stable Diffusion 2.x")
    save_file({"emb_params": torch.zeros(3, 1280)}, tmp_path / "c.safetensors")
    assert "it is for Stable Diffusion XL" in told(tmp_path / "c.safetensors")["use"]


def test_taesd_and_what_is_not_ours(tmp_path):
    save_file(AutoencoderTiny().state_dict(), tmp_path / "a.safetensors")
    assert told(tmp_path / "a.safetensors")["kind"] == "TAESD's decoder"
    others = {
        "conditioner.embedders.0.x": "Stable Diffusion XL",
        "model.diffusion_model.joint_blocks.0.x": "Stable Diffusion 3",
        "double_blocks.0.img_attn.qkv.weight": "Flux",
        "unet.down_blocks.0.resnets.0.conv1.weight": "one model of the diffusers layout",
        "first_stage_model.encoder.conv_in.weight": "of Stable Diffusion's parts only vae",
        "a.b": "nothing that is known here",
    }
    for name, kind in others.items():
        save_file({name: torch.zeros(1)}, tmp_path / "b.safetensors")
        assert told(tmp_path / "b.safetensors")["kind"] == kind


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


def test_nothing_runs_and_errors_are_one_line(tmp_path, capfd):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.ckpt").write_text("a fox")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "empty").write_bytes(b"")
    save_file({"a\x1b[31mb": torch.zeros(1)}, tmp_path / "codes.safetensors")
    for name, message in {
        "evil.pt": "refuses to run builtins.print",
        "text.ckpt": "not a checkpoint",
        "model.gguf": "a GGUF file, whose weights are quantized for other programs",
        "empty": "an empty file",
        "none": "no such file",
    }.items():
        with pytest.raises(CheckpointError, match=message) as error:
            inspect(tmp_path / name)
        assert str(error.value).isprintable()
        assert inference.main(["--inspect", str(tmp_path / name)]) == 2
    out, errors = capfd.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 5
    assert inference.main(["--inspect", str(tmp_path / "codes.safetensors")]) == 0
    assert "\x1b" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["LoRA", "ControlNet"])
def test_numbers_in_the_place_of_matrices(tmp_path, kind):
    """The width of the text is told by what has one."""
    names = {"LoRA": "lora_unet_x_attn2_to_k.lora_down.weight", "ControlNet": "control_model.x.attn2.to_k.weight"}
    tensors = {names[kind]: torch.tensor(1.0), "control_model.input_hint_block.0.weight": torch.ones(1)}
    save_file(tensors if kind == "ControlNet" else {names[kind]: torch.tensor(1.0)}, tmp_path / "a.safetensors")
    assert kind in inspect(tmp_path / "a.safetensors")
