"""The file: nothing fetched, nothing that a name could break out of, and not too large."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradtrace.errors import GradtraceError
from gradtrace.plots.look import PALETTE
from gradtrace.report.data import report_of
from gradtrace.report.page import _asset, embedded, page_of, plotly_script
from gradtrace.store.places.place import keys_at
from tests.report.conftest import HOSTILE, HOSTILE_GROUP


class Parts(HTMLParser):
    """Scripts by their type, the policy, the title, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.policy, self.inside, self.addresses, self.title = "", "", list[str](), ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named, self.inside = dict(attrs), tag
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append((named.get("type"), ""))
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + text)
        elif self.inside == "title":
            self.title += text


@pytest.fixture(scope="module")
def parts(hostile_path: Path) -> Parts:
    return Parts(page_of(report_of(keys_at(hostile_path), title=HOSTILE)))


def test_names_stay_data(parts: Parts) -> None:
    (kind, text), *scripts = parts.scripts
    assert kind == "application/json"
    assert not set("<>&") & set(text)
    data = json.loads(text)
    assert data["parameters"][1]["name"] == HOSTILE
    assert data["shown"][1] == HOSTILE_GROUP
    assert [kind for kind, _ in scripts] == [None, None]
    assert parts.title == HOSTILE
    assert "img" not in parts.tags


def test_only_its_own_scripts_may_run_and_nothing_may_be_fetched(parts: Parts) -> None:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in parts.scripts[1:]]
    rules = dict(rule.strip().split(" ", 1) for rule in parts.policy.split(";"))
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert rules["default-src"] == "'none'"
    assert [one for one in parts.addresses if not re.match(r"#|data:,$", one)] == []


def test_text_never_becomes_markup() -> None:
    own = "".join(map(_asset, ("plots.js", "tables.js", "parameter.js", "page.js")))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|https?:", own)


def test_what_is_embedded_is_the_same_again() -> None:
    data = {"a": [1.5, None, "é\u2028<&>"], HOSTILE: "\ud800"}
    assert json.loads(embedded(data)) == data
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded({"a": float("nan")})


def test_colours_are_those_of_the_pictures() -> None:
    (listed,) = re.findall(r"COLOURS = \[(.*?)\]", _asset("plots.js"))
    assert set(re.findall(r"#\w{6}", listed)) == set(PALETTE)


def test_most_of_a_small_page_is_plotly(hostile_path: Path) -> None:
    assert len(page_of(report_of(keys_at(hostile_path)))) < len(plotly_script()) + 300_000


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(GradtraceError, match=r'pip install "gradtrace\[report\]"'):
        plotly_script()
