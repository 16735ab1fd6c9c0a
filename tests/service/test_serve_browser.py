"""The service's page in a real browser, headless Chromium, drawing with the demo model.

Skipped where Debian's chromium and chromium-driver are not installed; .ci/run installs them.
"""

import pytest

from sd.pictures.png import read_parameters
from sd.service.app import create_app
from tests.service.browser import PHONE, By, Keys, Page, needs_browser
from tests.service.support import WaitingPipe, serving

SEEN = """window.seen = [];
document.getElementById("forming").addEventListener("load", (e) => window.seen.push(e.target.naturalWidth));"""

pytestmark = [pytest.mark.full(memory=False), needs_browser]


def test_a_prompt_becomes_a_picture(driver, demo, downloads):
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
    file = downloads / f"a-red-apple-{2**53 - 1}.png"
    page.wait(file.exists)
    parameters = read_parameters(file)
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("a red apple", 2**53 - 1, 4)
    assert page.overflow() <= 0
    assert page.complaints() == []


def test_several_pictures_on_a_phone(driver, demo):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    page = Page(driver, demo)
    assert page.overflow() <= 0
    page.open("More settings")
    page.set(prompt="a yellow banana", steps=2, num_images=2)
    assert page.overflow() <= 0
    page["draw"].click()
    page.wait(lambda: len(page.pictures()) == 2)
    assert all(image.rect["x"] >= 0 and image.rect["width"] <= PHONE["width"] for image in page.pictures())
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
    page.open("More settings")
    driver.find_element(By.NAME, "prompt_syntax").send_keys("plain")
    page.set(prompt="a fox " * 40 + "with a tail", steps=2)
    page["draw"].click()
    page.wait(page.pictures)
    assert driver.find_element(By.CLASS_NAME, "told").text.endswith("a fox with a tail”")
    assert page.overflow() <= 0
    assert page.complaints() == []


def test_words_that_the_model_has_not_learned_are_told(driver, demo):
    page = Page(driver, demo)
    page.set(prompt="a lighthouse", steps=1)
    page["draw"].click()
    page.wait(page.pictures)
    text = driver.find_element(By.CLASS_NAME, "told").text
    assert text.startswith("This model has not learned “lighthouse”. Near to it: “")
    driver.refresh()
    page.wait(lambda: driver.find_elements(By.CSS_SELECTOR, "#history .thumb"))
    page.see(driver.find_element(By.CSS_SELECTOR, "#history .thumb")).click()
    page.wait(page.pictures)
    assert driver.find_element(By.CLASS_NAME, "told").text == text, "out of the history, too"


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
