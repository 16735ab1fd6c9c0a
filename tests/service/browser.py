"""The page in headless Chromium, by what a person sees of it. Debian's chromium and chromium-driver run it."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402, F401
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

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
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs apt-get install chromium chromium-driver")


@contextmanager
def chromium(folder: Path) -> Iterator["webdriver.Chrome"]:
    """A browser whose profile and downloads are in the folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


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
        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda _: condition())

    def script(self, text: str, *arguments: object) -> object:
        """What it returns; `await` may be in it."""
        code = (
            f"const end = arguments[arguments.length - 1]; (async (...given) => {{ {text} }})(...arguments).then(end)"
        )
        return self.driver.execute_async_script(code, *arguments)

    def open(self, title: str) -> None:
        """A section of the form."""
        section = self.driver.find_element(By.XPATH, f"//summary[normalize-space()='{title}']")
        self.see(section)
        section.click()

    def see(self, element: WebElement) -> WebElement:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def button(self, text: str, number: int = 0) -> WebElement:
        return self.see(self.driver.find_elements(By.XPATH, f"//*[self::button or self::a][text()='{text}']")[number])

    def draw(self) -> None:
        """Press the button, and wait for the end of what that begins."""
        self["draw"].click()
        self.idle()

    def idle(self) -> None:
        self.wait(lambda: self["draw"].is_displayed())

    def value(self, name: str) -> str:
        return self.driver.find_element(By.NAME, name).get_property("value")

    def choose(self, name: str, text: str) -> None:
        Select(self.driver.find_element(By.NAME, name)).select_by_visible_text(text)

    def pictures(self) -> list:
        """Those whose pixels are there."""
        images = self.driver.find_elements(By.CSS_SELECTOR, "#pictures img")
        return [image for image in images if image.get_property("complete") and image.get_property("naturalWidth")]

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    def complaints(self) -> list[str]:
        """Of the browser: scripts that fail or are forbidden, resources that are missing."""
        return [line["message"] for line in self.driver.get_log("browser")]


def save(driver: "webdriver.Chrome", name: str) -> None:
    """A screenshot to look at, if $SD_SCREENSHOTS names a folder: docs/service has those of docs/service.md."""
    if folder := os.environ.get("SD_SCREENSHOTS"):
        with Image.open(io.BytesIO(driver.get_screenshot_as_png())) as image:
            image.save(Path(folder) / f"{name}.webp", quality=80, method=6)


def violations(page: Page) -> list[str]:
    """Of the rules for accessible pages, contrast among them, as axe-core finds them. Its script is a test's alone."""
    source = resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.driver.execute_script(source)
    found = page.script("return (await axe.run()).violations;")
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


def dark(driver: "webdriver.Chrome", wanted: bool = True) -> None:
    value = "dark" if wanted else "light"
    features = [{"name": "prefers-color-scheme", "value": value}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
