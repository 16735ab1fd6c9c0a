"""Each part of the page in headless Chromium. What it asks for is seen by a pipeline that draws at once and remembers.

What is dropped and pasted is made by scripts, as no driver drags files; all else is clicked and typed.
"""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sd import inference
from sd.pictures.png import read_parameters, to_png
from sd.pictures.run import pictures_of
from sd.service.app import create_app
from sd.service.offers import Offers
from sd.service.orders import Limits
from tests.service.browser import By, Keys, Page, Select, needs_browser, webdriver
from tests.service.support import InstantPipe, WaitingPipe, serving

pytestmark = [pytest.mark.full(memory=False), needs_browser]

DROP = """const [selector, kind, files] = given;
const data = new DataTransfer();
for (const [name, text] of files) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  data.items.add(new File([bytes], name, {type: "image/png"}));
}
const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true, cancelable: true})
  : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
document.querySelector(selector).dispatchEvent(event);"""


class Remembering(InstantPipe):
    """What `generate` was given, the last at the end."""

    def __init__(self):
        super().__init__()
        self.config = replace(self.config, image_size=256)  # there are oblong sizes of about as many pixels
        self.asked: list[dict] = []

    def generate(self, prompts, **settings) -> list[Image.Image]:
        self.asked.append({"prompt": prompts[0], **settings})
        shade = len(self.asked) % 250
        self.image = Image.new("RGB", (8, 8), (shade, 90, 160))
        return super().generate(prompts, **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Remembering, int]]:
    loras = tmp_path_factory.mktemp("loras")
    (loras / "ink.safetensors").touch()
    pipe = Remembering()
    app = create_app(pipe, Limits(max_steps=60), offers=Offers(lora_dir=loras))
    app.state.service.drawer._previews = lambda latents: [Image.new("RGB", (8, 8))]  # there is no VAE to fit them to
    with serving(app) as client:
        yield pipe, client.port


@pytest.fixture
def page(driver, served) -> Page:
    page = Page(driver, served[1])
    page.script("await stored('readwrite', (store) => store.clear()); await list();")
    return page


@pytest.fixture
def asked(served) -> list[dict]:
    """What is drawn, from here on."""
    served[0].asked.clear()
    return served[0].asked


def png(size: tuple[int, int] = (64, 64), /, **parameters: object) -> bytes:
    return to_png(Image.linear_gradient("L").resize(size).convert("RGB"), parameters)


def drop(page: Page, selector: str, data: bytes, kind: str = "drop", name: str = "fox.png") -> None:
    page.script(DROP, selector, kind, [[name, base64.b64encode(data).decode()]])


def drawn(page: Page, prompt: str, **values: object) -> None:
    page.set(prompt=prompt, steps=2, **values)
    page.draw()


def history(page: Page) -> list[str]:
    """The prompts, the newest first."""
    return page.script("return [...document.querySelectorAll('#history li p')].map((one) => one.textContent)")


# ---- the form


def test_what_it_asks_for_is_what_the_command_draws(page, asked):
    page.set(prompt="a fox", seed=5)
    page.draw()
    [(job, _)] = pictures_of(inference.parse_arguments(["--prompt", "a fox", "--seed", "5"])[0])
    names = set(asked[0]) - {"on_step"}
    assert {name: asked[0][name] for name in names} == {
        name: getattr(job, name) for name in names if name != "seed"
    } | {
        "seed": [5],
        "negative_prompt": [""],
    }


def test_sampler_and_schedule(page, asked):
    page.choose("sampler", "dpmpp_2m")
    page.choose("schedule", "karras")
    drawn(page, "x", cfg_scale=3)
    wanted = {"sampler": "dpmpp_2m", "schedule": "karras", "cfg_scale": 3.0, "steps": 2}
    assert wanted.items() <= asked[0].items()
    assert page.complaints() == []


def test_sizes(page, asked):
    Select(page["size"]).select_by_visible_text("Landscape 320 × 192")
    drawn(page, "x")
    Select(page["size"]).select_by_visible_text("Own size")
    page.set(width=192)
    page.draw()
    Select(page["size"]).select_by_index(0)
    page.draw()
    assert [(one["width"], one["height"]) for one in asked] == [(320, 192), (192, 192), (None, None)]


def test_dice_and_lock(page, asked):
    page["dice"].click()
    seed = int(page.value("seed"))
    assert page["lock"].get_attribute("aria-pressed") == "true"
    drawn(page, "x")
    assert asked[-1]["seed"] == [seed]
    page["lock"].click()
    assert page.value("seed") == ""
    page.draw()
    page.draw()
    assert len({one["seed"][0] for one in asked}) == 3, "another one each time"
    page["lock"].click()
    assert int(page.value("seed")) == asked[-1]["seed"][0]
    page["dice"].click()
    assert int(page.value("seed")) != asked[-1]["seed"][0]


