"""The page as a person meets it, drawing with the demo model: accessible, and nowhere wider than the window.

    SD_SCREENSHOTS=docs/service python -m pytest -q tests/service/test_scenes.py

writes the screenshots of docs/service.md.
"""

import re
from collections.abc import Iterator

import pytest

from tests.service.browser import PHONE, By, Keys, Page, Select, dark, needs_browser, save, violations
from tests.service.test_page import stroke

pytestmark = [pytest.mark.full(memory=False), needs_browser]

PROMPTS = (
    "a yellow banana on a purple background",
    "a green frog on a yellow background",
    "a blue car on a white background",
    "a red apple on a blue background",
)
DESK = {"width": 1200, "height": 1000, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture
def page(driver, demo) -> Page:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", DESK)
    page = Page(driver, demo)
    page.choose("sampler", "dpmpp_2m")
    page.set(steps=12, seed=4, cfg_scale=3)
    return page


@pytest.fixture
def drawn(page) -> Page:
    """With a few pictures in its history, drawn for the first scene and kept by the browser, and one of them shown."""
    if page.script("return (await all()).length") != len(PROMPTS):
        page.script("await stored('readwrite', (store) => store.clear()); await list();")
        for prompt in PROMPTS:
            page.set(prompt=prompt)
            page.draw()
    page.wait(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#history li"))
    page.button("Reuse").click()
    page.driver.find_element(By.CSS_SELECTOR, "#history .thumb").click()
    page.wait(page.pictures)
    return page


@pytest.fixture(autouse=True)
def sound(page) -> Iterator[None]:
    """Whatever the scene: nobody is kept out, nothing is cut off, and the browser complains of nothing."""
    yield
    assert violations(page) == []
    assert page.overflow() <= 0
    assert page.complaints() == []


def top(page: Page) -> None:
    page.driver.execute_script("scrollTo(0, 0); document.activeElement.blur();")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_desk(drawn, colours):
    dark(drawn.driver, colours == "dark")
    top(drawn)
    save(drawn.driver, f"desk-{colours}")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_all_sections_open(page, colours):
    dark(page.driver, colours == "dark")
    page.driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true;")
    page.driver.execute_script("at('compare').click(); note(['a note']); fail('an error');")
    page.driver.execute_script("at('lora-section').hidden = false;")
    top(page)


def test_a_phone(drawn):
    drawn.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    assert drawn.overflow() <= 0
    drawn.driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true;")
    assert drawn.overflow() <= 0, "with all sections open"
    drawn.driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = false;")
    top(drawn)
    save(drawn.driver, "phone")


def test_a_mask(drawn):
    drawn.button("Start from it").click()
    drawn.wait(lambda: drawn["init-shown"].is_displayed())
    drawn.see(drawn["mask"])
    stroke(drawn, (-0.2, -0.2), (0.2, -0.2))
    drawn.driver.execute_script("at('init-section').scrollIntoView()")
    save(drawn.driver, "mask")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_two_settings_side_by_side(page, colours):
    dark(page.driver, colours == "dark")
    page.open("Compare two settings")
    page["compare"].click()
    second = page.driver.find_element(By.CSS_SELECTOR, "[data-second=opt]")
    Select(page.see(second)).select_by_visible_text("deepcache=3")
    page.set(prompt=PROMPTS[-1])
    page.draw()
    page.wait(lambda: page["comparison"].is_displayed())
    assert re.fullmatch(r"The second: .* dB from the first", page.text("verdict"))
    assert page.text("first-caption").startswith("optimization none")
    assert page.text("second-caption").startswith("optimization deepcache=3")
    recorded = page.script("return (await all()).slice(-2).map(({parameters}) => [parameters.opt, parameters.seed]);")
    assert recorded == [[recorded[0][0], 4], ["deepcache=3", 4]]
    assert recorded[0][0] != "deepcache=3"
    page["slider"].send_keys(Keys.ARROW_RIGHT * 10)
    assert page["slider"].get_attribute("aria-valuetext") == "60% the first, the rest the second"
    top(page)
    save(page.driver, f"compare-{colours}")
