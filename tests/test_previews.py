"""What a picture looks like while it forms: the linear map, TAESD beside diffusers, terminals, files, animations."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import noise, relative_error
from sd import inference, optimizations
from sd.checkpoints.errors import CheckpointError
from sd.ddpm import predict_x0
from sd.pictures import terminal
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.previews import Previews, linear, tiny_decoder
from tests.optimizations.stand_in import install
from tests.weights import shallow_pipeline

LINE = ("--prompt", "x", "--steps", "6", "--seed", "1")


# ---- latents to colours


@pytest.fixture(scope="module")
def demo() -> StableDiffusion:
    return StableDiffusion.load(DEMO_CHECKPOINT, "cpu")


def small(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=float)


def test_the_last_preview_is_the_picture_made_small(demo):
    previews, seen = Previews(demo), []
    prompt = "a blue fox on a yellow background"
    (image,) = demo.generate(
        prompt, steps=8, seed=3, sampler="ddim", on_step=lambda i, n, x: seen.append(previews(x)[0])
    )
    wanted = small(image, 16)
    errors = [np.abs(np.asarray(one, dtype=float) - wanted).mean() for one in seen]
    assert errors[-1] < 20
    assert errors[3] < 45, "the fox is there after half of the steps"
    assert np.abs(128 - wanted).mean() > 60


def test_the_map_is_the_best_linear_one(demo):
    """On another drawing than the one that it was fitted to."""
    rows, columns = np.mgrid[0:128, 0:128] / 127
    picture = torch.from_numpy(np.stack([rows, columns, 1 - rows])).float()[None] * 2 - 1
    latents = demo.vae.encode(picture)[0] * demo.config.vae.scale_factor
    means = torch.nn.functional.interpolate(picture, size=(16, 16), mode="area")
    assert (linear(demo)(latents) - means).abs().mean() < 0.15
    assert (linear(demo)(latents.flip(1)) - means).abs().mean() > 0.3, "channels are told apart"


def test_it_is_the_prediction_that_is_shown():
    pipe, seen = shallow_pipeline(), []

    def on_step(step, steps, x):
        seen.append((x.clone(), pipe.call.predicted()))

    pipe.generate("x", steps=5, seed=1, height=16, width=16, sampler="euler", on_step=on_step)
    assert relative_error(*seen[-1]) < 1e-5, "Euler's last step goes to the prediction itself"
    assert not torch.allclose(*seen[0], atol=0.1)
    assert pipe.call.predicted is None


def test_what_is_predicted_is_equation_15(monkeypatch):
    pipe, calls, predicted = shallow_pipeline(), [], []
    predict = pipe.unet.forward

    def recording(x, t, context):
        eps = predict(x, t, context)
        calls.append((x, t, eps))
        return eps

    monkeypatch.setattr(pipe.unet, "forward", recording)
    keep = lambda i, n, x: predicted.append(pipe.call.predicted())  # noqa: E731
    pipe.generate("x", steps=4, seed=1, height=16, width=16, cfg_scale=1, on_step=keep)
    abars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for (x, t, eps), x0 in zip(calls, predicted, strict=True):
        assert relative_error(x0, predict_x0(x, eps, float(abars[int(t)]))) < 1e-6


@pytest.mark.parametrize("names", ["cuda-graph,async-noise", "loop-graph", "deepcache=2", "guidance-interval"])
def test_previews_change_no_picture(monkeypatch, names):
    if "graph" in names:
        install(monkeypatch)
    pipe = shallow_pipeline()
    optimizations.apply(pipe, names)
    draw = {"steps": 4, "seed": 1, "height": 16, "width": 16}
    (plain,) = pipe.generate("x", **draw)
    previews, seen = Previews(pipe), []
    (watched,) = pipe.generate("x", **draw, on_step=lambda i, n, x: seen.append(previews(x)[0]))
    assert np.array_equal(np.asarray(plain), np.asarray(watched))
    assert len(seen) == 4
    assert all(image.size == (8, 8) for image in seen)


# ---- TAESD


@pytest.fixture(scope="module")
def theirs() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


def layouts(model: AutoencoderTiny) -> dict[str, dict[str, torch.Tensor]]:
    """diffusers' of the whole, and the decoder's own, which counts the clamp as its layer 0."""
    state = model.state_dict()
    decoder = {name.removeprefix("decoder.layers."): t for name, t in state.items() if name.startswith("decoder.")}
    own = {re.sub(r"^\d+", lambda match: str(int(match[0]) + 1), name): t for name, t in decoder.items()}
    return {"diffusers": state, "own": own}


@pytest.mark.parametrize("layout", ["diffusers", "own"])
def test_taesd_against_diffusers(theirs, tmp_path, layout):
    save_file({k: t.contiguous() for k, t in layouts(theirs)[layout].items()}, tmp_path / "taesd.safetensors")
    ours = tiny_decoder(tmp_path / "taesd.safetensors", torch.device("cpu"))
    x = 3 * noise(2, 4, 8, 8)
    with torch.no_grad():
        assert relative_error(ours(x), theirs.decode(x).sample) < 1e-5


def test_the_pickle_of_taesd(theirs, tmp_path):
    torch.save(layouts(theirs)["own"], tmp_path / "taesd_decoder.pth")
    assert tiny_decoder(tmp_path / "taesd_decoder.pth", torch.device("cpu"))(noise(1, 4, 2, 2)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("wrong", ["missing", "more", "shape", "other", "text", "none"])
def test_what_is_no_taesd(theirs, tmp_path, wrong):
    tensors = {name: t.contiguous() for name, t in layouts(theirs)["own"].items()}
    if wrong == "missing":
        del tensors["3.conv.2.bias"]
    elif wrong == "more":
        tensors["20.weight"] = torch.zeros(1)
    elif wrong == "shape":
        tensors["19.weight"] = torch.zeros(4, 64, 3, 3)
    elif wrong == "other":
        tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    if wrong == "text":
        (tmp_path / "a.safetensors").write_text("a fox")
    path = tmp_path / ("none" if wrong == "none" else "a.safetensors")
    with pytest.raises(CheckpointError, match=str(path)) as error:
        tiny_decoder(path, torch.device("cpu"))
    assert "\n" not in str(error.value)


# ---- terminals


def stripes() -> Image.Image:
    image = Image.new("RGB", (32, 32), "red")
    image.paste((0, 0, 255), (0, 16, 32, 32))
    return image


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "blocks"),
        ({"SD_PREVIEW": "sixel"}, "sixel"),
        ({"SD_PREVIEW": "nonsense"}, "blocks"),
        ({}, "blocks"),
    ],
)
def test_what_a_terminal_has(environ, kind):
    assert terminal.kind_of(environ) == kind


def test_half_blocks():
    text, rows = terminal.shown(stripes(), "blocks", 8)
    lines = text.split("\n")
    assert (rows, len(lines)) == (4, 5)
    assert re.findall(r"\x1b\[38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)m▀", lines[0]) == [("255;0;0", "255;0;0")] * 8
    assert re.findall(r"\x1b\[38;2;(\d+;\d+;\d+);48;2;(\d+;\d+;\d+)m▀", lines[3]) == [("0;0;255", "0;0;255")] * 8
    few, _ = terminal.shown(stripes(), "blocks", 8, colours=256)
    assert few.startswith("\x1b[38;5;196;48;5;196m▀")


def test_kitty():
    image = Image.effect_noise((128, 128), 50).convert("RGB")  # in several pieces
    text, rows = terminal.shown(image, "kitty", 32)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert rows == 16
    assert pieces[0][0] == "a=T,f=100,i=1,p=1,q=2,C=1,c=32,r=16,m=1"
    assert [how for how, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in pieces)
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces)))) as sent:
        assert np.array_equal(np.asarray(sent), np.asarray(image))


def test_iterm2():
    text, _ = terminal.shown(stripes(), "iterm2", 32)
    how, data = re.search(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", text).groups()
    assert "inline=1;width=32;height=16" in how
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)


def decoded_sixels(text: str) -> np.ndarray:
    """A reader of DEC's sixels, written from its description."""
    body = re.search(r"\x1bP[\d;]*q(.*)\x1b\\", text, re.DOTALL)[1]
    width, height = map(int, re.match(r'"1;1;(\d+);(\d+)', body).groups())
    pixels, palette = np.zeros((height, width, 3), dtype=int), {}
    x = top = colour = 0
    for token in re.findall(r'"[\d;]+|#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~]|[$-]', body):
        if token[0] == '"':
            continue
        if token[0] == "#":
            number, *rgb = token[1:].split(";")
            colour = int(number)
            if rgb:
                palette[colour] = [round(int(n) * 255 / 100) for n in rgb[1:]]
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            count = int(token[1:-1]) if token[0] == "!" else 1
            for bit in range(6):
                if (ord(token[-1]) - 63) >> bit & 1:
                    pixels[top + bit, x : x + count] = palette[colour]
            x += count
    return pixels


