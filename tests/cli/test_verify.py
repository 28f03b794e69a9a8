"""`gradtrace verify` says whether a run is whole, and gives up what is damaged when it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.store.reading.opened import open_run
from tests.store.sound import lay_out

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-verify.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "run.zarr")


def test_a_whole_run_is_well(cli: Cli, path: Path) -> None:
    result = cli("verify", path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "all is well" in result.stderr
    assert json.loads(cli("verify", path, "--json").stdout) == []


def test_what_a_kill_left_is_told_and_removed(cli: Cli, path: Path) -> None:
    (path / "steps" / ".c.0.123.partial").write_bytes(b"half")
    result = cli("verify", path, "--json")
    assert result.exit_code == 0, "it does no harm"
    assert [row["severity"] for row in json.loads(result.stdout)] == ["leftover"]
    repaired = cli("verify", path, "--repair")
    assert repaired.exit_code == 0
    assert "partial" in repaired.stderr
    assert not list(path.rglob("*.partial"))
    assert "Nothing was to be repaired" in cli("verify", path, "--repair").stderr


def test_damage_is_exit_code_1_until_it_is_repaired(cli: Cli, path: Path) -> None:
    chunk = sorted((path / "steps/w4/gradient").glob("c.1*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:20])
    result = cli("verify", path, "--csv")
    assert result.exit_code == 1
    assert "damage,steps,w4/gradient" in result.stdout
    assert open_run(path).committed["steps"] == 10
    repaired = cli("verify", path, "--repair")
    assert repaired.exit_code == 0, repaired.stdout
    assert open_run(path).committed["steps"] == 4
    assert cli("verify", path).exit_code == 0


@pytest.mark.parametrize("root", ["", "{", "[]"])
def test_what_is_no_run_is_said(cli: Cli, tmp_path: Path, root: str) -> None:
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "run.zarr" / "zarr.json").write_text(root)
    result = cli("verify", tmp_path / "run.zarr")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["verify", "--help"], terminal_width=80, prog_name="gradtrace")
    assert f"```text\n{done.stdout}```" in REFERENCE.read_text(encoding="utf-8")