def test_a_lora_is_put_into_the_prompt(page):
    page.set(prompt="a fox")
    page.open("LoRA")
    page["lora-weight"].clear()
    page["lora-weight"].send_keys("0.7")
    page["lora-add"].click()
    assert page.value("prompt") == "a fox <lora:ink:0.7>"
    assert page.value("prompt_syntax") == "a1111"


def test_what_is_wrong_in_a_closed_section_is_opened(page):
    page.set(prompt="x")
    page.driver.execute_script("form.elements.num_images.value = 0")
    page["draw"].click()
    page.wait(lambda: page.driver.find_element(By.NAME, "num_images").is_displayed())


def test_keys(page, asked):
    page.set(prompt="x", steps=2)
    page.driver.find_element(By.NAME, "sampler").send_keys(Keys.CONTROL, Keys.ENTER)  # a browser's own Enter does not
    page.wait(page.pictures)
    page.idle()
    page["prompt"].send_keys(Keys.SHIFT, Keys.ENTER)
    assert page.value("prompt") == "x\n"
    assert len(asked) == 1


# ---- the history


def test_the_history_survives_a_reload(page, served):
    for prompt in ("a fox", "a dog"):
        drawn(page, prompt)
    assert history(page) == ["a dog", "a fox"]
    page = Page(page.driver, served[1])
    page.wait(lambda: history(page) == ["a dog", "a fox"])
    page.see(page["history"]).find_elements(By.CLASS_NAME, "thumb")[1].click()
    page.wait(page.pictures)
    assert page.pictures()[0].accessible_name == "a fox"
    assert page.complaints() == []


def test_settings_and_seeds_are_used_again(page, asked):
    page.choose("sampler", "euler")
    page.choose("schedule", "karras")
    Select(page["size"]).select_by_visible_text("Landscape 320 × 192")
    drawn(page, "a fox", negative_prompt="blur", seed=7, cfg_scale=2)
    page.driver.refresh()
    page.wait(lambda: history(page))
    page.button("Seed").click()
    assert (page.value("seed"), page.value("prompt")) == ("7", "")
    page.open("More settings")
    page.set(prompt="other", clip_skip=2, seed=1)
    page.button("Reuse").click()
    page.draw()
    assert len(asked) == 2
    assert {**asked[0], "on_step": 0} == {**asked[1], "on_step": 0}


def test_a_picture_to_start_from_is_used_again(page, asked):
    drop(page, "#init-section", png())
    page.wait(lambda: page["init-shown"].is_displayed())
    page.script("begin({x: 0.5, y: 0.5});")
    drawn(page, "a fox", seed=3)
    page.driver.refresh()
    page.wait(lambda: history(page))
    page.button("Reuse").click()
    page.wait(lambda: page.script("return done.length") == 1)
    page.draw()
    for name in ("init_image", "mask"):
        assert np.array_equal(*(np.asarray(one[name]) for one in asked))


def test_one_is_deleted_saved_and_all_are_cleared(page, downloads):
    for prompt in ("an owl", "a bee", "a cow"):
        drawn(page, prompt, seed=11)
    page.see(page.driver.find_elements(By.CLASS_NAME, "delete")[1]).click()
    page.wait(lambda: history(page) == ["a cow", "an owl"])
    page.button("Save", 1).click()
    file = downloads / "an-owl-11.png"
    page.wait(file.exists)
    assert read_parameters(file)["prompt"] == "an owl"
    page["history-clear"].click()
    page.wait(lambda: history(page) == [])
    page.driver.refresh()
    page.wait(lambda: page.text("history-count") == "empty")


def test_the_oldest_are_dropped(page):
    page.script("""for (let i = 0; i < 120; i++) {
      const parameters = {prompt: `p${i}`, seed: i};
      await stored("readwrite", (store) => store.add({blob: new Blob(), parameters, times: {}}));
    }""")
    drawn(page, "the newest")
    page.wait(lambda: len(history(page)) == 100)
    assert (history(page)[0], history(page)[-1]) == ("the newest", "p21")


# ---- a picture's settings


def test_a_picture_that_is_dropped_gives_its_settings(page, asked):
    said = {"prompt": "an owl", "steps": 9, "seed": 4, "sampler": "euler", "cfg_scale": 2.5, "mask_blur": 3.0}
    said |= {
        "checkpoint_hash": "0",
        "checkpoint": "x.ckpt",
        "width": 192,
        "height": 128,
        "hires": 99,
        "init_image": "a.png",
    }
    page.set(prompt="other", negative_prompt="stays not")
    drop(page, "header", png(**said))
    page.wait(lambda: page["notes"].is_displayed())
    for name in ("prompt", "steps", "seed", "sampler", "cfg_scale", "width"):
        assert page.value(name) == str(said[name])
    assert page.value("negative_prompt") == ""
    notes = page.text("notes").split("\n")
    assert notes[0] == "The settings are those of fox.png"
    assert any("hires must be over 1" in line for line in notes)
    assert any(line.startswith("Not taken over: init_image") for line in notes)
    page.draw()
    assert said["prompt"] == asked[0]["prompt"]
    assert not page["notes"].is_displayed()


