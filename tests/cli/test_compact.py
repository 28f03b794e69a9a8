"""`gradtrace compact` writes an archive that every command reads like its run, and says what it did."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.store.places.keys import Directory
from gradtrace.store.reading.opened import open_run
from tests.store.alike import assert_alike

Cli = Callable[..., Result]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-compact.md"


def test_files_and_bytes_before_and_after_are_told_on_stderr(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "archive.zarr"
    result = cli("compact", run_path, target)
    assert result.exit_code == 0
    assert result.stdout == ""
    before, after = result.stderr.splitlines()
    assert before.startswith(f"{run_path}: {len([f for f in run_path.rglob('*') if f.is_file()])} files, ")
    assert after.startswith(f"{target}: {len([f for f in target.rglob('*') if f.is_file()])} files, ")
    assert after.endswith(f"B; every value is that of {run_path}.")
    assert_alike(open_run(run_path), open_run(target))


@pytest.mark.parametrize(
    "command",
    [
        ["ls"],
        ["info", "--json"],
        ["query", "--csv"],
        ["query", "--metric", "effective_rank", "--metric", "sigma1", "--json"],
        ["query", "--metric", "cosine", "--step", ":"],
        ["query", "head.*", "--probe", "val", "--csv"],
    ],
)
def test_every_command_says_the_same_of_the_archive(
    cli: Cli, run_path: Path, tmp_path: Path, command: list[str]
) -> None:
    cli("compact", run_path, tmp_path / "archive.zarr")
    of_run, of_archive = (cli(command[0], path, *command[1:]) for path in (run_path, tmp_path / "archive.zarr"))
    assert of_archive.exit_code == of_run.exit_code
    assert of_archive.stdout.replace(str(tmp_path / "archive.zarr"), str(run_path)) == of_run.stdout
    assert of_archive.stderr == of_run.stderr


def test_what_is_there_is_left_alone(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = cli("compact", run_path, tmp_path / "out")
    assert result.exit_code == 1
    assert "something is there already" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert cli("compact", tmp_path / "nowhere.zarr", tmp_path / "new").exit_code == 1
    assert cli("compact", run_path).exit_code == 2


def test_an_interrupt_exits_with_130_and_leaves_nothing(
    cli: Cli, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Directory, key: str, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "put", interrupt)
    assert cli("compact", run_path, tmp_path / "archive.zarr").exit_code == 130
    assert not (tmp_path / "archive.zarr").exists()


def test_a_terminal_sees_how_far_it_is(run_path: Path, tmp_path: Path) -> None:
    """Both passes; the bars go when they are done."""
    ours, theirs = pty.openpty()
    code = "from gradtrace.cli import main; main()"
    command = [sys.executable, "-c", code, "compact", str(run_path), str(tmp_path / "archive.zarr")]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(theirs)
        shown = b""
        while b"every value is that of" not in shown:
            shown += os.read(ours, 65536)
        assert child.communicate()[0] == b""
    os.close(ours)
    assert b"Writing" in shown
    assert b"Comparing" in shown


def test_torch_is_not_needed(
    shell: Callable[..., subprocess.CompletedProcess[str]], run_path: Path, tmp_path: Path
) -> None:
    done = shell("compact", run_path, tmp_path / "archive.zarr", prelude="import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr


def test_the_reference_shows_the_help_as_it_is() -> None:
    done = CliRunner().invoke(main, ["compact", "--help"], terminal_width=80, prog_name="gradtrace")
    assert done.output.strip() in REFERENCE.read_text(encoding="utf-8")