def test_sixels():
    text, rows = terminal.shown(stripes(), "sixel", 16)
    pixels = decoded_sixels(text)
    assert pixels.shape[1] == 160
    assert pixels.shape[0] <= rows * terminal.SIXEL_ROW
    assert np.abs(pixels[:60] - [255, 0, 0]).mean() < 2
    assert np.abs(pixels[-60:] - [0, 0, 255]).mean() < 2


# ---- the command


@pytest.fixture
def folder(shallow_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))
    return tmp_path


def test_a_file_that_follows_the_picture(folder, monkeypatch, capfd):
    written, save = [], Image.Image.save

    def saving(image, path, *args, **kwargs):
        save(image, path, *args, **kwargs)
        written.append(str(path))

    monkeypatch.setattr(Image.Image, "save", saving)
    assert inference.main([*LINE, "--preview", "4", "--preview-file", "new/p.jpg"]) == 0
    assert len([path for path in written if "p.jpg" in path]) == 2, "at step 4 and at the last one"
    assert Image.open("new/p.jpg").format == "JPEG"
    assert "▀" not in capfd.readouterr().err, "that is no terminal"


def test_a_terminal_sees_it(folder, monkeypatch, capfd):
    monkeypatch.setattr("sd.pictures.drawing.terminal_of", lambda stream: "blocks")
    assert inference.main([*LINE, "--preview", "2", "--num-images", "2"]) == 0
    errors = capfd.readouterr().err
    assert errors.count("▀\x1b[0m\n") == 2 * 3 * 16
    assert errors.count("\x1b[16A") == 2 * 2, "each picture begins in new rows"


