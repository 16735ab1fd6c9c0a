"""What a request may name of the server's own: optimizations and LoRAs; and what a picture says, for the page."""

import base64
import io
import json
import re
from collections.abc import Iterator

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from bench.reference.weights import tiny_pipeline
from sd import serve
from sd.pictures.png import to_png
from sd.pipeline import StableDiffusion
from sd.service.app import create_app
from sd.service.offers import Offers
from sd.service.orders import Limits
from tests.service.support import JSON, Client, InstantPipe, serving


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def client(pipe) -> Iterator[Client]:
    with serving(create_app(pipe, offers=Offers(opts=("deepcache=2", "shared-halves")))) as client:
        yield client


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def said(data: bytes) -> dict[str, object]:
    return Image.open(io.BytesIO(data)).info


def test_a_request_chooses_optimizations_and_the_next_is_plain_again(pipe, client):
    wanted = {"steps": 4, "seed": 3, "height": 64, "width": 64}
    plain, fast, again = (client.draw(**wanted, **opt)[2] for opt in ({}, {"opt": "deepcache=2"}, {"opt": ""}))
    (expected,) = pipe.generate(["x"], **{**wanted, "seed": [3]})
    assert pixels(plain) == pixels(again) == expected.tobytes(), "bit for bit"
    assert pixels(fast) != pixels(plain)
    assert json.loads(said(fast)["opt"]) == "deepcache=2"
    assert json.loads(said(plain).get("opt", '""')) == ""


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        ("tgate=5", "no opt 'tgate=5' here; there are deepcache=2, shared-halves"),
        ("deepcache=3", "no opt 'deepcache=3' here; there are deepcache=2, shared-halves"),
        (3, "opt must be text, not 3"),
    ],
)
def test_no_other_optimization_comes_from_a_client(client, opt, message):
    assert client.error("POST", "/generate", {"prompt": "x", "opt": opt}) == (422, message)


def test_what_cannot_run_is_told_at_the_start(pipe):
    with pytest.raises(ValueError, match="cuda-graph"):
        create_app(pipe, offers=Offers(opts=("cuda-graph",)))


def test_what_is_no_optimization_is_told_before_a_model_is_loaded(capsys):
    assert serve.main(["--opt-choices", "deepcash=3"]) == 2
    assert capsys.readouterr().err == "error: no optimization 'deepcash'; is it 'deepcache'?\n"


def test_loras_are_names_of_the_folder(tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/ink.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    with serving(create_app(InstantPipe(), offers=Offers(lora_dir=tmp_path / "loras"))) as client:
        page = client("GET", "/")[2].decode()
        assert '<select id="lora"><option>ink</option></select>' in page
        for name in ("other", "../secret", str(tmp_path / "secret")):
            values = {"prompt": f"x <lora:{name}:1>", "prompt_syntax": "a1111"}
            status, message = client.error("POST", "/generate", values)
            assert (status, message.endswith("here; there are ink")) == (422, True)
            assert str(tmp_path / "loras") not in message


def test_a_lora_of_one_prompt_is_not_in_the_way_of_the_next_requests_optimizations(shallow_checkpoint, tmp_path):
    pipe = StableDiffusion.load(shallow_checkpoint, "cpu")
    path, changed = next((name, one) for name, one in pipe.unet.named_modules() if name.endswith("to_v"))
    rows, columns = changed.weight.shape
    key = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, columns), f"{key}.lora_up.weight": torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "ink.safetensors")
    before = changed.weight.clone()
    with serving(create_app(pipe, offers=Offers(tmp_path, ("int8-weights",)))) as client:
        ink = {"prompt": "x <lora:ink:1>", "prompt_syntax": "a1111"}
        quantized = client.draw(opt="int8-weights", seed=1)
        assert client.draw(**ink)[0] == 200
        assert not torch.equal(pipe.unet.get_submodule(path).weight, before)
        again = client.draw(opt="int8-weights", seed=1)
        assert (quantized[0], again[0]) == (200, 200), again[2]
        assert pixels(quantized[2]) == pixels(again[2]), "nothing of the LoRA is left"
        assert client.draw(**ink)[0] == 200
        assert client.draw()[0] == 200
    assert torch.equal(pipe.unet.get_submodule(path).weight, before)


# ---- POST /parameters


def asked(client: Client, data: bytes) -> dict[str, object]:
    status, _, body = client("POST", "/parameters", {"file": base64.b64encode(data).decode()}, accept=JSON)
    assert status == 200, body
    return json.loads(body)


def picture(**parameters: object) -> bytes:
    return to_png(Image.new("RGB", (8, 8)), parameters)


def test_what_a_picture_says_is_what_its_file_says(client):
    _, _, drawn = client.draw(steps=3, seed=5, cfg_scale=2.5, negative_prompt="blur")
    answer = asked(client, drawn)
    wanted = {"prompt": "x", "steps": 3, "seed": 5, "cfg_scale": 2.5, "negative_prompt": "blur"}
    assert wanted.items() <= answer["parameters"].items()
    assert answer["notes"] == []


def test_what_cannot_be_used_here_is_told(client):
    answer = asked(client, picture(prompt="x", steps=999, schedule="magic", seed=2**60, init_image="/home/a.png"))
    assert answer["parameters"] == {"prompt": "x"}
    told = "\n".join(answer["notes"])
    for words in ("steps must be at most 150 here", "schedule 'magic'", "more digits", "init_image, a file"):
        assert words in told


def test_another_model_is_told():
    with serving(create_app(InstantPipe(), facts={"checkpoint_hash": "1", "checkpoint": "a"})) as client:
        notes = asked(client, picture(prompt="x", checkpoint_hash="2", checkpoint="b.safetensors"))["notes"]
    assert notes == ["drawn with another model, 'b.safetensors': here it will look otherwise"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_texts_of_other_programs(client, kind):
    text = "a cat\nNegative prompt: a dog\nSteps: 7, Sampler: Euler, CFG scale: 4, Seed: 9, Face: yes"
    data = io.BytesIO()
    image = Image.new("RGB", (8, 8))
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        image.save(data, "png", pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
        image.save(data, kind, exif=exif)
    answer = asked(client, data.getvalue())
    wanted = {"prompt": "a cat", "negative_prompt": "a dog", "steps": 7, "sampler": "euler", "cfg_scale": 4, "seed": 9}
    assert wanted.items() <= answer["parameters"].items()
    assert "not taken over: Face yes" in answer["notes"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a", "the file is no PNG, JPEG or WebP picture"),
        (picture(), "the picture does not say how it was drawn"),
        (picture(prompt="x")[:60], "the file is no PNG, JPEG or WebP picture"),
    ],
    ids=["GIF", "without texts", "cut"],
)
def test_what_says_nothing(client, data, message):
    body = {"file": base64.b64encode(data).decode()}
    assert client.error("POST", "/parameters", body) == (422, message)


def test_parameters_are_asked_for_as_pictures_are(client):
    """No form of another page can send it, and no more than a picture's worth."""
    assert client.error("POST", "/parameters", b"file=x", Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert client.error("POST", "/parameters", {"file": 3}) == (422, "file must be a picture file in base64")
    assert client.error("GET", "/parameters")[0] == 405
    with serving(create_app(InstantPipe(), Limits(max_body=100))) as small:
        assert small.error("POST", "/parameters", {"file": "x" * 200})[0] == 413


def test_the_page_holds_all_that_it_needs(client):
    page = client("GET", "/")[2].decode()
    assert not re.findall(r"<!-- \w+ -->|/\* (?:style|scripts) \*/", page), "a place is left empty"
    assert not re.findall(r"https?://", page)
