"""Pictures that clients send: none is decoded before its turn, and none that is too large at all."""

import base64
import io
import json
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from bench.reference.weights import tiny_pipeline
from sd.config import Config
from sd.service import orders, uploads
from sd.service.app import create_app
from sd.service.orders import Limits, Order, read_order
from sd.service.uploads import read_upload
from sd.service.worker import FailedError
from tests.service.support import JSON, NDJSON, InstantPipe, WaitingPipe, event, serving


def in_base64(image: Image.Image, kind: str = "PNG", **options: object) -> str:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return base64.b64encode(data.getvalue()).decode()


def test_it_is_decoded_when_its_turn_comes(monkeypatch):
    decoded: list[str] = []
    upright = uploads.Upload.decode

    def decode(upload: uploads.Upload) -> Image.Image:
        decoded.append(threading.current_thread().name)
        return upright(upload)

    monkeypatch.setattr(uploads.Upload, "decode", decode)
    pipe = WaitingPipe()
    asked = {"prompt": "x", "init_image": in_base64(Image.new("RGB", (64, 64)))}
    with serving(create_app(pipe)) as client, client.open("POST", "/generate", asked, accept=NDJSON) as first:
        pipe.began.get(timeout=120)
        with client.open("POST", "/generate", asked, accept=NDJSON) as second:
            assert event(second)["event"] == "waiting"
            assert len(decoded) == 1
            pipe.finish.release(2)
            first.read(), second.read()
    assert len(decoded) == 2
    assert all(name.startswith("draw") for name in decoded)


