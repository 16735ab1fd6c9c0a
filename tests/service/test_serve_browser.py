"""The service's page in a real browser, headless Chromium, drawing with the demo model.

Skipped where Debian's chromium and chromium-driver are not installed; .ci/run installs them.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sd.pictures.png import read_parameters
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.service.app import create_app
from sd.service.orders import Limits
from tests.service.support import WaitingPipe, serving

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SEEN = """window.seen = [];
document.getElementById("forming").addEventListener("load", (e) => window.seen.push(e.target.naturalWidth));"""
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}

pytestmark = [
    pytest.mark.full(memory=False),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs apt-get install chromium chromium-driver"),
]


class Page:
    """The page in a browser, by what a person sees of it."""

    def __init__(self, driver: "webdriver.Chrome", port: int):
        self.driver = driver
        driver.get(f"http://127.0.0.1:{port}/")
        self.wait(lambda: self.text("model"))

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self[name].text

    def set(self, **values: object) -> None:
        for name, value in values.items():
            field = self.driver.find_element(By.NAME, name)
            field.clear()
            field.send_keys(str(value))

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 120, poll_frequency=0.05).until(lambda _: condition())

    def pictures(self) -> list:
        """Those whose pixels are there."""
        images = self.driver.find_elements(By.CSS_SELECTOR, "figure img")
        return [image for image in images if image.get_property("complete") and image.get_property("naturalWidth")]

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    def complaints(self) -> list[str]:
        """Of the browser: scripts that fail or are forbidden, resources that are missing."""
        return [line["message"] for line in self.driver.get_log("browser")]


@pytest.fixture
def driver(tmp_path) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,800"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def demo() -> Iterator[int]:
    with serving(create_app(StableDiffusion.load(DEMO_CHECKPOINT, "cpu"), Limits(max_steps=30))) as client:
        yield client.port


def test_a_prompt_becomes_a_picture(driver, demo, tmp_path):
    page = Page(driver, demo)
    assert page.text("model") == "emoji demo on cpu"
    page.set(steps=4, seed=2**53 - 1)
    driver.execute_script(SEEN)
    page["prompt"].send_keys("a red apple", Keys.ENTER)
    page.wait(lambda: page["bar"].get_property("value") >= 1 or page.pictures())
    page.wait(page.pictures)
    page.wait(lambda: page["draw"].is_displayed())
    [image] = page.pictures()
    assert (image.get_property("naturalWidth"), image.accessible_name) == (128, "a red apple")
    assert not page["state"].is_displayed()
    assert not page["error"].is_displayed()
    assert not page["forming"].is_displayed()
    assert driver.execute_script("return window.seen") == [16, 16], "at steps 2 and 4"
    driver.find_element(By.LINK_TEXT, "Download PNG").click()
    file = tmp_path / f"a-red-apple-{2**53 - 1}.png"
    page.wait(file.exists)
    parameters = read_parameters(file)
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("a red apple", 2**53 - 1, 4)
    save(driver, "desktop")
    assert page.overflow() <= 0
    assert page.complaints() == []


def test_several_pictures_on_a_phone(driver, demo):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    page = Page(driver, demo)
    assert page.overflow() <= 0
    driver.find_element(By.TAG_NAME, "summary").click()
    page.set(prompt="a yellow banana", steps=2, num_images=2)
    assert page.overflow() <= 0
    page["draw"].click()
    page.wait(lambda: len(page.pictures()) == 2)
    assert all(image.rect["x"] >= 0 and image.rect["width"] <= PHONE["width"] for image in page.pictures())
    save(driver, "phone")
    assert page.complaints() == []


def test_an_error_is_shown(driver, demo):
    page = Page(driver, demo)
    driver.execute_script("document.forms[0].noValidate = true")
    page.set(prompt="x", steps=31)
    page["draw"].click()
    page.wait(lambda: page["error"].is_displayed())
    assert page.text("error") == "Steps must be at most 30 here, not 31"
    assert page["draw"].is_displayed()


def test_what_of_a_prompt_is_not_read_is_shown(driver, demo):
    page = Page(driver, demo)
    driver.find_element(By.TAG_NAME, "summary").click()
    driver.find_element(By.NAME, "prompt_syntax").send_keys("plain")
    page.set(prompt="a fox " * 40 + "with a tail", steps=2)
    page["draw"].click()
    page.wait(page.pictures)
    assert driver.find_element(By.CLASS_NAME, "cut").text.endswith("a fox with a tail”")
    save(driver, "cut")
    assert page.overflow() <= 0
    assert page.complaints() == []


def test_a_drawing_is_stopped(driver):
    pipe = WaitingPipe()
    with serving(create_app(pipe)) as client:
        page = Page(driver, client.port)
        page.set(prompt="x")
        page["draw"].click()
        page.wait(lambda: page.text("text") == "step 1 of 50")
        page["stop"].click()
        assert pipe.left.get(timeout=120) == "x"
        page.wait(lambda: page["draw"].is_displayed())
        assert not page["error"].is_displayed()
        assert driver.switch_to.active_element == page["draw"]


def save(driver: "webdriver.Chrome", name: str) -> None:
    """A screenshot to look at, if $SD_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SD_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))
