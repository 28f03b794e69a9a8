"""The page in Chromium, from a file, without a network: it draws, answers to clicks and keys, and runs no name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import gradtrace as gt
from gradtrace.report.data import report_of
from gradtrace.report.page import page_of
from gradtrace.store.places.place import keys_at
from gradtrace.store.rows import KINDS, ParameterInfo
from gradtrace.store.writing.writer import RunWriter
from tests.report.browser import chromium, complaints, show
from tests.report.conftest import HOSTILE, HOSTILE_GROUP, NAMES
from tests.store.samples import step_row

CURVES = """return [...document.querySelectorAll("#plots .plot")].map((plot) => ({
  label: plot.getAttribute("aria-label"), names: plot.data.map((one) => one.name), first: plot.data[0].y}))"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


def written(path: Path, folder: Path) -> Path:
    page = folder / "report.html"
    page.write_text(page_of(report_of(keys_at(path))), encoding="utf-8")
    return page


@pytest.fixture
def opened(driver: Any, run_path: Path, tmp_path: Path) -> Any:
    show(driver, written(run_path, tmp_path))
    return driver


def text(driver: Any, selector: str) -> str:
    return str(driver.find_element(By.CSS_SELECTOR, selector).text)


def test_everything_is_drawn_and_nothing_complained_about(opened: Any) -> None:
    assert text(opened, "h1") == "run.zarr"
    assert len(opened.find_elements(By.CSS_SELECTOR, "#parameters tbody tr")) == 4
    assert len(opened.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")) > 5
    assert "above tolerance" in text(opened, "#parameters")
    assert "cluster-based permutation test" in text(opened, "#methods")
    assert complaints(opened) == []


def test_a_click_on_a_row_of_the_map_shows_its_spectra(opened: Any, run_path: Path) -> None:
    """The map of ranks has two rows: the vector is left out."""
    area = opened.find_element(By.CSS_SELECTOR, "#map .nsewdrag")
    height = area.size["height"]
    for share, name in ((0.75, NAMES[2]), (0.25, NAMES[0])):
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
        over = ActionChains(opened).move_to_element_with_offset(area, 0, int((share - 0.5) * height))
        over.pause(0.4).click().perform()  # two clicks at once are a double click
        assert text(opened, "#parameter-title") == name
        curves = opened.execute_script(CURVES)
        assert all(name in one["label"] for one in curves[:3])
        assert curves[0]["names"] == ["all", "diagnosis=HC", "diagnosis=SZ"]
        stored = gt.open_run(run_path).parameter(name)["gradient"].sel(group="all").values[:, 0]
        assert curves[0]["first"] == pytest.approx(stored, rel=1e-3)
    wide = "return [...document.querySelectorAll('.plot')].filter((one) => one.scrollWidth > one.clientWidth).length"
    assert opened.execute_script(wide) == 0
    assert complaints(opened) == []


def test_keys_reach_everything(opened: Any) -> None:
    chooser = opened.find_element(By.ID, "chooser")
    for _ in range(30):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        if opened.switch_to.active_element == chooser:
            break
    assert opened.switch_to.active_element == chooser
    ActionChains(opened).send_keys(Keys.HOME, Keys.DOWN).perform()
    assert text(opened, "#parameter-title") == NAMES[1]
    assert opened.find_element(By.ID, "said").get_property("textContent") == f"Showing {NAMES[1]}"
    ActionChains(opened).send_keys(Keys.TAB, Keys.TAB, Keys.ENTER).perform()
    assert text(opened, "#parameter-title") == NAMES[2]
    button = opened.find_element(By.CSS_SELECTOR, "#parameters tbody button")
    button.send_keys(Keys.ENTER)
    assert text(opened, "#parameter-title") == NAMES[0]
    assert opened.switch_to.active_element == opened.find_element(By.ID, "parameter-title")
    assert complaints(opened) == []


def test_the_table_is_sorted_and_filtered(opened: Any) -> None:
    def names() -> list[str]:
        return [row.text for row in opened.find_elements(By.CSS_SELECTOR, "#parameters tbody td:first-child")]

    head = "#parameters th:nth-child(9)"  # the tolerance
    opened.find_element(By.CSS_SELECTOR, f"{head} button").send_keys(Keys.ENTER)
    assert opened.find_element(By.CSS_SELECTOR, head).get_attribute("aria-sort") == "ascending"
    assert names() == [NAMES[2], *NAMES[:2], "frozen"]
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert opened.find_element(By.CSS_SELECTOR, head).get_attribute("aria-sort") == "descending"
    assert names() == [*NAMES, "frozen"]
    opened.find_element(By.ID, "filter").send_keys("opaque")
    assert (names(), text(opened, "#count")) == (["frozen"], "1 of 4 parameters")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(driver: Any, run_path: Path, tmp_path: Path, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(driver, written(run_path, tmp_path))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_names_stay_text(driver: Any, hostile_path: Path, tmp_path: Path) -> None:
    show(driver, written(hostile_path, tmp_path))
    chooser = driver.find_element(By.ID, "chooser")
    chooser.send_keys(Keys.HOME, Keys.DOWN)
    assert text(driver, "#parameter-title") == HOSTILE
    assert text(driver, "#plots .legendtext:not([data-unformatted='all'])")
    assert HOSTILE_GROUP in text(driver, "#plots")
    assert HOSTILE in text(driver, "#parameters")
    assert driver.execute_script("return document.scripts.length") == 3
    assert driver.find_elements(By.TAG_NAME, "img") == []
    assert complaints(driver) == []


def test_a_run_that_is_being_written_has_a_page(driver: Any, tmp_path: Path) -> None:
    infos = [ParameterInfo(name, (11, 5)) for name in NAMES]
    with RunWriter(tmp_path / "run.zarr", attrs={}, kinds=KINDS, keep=None, parameters=infos) as writer:
        show(driver, written(tmp_path / "run.zarr", tmp_path))
        assert "This run was not closed" in text(driver, "#state")
        assert "Nothing was recorded yet." in text(driver, "#map-section")
        writer.append(step_row(3, NAMES))
        writer.flush()
        show(driver, written(tmp_path / "run.zarr", tmp_path))
        assert "This run was not closed" in text(driver, "#state")
        assert text(driver, "#parameter-title") in NAMES
    assert complaints(driver) == []