def test_a_foreign_picture_and_what_of_it_is_unknown(page, tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text(
        "parameters", "a (red:1.2) hat\nNegative prompt: blue\nSteps: 12, Sampler: Euler a, Seed: 3, Face: yes"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png", pnginfo=text)
    page["recall"].send_keys(str(tmp_path / "foreign.png"))
    page.wait(lambda: page["notes"].is_displayed())
    assert (page.value("prompt"), page.value("negative_prompt")) == ("a (red:1.2) hat", "blue")
    assert (page.value("steps"), page.value("sampler"), page.value("prompt_syntax")) == ("12", "euler_a", "a1111")
    assert "Not taken over: Face yes" in page.text("notes")


def test_a_picture_that_says_nothing(page):
    drop(page, "main", png())
    page.wait(lambda: page["error"].is_displayed())
    assert page.text("error").startswith("The picture does not say how it was drawn")
    assert "Start from a picture" in page.text("error")


# ---- a picture to start from, and its mask


@pytest.fixture
def easel(page) -> Page:
    drop(page, "#init-section", png((80, 40)))
    page.wait(lambda: page["init-shown"].is_displayed())
    page.set(prompt="x", steps=2)
    page.see(page["mask"])
    return page


def stroke(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """By mouse, from one place of the picture to another; both are shares of its width and height from its middle."""
    box = page["mask"].size
    points = [(round(x * box["width"]), round(y * box["height"])) for x, y in (start, end)]
    actions = webdriver.ActionChains(page.driver, duration=20).move_to_element_with_offset(page["mask"], *points[0])
    actions.click_and_hold().move_to_element_with_offset(page["mask"], *points[1]).release().perform()


def painted(asked: list[dict]) -> np.ndarray:
    return np.asarray(asked[-1]["mask"].convert("L")) >= 128


@pytest.mark.parametrize("way", ["drop", "paste", "file"])
def test_a_picture_to_start_from(page, asked, way, tmp_path):
    if way == "file":
        (tmp_path / "start.png").write_bytes(png())
        page.open("Start from a picture")
        page["init-file"].send_keys(str(tmp_path / "start.png"))
    else:
        drop(page, "#init-section" if way == "drop" else "#prompt", png(), way)
    page.wait(lambda: page["init-shown"].is_displayed())
    drawn(page, "x", strength=0.3)
    assert np.array_equal(np.asarray(asked[0]["init_image"]), np.asarray(Image.open(io.BytesIO(png()))))
    assert (asked[0]["strength"], asked[0]["mask"]) == (0.3, None)
    page.see(page["init-remove"]).click()
    page.draw()
    assert asked[1]["init_image"] is None
    assert page.complaints() == []


def test_a_mask_is_painted(easel, asked):
    stroke(easel, (-0.25, 0), (0.25, 0))
    easel.draw()
    mask = painted(asked)
    assert mask.shape == (40, 80)
    assert mask[20, 16:64].all()
    rows = np.flatnonzero(mask[:, 40])
    assert (rows[0], rows[-1]) == pytest.approx((14, 25), abs=1.5), "15% of the picture's width"
    assert not mask[:8].any()
    assert not mask[:, :8].any()


def test_erase_undo_and_clear(easel, asked):
    stroke(easel, (-0.3, 0), (0.3, 0))
    easel.see(easel["erase"]).click()
    easel.see(easel["mask"])
    stroke(easel, (0, -0.3), (0, 0.3))
    easel.draw()
    erased = painted(asked)
    assert not erased[:, 40].any()
    assert erased[20, 18]
    easel.see(easel["undo"]).click()
    easel.draw()
    assert painted(asked)[20, 16:64].all()
    easel.see(easel["mask-clear"]).click()
    easel.draw()
    assert asked[-1]["mask"] is None
    easel.see(easel["undo"]).click()
    easel.draw()
    assert painted(asked)[20, 16:64].all(), "clearing is undone, too"


def test_a_mask_by_keyboard(easel, asked):
    easel.driver.execute_script("arguments[0].value = 10", easel["brush"])
    easel["mask"].send_keys(Keys.ARROW_RIGHT * 10, " ")
    assert easel["cursor"].is_displayed()
    easel.draw()
    down, right = np.nonzero(painted(asked))
    assert (right.mean(), down.mean()) == pytest.approx((0.7 * 80 - 0.5, 19.5), abs=1)
    assert len(right) == pytest.approx(np.pi * 4**2, rel=0.2), "10% of the width across"


def test_a_mask_from_a_file(easel, asked, tmp_path):
    shape = Image.new("L", (80, 40))
    shape.paste(255, (10, 5, 50, 30))
    shape.save(tmp_path / "mask.png")
    easel["mask-file"].send_keys(str(tmp_path / "mask.png"))
    easel.wait(lambda: easel["undo"].is_enabled())
    easel.see(easel.driver.find_element(By.NAME, "mask_invert")).click()
    easel.draw()
    assert np.array_equal(painted(asked), np.asarray(shape) == 255)
    assert asked[0]["mask_invert"] is True


def test_a_file_that_is_no_picture(page):
    drop(page, "#init-section", b"GIF", name="x.gif")
    page.wait(lambda: page["error"].is_displayed())
    assert page.text("error") == "X.gif cannot be read as a picture"


def test_a_picture_that_is_too_large_is_made_smaller(driver, asked, served):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    data = io.BytesIO()
    noise.save(data, "png")
    with serving(create_app(pipe := Remembering(), Limits(max_body=300_000))) as client:
        page = Page(driver, client.port)
        drop(page, "#init-section", data.getvalue())
        page.wait(lambda: page["init-shown"].is_displayed())
        assert page.text("init-note") == "Made smaller to be sent: 300 × 200."
        drawn(page, "x")
        assert pipe.asked[0]["init_image"].size == (300, 200)


# ---- what is told


def test_how_long_it_takes(driver):
    pipe = WaitingPipe()
    with serving(create_app(pipe)) as client:
        page = Page(driver, client.port)
        page.set(prompt="x", steps=50)
        page["draw"].click()
        page.wait(lambda: page.text("text") == "step 1 of 50")
        for step, left in ((11, "about 8 s"), (21, "about 3 s")):
            text = page.script(
                """const clock = new Clock();
                performance.now = () => 0;
                progress({picture: 1, pictures: 1, steps: 50, step: 1}, clock, "");
                performance.now = () => 2000;
                progress({picture: 1, pictures: 1, steps: 50, step: given[0]}, clock, "");
                return at("text").textContent;""",
                step,
            )
            assert text == f"step {step} of 50 · {left} left"
        page["stop"].click()
        page.idle()


def test_escape_ends_what_waits(driver):
    pipe = WaitingPipe()
    with (
        serving(create_app(pipe)) as client,
        client.open("POST", "/generate", {"prompt": "other"}, accept="application/x-ndjson"),
    ):
        assert pipe.began.get(timeout=30) == "other"
        page = Page(driver, client.port)
        page.set(prompt="x")
        page["draw"].click()
        page.wait(lambda: page.text("text") == "waiting: 1 before yours")
        page["prompt"].send_keys(Keys.ESCAPE)
        page.idle()
        assert not page["error"].is_displayed()
        page.wait(lambda: json.loads(client("GET", "/healthz")[2])["queue"] == 0)


def test_a_full_queue(driver):
    with (
        serving(create_app(pipe := WaitingPipe(), Limits(max_queue=0))) as client,
        client.open("POST", "/generate", {"prompt": "other"}, accept="application/x-ndjson"),
    ):
        pipe.began.get(timeout=30)
        page = Page(driver, client.port)
        page.set(prompt="x")
        page.draw()
        assert page.text("error") == "The queue is full (0 waiting); try again in 10 seconds"


def test_a_server_that_is_gone(driver):
    with serving(create_app(InstantPipe())) as client:
        page = Page(driver, client.port)
        page.set(prompt="x")
    page.draw()
    assert page.text("error") == "The server does not answer. Is it still running?"


def test_a_server_that_goes_while_it_draws(driver):
    with serving(create_app(pipe := WaitingPipe())) as client:
        page = Page(driver, client.port)
        page.set(prompt="x")
        page["draw"].click()
        pipe.began.get(timeout=30)
    page.idle()
    assert page.text("error") == "The server is being stopped; try again in a while"


BROKEN = """window.fetch = () => Promise.resolve(new Response(new ReadableStream({start(stream) {
  stream.enqueue(new TextEncoder().encode('{"event": "waiting", "before": 0}\\n'));
  if (given[0]) stream.error(new TypeError("network error")); else stream.close();
}})));"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (True, "The server does not answer. Is it still running?"),
        (False, "The connection ended before the picture was done"),
    ],
)
def test_a_connection_that_ends_too_early(page, broken, message):
    page.script(BROKEN, broken)
    page.set(prompt="x")
    page.draw()
    assert page.text("error") == message
