"""The documents are true: their code runs, and every command, adapter and error is in them.

Every block marked `python` runs, in order, with one namespace per page and an empty folder to work in. A comment
`<!-- python ... -->` runs too and is not shown: for what a page takes as given. `python no-run` only has to parse.
"""

from __future__ import annotations

import ast
import re
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

import gradtrace.errors

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python[^\n]*)\n(.*?)^```$|^<!-- (python)\n(.*?)^-->$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(marks, code) of the Python blocks of a page, each with as many empty lines before it as put it in its place."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        code = match[2] if match[1] else match[4]
        line = text.count("\n", 0, match.start()) + 1
        found.append((match[1] or match[3], "\n" * line + code))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for marks, code in blocks(page):
        compiled = compile(code, str(page.relative_to(ROOT)), "exec")
        if "no-run" not in marks.split():
            exec(compiled, namespace)


def test_the_first_page_is_there() -> None:
    assert (ROOT / "README.md").is_file()


def documented(word: str) -> bool:
    """Whether the word stands as code, alone or with something after it, on any page."""
    pattern = re.compile(rf"(`|^|\s){re.escape(word)}(`|\s|$)", re.MULTILINE)
    return any(pattern.search(page.read_text(encoding="utf-8")) for page in PAGES)


def commands() -> list[str]:
    from gradtrace.cli import main

    assert isinstance(main, click.Group)
    return main.list_commands(click.Context(main))


def test_every_command_is_documented() -> None:
    missing = [name for name in commands() if not documented(f"gradtrace {name}")]
    assert not missing, f"no page shows: {', '.join(f'gradtrace {name}' for name in missing)}"


def test_every_adapter_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "adapters.md").read_text(encoding="utf-8")
    ours = [e.name for e in entry_points(group="gradtrace.adapters") if e.module.startswith("gradtrace_plugins")]
    assert ours, "no built-in adapter is installed"
    assert [name for name in ours if f"`{name}`" not in page] == []


def test_every_error_is_documented() -> None:
    names = [n.name for n in ast.parse(Path(gradtrace.errors.__file__).read_text()).body if isinstance(n, ast.ClassDef)]
    assert [name for name in names if not documented(name)] == []


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
