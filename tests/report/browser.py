"""Chromium without a window and without a network, and what its console says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--force-prefers-reduced-motion"),
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Without one the test is skipped; in continuous integration it fails."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        said = "reports are tested in a browser: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(found[1])))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path) -> None:
    """Opens the page; its pictures are drawn when this returns."""
    driver.get(page.as_uri())


def complaints(driver: Any) -> list[str]:
    """What the console was told since the last time."""
    return [entry["message"] for entry in driver.get_log("browser")]
