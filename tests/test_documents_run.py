"""Every command of the documents is run: here, by the test that is named, or it is said why not."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import noise
from bench.reference.weights import random_controlnet
from sd import convert, inference
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from tests.sparing import sparing
from tests.test_readme import DOCUMENTS, ROOT, commands

ELSEWHERE = {
    r"make( image.*)?": "makes the virtual environment that the tests run in",
    r"make (test|test-full|fuzz|bench|guide).*": "CI; tests/bench/test_bench.py, tests/bench/test_guide.py",
    r"\S*python3? -m venv.*": "of Python",
    r"modal (setup|secret.*|environment.*)": "of Modal, for an account",
    r"modal (run|deploy).*": "tests/test_modal_inference.py",
    r"\S*python sd/download.py": "tests/test_download.py",
    r"python -m sd.serve.*": "tests/service/test_serve.py",
    r"python -m sd.convert": "tests/test_convert.py",
    r"python -m pytest.*test_scenes.py": "tests/service/test_scenes.py",
    r"python train/.*": "an hour of a GPU; its parts: tests/train/test_train.py",
    r"bench/gpu.sh.*": "a GPU; its parts: tests/bench/test_bench.py",
    r"\S*python (-m )?bench[./].*": "minutes to hours, alone on a machine; their parts: tests/bench/test_bench.py",
    r"python (-m )?(bench.guide|notebooks/run.py).*": "tests/test_notebooks.py",
    r".*--opt reuse-eps=2.*": "tests/test_readme.py",
    r".*(--ckpt FP32.safetensors|--inspect FILE).*": "of a file of yours: tests/test_inspection.py",
}
"""A command -> the test that runs it or its parts, or why there is none."""

WORDS = {(document, " ".join(words)): words for document in DOCUMENTS for words in commands(document)}
COMMANDS = sorted(WORDS)


def elsewhere(command: str) -> str | None:
    return next((why for pattern, why in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)


HERE = [(document, command) for document, command in COMMANDS if elsewhere(command) is None]


def test_each_has_its_test_or_a_reason():
    assert len(COMMANDS) > 60
    ours = re.compile(r"(\.venv/bin/)?python (sd/inference\.py|-m sd\.convert IN OUT)\b.*")
    assert [pair for pair in HERE if not ours.fullmatch(pair[1])] == []
    used = {pattern for pattern in ELSEWHERE for _, command in COMMANDS if re.fullmatch(pattern, command)}
    assert set(ELSEWHERE) - used <= {r"python (-m )?(bench.guide|notebooks/run.py).*"}
    for why in ELSEWHERE.values():
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/[\w/]+\.py", why))


# ---- what they name


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With small stand-ins for all files that the documents' commands name, which fit the demo model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(DEMO_CHECKPOINT))
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
    for name in ("fox.png", "photo.jpg", "pose.png", "depth.png"):
        Image.effect_noise((128, 128), 60).convert("RGB").save(name)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    mask.save("hat.png")
    for name in ("style", "lcm-lora-sdv1-5"):
        save_file(lora(pipe), f"{name}.safetensors")
    for name in ("my-toy", "bad-hands"):
        torch.save({"string_to_param": {"*": noise(2, pipe.config.text.width)}, "name": name}, f"{name}.pt")
    net = {f"control_model.{name}": tensor for name, tensor in random_controlnet(pipe.config).state_dict().items()}
    torch.save(net, "control_sd15_canny.pth")
    for name in ("openpose", "depth"):
        save_file(net, f"{name}.safetensors")
    return tmp_path


def lora(pipe: StableDiffusion) -> dict[str, torch.Tensor]:
    name = next(name for name in pipe.unet.state_dict() if name.endswith("attn2.to_q.weight"))
    rows, columns = pipe.unet.state_dict()[name].shape
    key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    factors = {f"{key}.lora_down.weight": noise(2, columns), f"{key}.lora_up.weight": noise(rows, 2)}
    return factors | {f"<s{i}>": noise(pipe.config.text.width, seed=i) for i in (1, 2)}


@pytest.mark.parametrize(("document", "command"), sparing(HERE, lambda case: case[0] in ("docs/edits.md", "README.md")))
def test_it_draws(folder, document, command):
    if "canny" in command:
        pytest.importorskip("cv2", reason="opencv is optional")
    if "sd.convert" in command:
        assert convert.main([str(DEMO_CHECKPOINT), "out.safetensors"]) == 0
        return
    if "--prompt" not in command:  # it says something in place of drawing
        assert inference.main(WORDS[document, command][2:]) == 0
        return
    before = set(folder.iterdir())
    shorter = [] if "lcm" in command else ["--steps", "2"]
    assert inference.main([*WORDS[document, command][2:], *shorter]) == 0
    assert set(folder.iterdir()) - before
