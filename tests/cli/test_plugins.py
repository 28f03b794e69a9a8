"""`gradtrace plugins` lists what is installed, and writes the package of a new adapter.

That the package installs and passes its tests is in tests/test_installed_plugins.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from gradtrace.cli.plugins import COLUMNS, command
from gradtrace.scaffold import checked_name, render

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"

ADAPTERS = """
class Spline:
    name, ops = "spline", ("spline_eval", len)
    def claims(self, call): return False
    def factors(self, call, adjoint): raise NotImplementedError

class Namesake(Spline):
    ops = "splines of every kind"

class Fragile(Spline):
    def __init__(self): raise OSError("no licence server")

class Halfway:
    name = "halfway"
"""
ENTRIES = """[gradtrace.adapters]
spline = acme_spline:Spline
spline-2 = acme_spline:Namesake
broken = acme_spline:Missing
fragile = acme_spline:Fragile
halfway = acme_spline:Halfway
leaving = acme_exit:Adapter
gone = acme_gone:Adapter
"""


def install(folder: Path) -> str:
    """Puts a distribution of somebody else's into `folder`, as pip would; the code that makes it importable."""
    (folder / "acme_spline.py").write_text(ADAPTERS)
    (folder / "acme_exit.py").write_text("raise SystemExit(4)")
    information = folder / "acme_spline-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-spline\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text(ENTRIES)
    return f"import sys\nsys.path.insert(0, {str(folder)!r})"


# ---------------------------------------------------------------------- list


def test_built_in_adapters_are_listed_with_their_origin(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("plugins", "list", "--json").stdout)}
    linear = rows["linear"]
    assert tuple(linear) == COLUMNS
    assert linear["distribution"] == "gradtrace"
    assert linear["version"]
    assert linear["origin"] == "gradtrace_plugins.linear:LinearAdapter"
    assert "matmul" in linear["ops"][0]
    assert linear["error"] is None


def test_plugins_that_fail_are_named_and_the_others_go_on(shell: Shell, tmp_path: Path) -> None:
    result = shell("plugins", "list", "--json", prelude=install(tmp_path))
    assert result.returncode == 0
    rows = {row["origin"].rpartition(":")[2]: row for row in json.loads(result.stdout)}
    assert rows["Spline"]["ops"] == ["len", "spline_eval"]
    assert rows["Namesake"]["ops"] == ["splines of every kind"]
    assert (rows["Spline"]["distribution"], rows["Spline"]["version"]) == ("acme-spline", "1.2")
    assert rows["Missing"]["error"].startswith("AttributeError")
    assert rows["Fragile"]["error"] == "OSError: no licence server"
    assert rows["Halfway"]["error"] == "It is no adapter: `Halfway` has no claims and no factors."
    errors = {row["name"]: row["error"] for row in json.loads(result.stdout)}
    assert errors["gone"].startswith("ModuleNotFoundError")
    assert errors["leaving"] == "SystemExit: 4"
    assert errors["linear"] is None
    assert "The adapter 'gone' of acme-spline cannot be used: ModuleNotFoundError" in result.stderr
    assert "2 adapters are named 'spline'" in result.stderr


# ---------------------------------------------------------------------- new


def test_a_package_is_written_and_nothing_is_overwritten(cli: Cli, tmp_path: Path) -> None:
    written = cli("plugins", "new", "acme-spline", "--into", tmp_path / "deep" / "down")
    folder = tmp_path / "deep" / "down" / "acme-spline"
    assert written.exit_code == 0
    assert {Path(line) for line in written.stdout.splitlines()} == {p for p in folder.rglob("*") if p.is_file()}
    assert f"cd {folder} && pip install" in written.stderr
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert all("$" not in text for text in before.values())
    assert 'acme-spline = "acme_spline:AcmeSplineAdapter"' in before[folder / "pyproject.toml"]

    again = cli("plugins", "new", "acme-spline", "--into", tmp_path / "deep" / "down")
    assert again.exit_code == 1
    assert again.stdout == ""
    assert "there is something already. Nothing was written" in again.stderr
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before


def test_the_package_goes_into_the_current_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("plugins", "new", "acme-spline").exit_code == 0
    assert (tmp_path / "acme-spline" / "src" / "acme_spline" / "__init__.py").is_file()


def test_what_is_no_folder_is_told(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    beneath = cli("plugins", "new", "acme-spline", "--into", tmp_path / "file" / "deeper")
    assert beneath.exit_code == 1
    assert "there is something already" in beneath.stderr


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Spline Eval!", "Try 'spline-eval'"),
        ("SplineEval", "Try 'spline-eval'"),
        ("spline_eval", "Try 'spline-eval'"),
        ("9lives", "Try 'lives'"),
        ("../up", "Try 'up'"),
        ("Ελλ", "Try 'my-adapter'"),
        ("", "Try 'my-adapter'"),
        ("linear", "An adapter named 'linear' is installed already, by gradtrace"),
        ("numpy", "such as 'acme-numpy'"),
        ("class", "such as 'acme-class'"),
        ("json", "such as 'acme-json'"),
    ],
)
def test_a_name_that_cannot_be_used_is_a_usage_error_with_a_way_out(
    cli: Cli, tmp_path: Path, name: str, advice: str
) -> None:
    result = cli("plugins", "new", "--into", tmp_path, "--", name)
    assert result.exit_code == 2
    assert advice in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_template_is_used_and_says_what_to_change() -> None:
    pages = render(checked_name("acme-spline"))
    assert sorted(pages) == ["README.md", "pyproject.toml", "src/acme_spline/__init__.py", "tests/test_adapter.py"]
    assert pages["src/acme_spline/__init__.py"].count("CHANGE") == 4
    assert pages["tests/test_adapter.py"].count("CHANGE") == 2
    assert "licen" not in "".join(pages.values()).lower()  # the author's to choose


# ---------------------------------------------------------------------- the group


def test_alone_it_shows_its_help(cli: Cli) -> None:
    shown = cli("plugins")
    assert shown.stdout == ""
    for name in ("list", "new"):
        assert f"  {name} " in shown.stderr


def test_every_command_and_option_is_documented() -> None:
    text = PAGE.read_text()
    for name, one in command.commands.items():
        assert f"`gradtrace plugins {name}" in text
        options = [option for p in one.params if isinstance(p, click.Option) for option in p.opts]
        assert options
        assert [option for option in options if option not in text] == []