def test_damaged_pixels_are_told_when_its_turn_comes():
    whole = base64.b64decode(in_base64(Image.effect_noise((64, 64), 9)))
    damaged = base64.b64encode(whole[: len(whole) // 2]).decode()
    with serving(create_app(InstantPipe())) as client:
        asked = {"prompt": "x", "init_image": damaged}
        assert client.error("POST", "/generate", asked) == (422, "init_image is a damaged picture")
        lines = client.draw(NDJSON, **asked)[2].splitlines()
        assert json.loads(lines[-1]) == {"event": "error", "status": 422, "error": "init_image is a damaged picture"}
        assert client.draw()[0] == 200


def test_a_head_says_what_is_too_large():
    gray = Image.fromarray(np.zeros((2100, 2100), np.uint16))
    with pytest.raises(ValueError, match=r"2100x2100 of the kind I;16: at most 2048x2048 pixels"):
        read_upload("mask", in_base64(gray))
    with pytest.raises(ValueError, match=r"4200x4100 of the kind 1: at most 4096x4096"):
        read_upload("mask", in_base64(Image.new("1", (4200, 4100))))
    assert read_upload("mask", in_base64(Image.new("L", (2100, 2100)))).size == (2100, 2100)


def test_an_icon_is_refused_without_decoding_it(monkeypatch):
    """Its head says 64x64 of a picture that may have any size."""
    data = io.BytesIO()
    Image.new("L", (2000, 2000)).save(data, "PNG")
    inner = data.getvalue() + bytes(2**17)  # with a length whose bytes a TGA cannot begin with
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inner), 22)
    Image.init()  # its plugins make pictures of their own
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(ValueError, match=r"^init_image cannot be read as a picture$"):
        read_upload("init_image", base64.b64encode(head + inner).decode())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_is_that_of_the_upright_picture(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = in_base64(Image.new("RGB", (100, 50)), kind, exif=exif)
    upload = read_upload("init_image", turned)
    assert upload.size == upload.decode().size == (50, 100)
    order = {"prompt": "x", "init_image": turned, "outpaint": "0,0,0,900"}
    assert read_order(json.dumps(order).encode(), Limits(), Config()).uploads[0].size == (50, 100)
    with pytest.raises(FailedError, match="outpaint: at most"):
        read_order(json.dumps(order | {"outpaint": "0,0,0,960"}).encode(), Limits(), Config())


def ordered(size: tuple[int, int], limits: Limits = Limits(), **asked: object) -> Order:  # noqa: B008 (frozen)
    """size: width and height of the picture."""
    body = {"prompt": "x", "init_image": in_base64(Image.new("L", size)), **asked}
    return read_order(json.dumps(body).encode(), limits, Config())


@pytest.mark.parametrize(
    "asked",
    [
        {"outpaint": "0,99999,99999,0", "height": 64},
        {"outpaint": "0,0,60000,0", "height": 64},
        {"outpaint": "0,60000,0,0", "width": 64},
        {"outpaint": "0,60000,0,0", "height": 64, "width": 64},
    ],
)
def test_a_canvas_has_the_same_limit_whatever_size_is_asked_for(asked):
    with pytest.raises(FailedError, match=r"^outpaint: at most 1024 pixels of a side are drawn here, not \d+$"):
        ordered((64, 64), **asked)


def test_a_canvas_is_drawn_no_larger_than_the_limit_when_it_is_rounded_up():
    with pytest.raises(FailedError, match="at most 1000 pixels of a side are drawn here, not 960x1024"):
        ordered((900, 900), Limits(max_side=1000), outpaint="80,0,0,0")
    assert ordered((900, 900), Limits(max_side=1000), outpaint="60,0,0,0", height=512, width=512)


@pytest.mark.parametrize(
    ("size", "most", "asked", "message"),
    [
        ((2000, 500), 512, {}, "at most 512 pixels of a side are drawn here, not 256x1024"),
        ((2000, 500), 512, {"height": 192}, "at most 512 pixels of a side are drawn here, not 192x768"),
        ((2000, 500), 1024, {"hires": 2}, "hires makes 2048 pixels of a side, and at most 1024 are drawn here"),
        ((500, 2000), 1024, {"width": 192, "hires": 1.5}, "hires makes 1152 pixels of a side"),
        ((512, 512), 1000, {"hires": 1.9}, None),
        ((512, 512), 1000, {"hires": 1.95}, "hires makes 1024 pixels of a side, and at most 1000"),
    ],
)
def test_the_limit_is_that_of_what_a_picture_makes_drawn(size, most, asked, message):
    if message is None:
        assert ordered(size, Limits(max_side=most), **asked)
        return
    with pytest.raises(FailedError, match=message) as refused:
        ordered(size, Limits(max_side=most), **asked)
    assert refused.value.status == 422


def test_what_a_limit_does_not_concern_is_drawn():
    assert ordered((2000, 500), Limits(max_side=512), height=128, width=512)
    mask = in_base64(Image.new("L", (64, 64), 255))
    assert ordered((2000, 500), Limits(max_side=512), mask=mask, mask_padding=8), "a part, at the model's own size"


@pytest.mark.parametrize("asked", [{}, {"height": 64}, {"width": 128}, {"outpaint": "0,30,9,0"}, {"mask_padding": 4}])
def test_the_size_that_is_looked_at_is_the_one_that_is_drawn(asked, monkeypatch):
    pipe, image, sizes = tiny_pipeline(), Image.new("RGB", (200, 90)), []
    monkeypatch.setattr(pipe, "_draw", lambda edits, *size, **_: sizes.append(size) or [image.copy()])
    mask = {"mask": Image.new("L", (200, 90), 255)} if "mask_padding" in asked else {}
    pipe.generate("x", steps=1, init_image=image, **asked, **mask)
    upload = read_upload("init_image", in_base64(image))
    assert sizes == [orders._drawn_size(asked, upload, bool(mask), pipe.config)]


def test_no_pixel_is_decoded_for_an_order(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: 1 / 0)
    asked = {"prompt": "x", "init_image": BIG, "mask": BIG}
    order = read_order(json.dumps(asked).encode(), Limits(), Config())
    assert [one.size for one in order.uploads] == [(512, 512)] * 2


BIG = in_base64(Image.new("RGB", (512, 512)))


def test_a_body_by_its_length_is_too_long_before_it_comes():
    with serving(create_app(InstantPipe(), Limits(max_body=1000))) as client:
        for length in ("1001", "9" * 400):
            connection = client.connection()
            connection.putrequest("POST", "/generate")
            connection.putheader("Content-Type", JSON)
            connection.putheader("Content-Length", length)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status in (413, 400)
            connection.close()