@pytest.mark.parametrize("kind", ["kitty", "blocks", None])
def test_whole_pictures_are_shown_one_below_the_other(folder, monkeypatch, capfd, kind):
    monkeypatch.setattr("sd.pictures.watching.terminal_of", lambda stream: kind)
    assert inference.main([*LINE, "--show", "--num-images", "3", "--batch-size", "2"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("▀\x1b[0m\n") == (3 * 16 if kind == "blocks" else 0)
    numbers = re.findall(r"\x1b_Ga=T,f=100,i=(\d+),p=1", printed)
    assert numbers == (["1000", "1001", "1002"] if kind == "kitty" else []), "none takes another's place"
    assert printed.count("output-") == 3


@pytest.mark.parametrize("ending", ["webp", "gif", "png"])
def test_all_steps_as_an_animation(folder, ending):
    for _ in range(2):
        line = [*LINE, "--save-steps", f"a.{ending}", "--num-images", "2", "--batch-size", "2", "--overwrite"]
        assert inference.main(line) == 0
    names = [f"a.{ending}", *(f"a-{i}.{ending}" for i in (1, 2, 3))]
    for name in names:
        with Image.open(name) as film:
            assert film.n_frames == 7, "six steps and the picture"
            film.seek(6)
            last = np.asarray(film.convert("RGB"), dtype=float)
        picture = np.asarray(Image.open(f"output-{names.index(name) % 2 + 1}.png"), dtype=float)
        assert np.abs(last - picture).mean() < (1 if ending == "png" else 45)


def test_with_taesd(folder, theirs):
    save_file({k: t.contiguous() for k, t in layouts(theirs)["own"].items()}, "taesd.safetensors")
    assert (
        inference.main([*LINE, "--preview", "3", "--preview-file", "p.png", "--preview-decoder", "taesd.safetensors"])
        == 0
    )
    assert Image.open("p.png").size == (256, 256)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--preview", "0"], "--preview must be at least 1, not 0"),
        (["--preview-file", "p.png"], "--preview-file is written by previews: say how often with --preview"),
        (["--preview-decoder", "p.pth"], "ask for them with --preview or --save-steps"),
        (["--preview", "1", "--preview-file", "p.txt"], "--preview-file: p.txt must end in one of"),
        (["--save-steps", "p.mp4"], "--save-steps: p.mp4 must end in one of .webp, .gif, .png"),
        (["--preview", "1", "--preview-decoder", "none.pth"], "none.pth: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(folder, capfd, line, message):
    assert inference.main([*LINE, *line]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not list(folder.glob("*.png"))
