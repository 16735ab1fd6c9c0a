"""One browser for all tests of the page, and a service that draws with the demo model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.service.app import create_app
from sd.service.offers import Offers
from sd.service.orders import Limits
from tests.service.support import serving


@pytest.fixture(scope="session")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="session")
def browser(downloads) -> Iterator:
    from tests.service.browser import chromium

    with chromium(downloads) as driver:
        yield driver


@pytest.fixture
def driver(browser) -> Iterator:
    """A window of the usual size, without what the last test left in it."""
    browser.get_log("browser")
    yield browser
    browser.get("about:blank")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="session")
def demo() -> Iterator[int]:
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
    with serving(create_app(pipe, Limits(max_steps=30), offers=Offers(opts=("deepcache=3",)))) as client:
        yield client.port
