"""`gradtrace plot` writes every picture in every format, tells its caption, and says in words what it cannot draw."""

from __future__ import annotations

import builtins
import struct
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gradtrace.cli import main
from gradtrace.cli.plot import FORMATS, ONLY, WHAT
from gradtrace.plots import sheet
from gradtrace.plots.pictures import PICTURES
from gradtrace.store.archives.merge import merge

Cli = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli-plot.md"
BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
STUDY = """
import torch

def model():
    model = torch.nn.Sequential()
    model.add_module("encoder", torch.nn.Sequential())
    model.encoder.add_module("fc1", torch.nn.Linear(5, 11))
    model.add_module("head", torch.nn.Linear(11, 3, bias=False))
    return model

def batches():
    yield torch.randn(7, 5), torch.randn(7, 3)

def loss(output, batch):
    return (output - batch[1]).square().mean()

def groups(batch):
    return {"diagnosis": [0, 1, 0, 1, 0, 1, 1]}
"""


@pytest.fixture(scope="module")
def merged_path(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged") / "merged.zarr"
    merge({"one": run_path, "two": run_path}, path)
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.py"
    path.write_text(STUDY)
    return path


def dots(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", [what for what in WHAT if what != "graph"])
def test_every_picture_comes_in_every_format(cli: Cli, run_path: Path, tmp_path: Path, what: str, form: str) -> None:
    target = tmp_path / f"picture.{form}"
    result = cli("plot", run_path, what, "-o", target)
    assert result.exit_code == 0
    assert target.read_bytes().startswith(BEGINNINGS[form])
    assert result.stdout == ""
    assert str(tmp_path).encode() not in target.read_bytes(), "a picture holds no path"


def test_the_caption_goes_to_stderr_and_below_the_picture(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    noted, plain = tmp_path / "noted.png", tmp_path / "plain.png"
    result = cli("plot", run_path, "trajectory", "*.weight", "--metric", "sigma1", "-o", noted)
    assert "each group's own mean gradient" in result.stderr
    assert cli("plot", run_path, "trajectory", "*.weight", "--no-note", "-o", plain).stderr.strip()
    assert dots(noted)[1] > dots(plain)[1]
    assert dots(noted)[0] == round(3.5 * sheet.DPI)
    cli("plot", run_path, "trajectory", "*.weight", "--width", "page", "-o", plain)
    assert dots(plain)[0] == round(7.2 * sheet.DPI)


def test_parameters_that_were_never_measured_are_named(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    assert "Never measured: frozen." in cli("plot", run_path, "map", "-o", tmp_path / "map.png").stderr
    result = cli("plot", run_path, "map", "frozen", "-o", tmp_path / "none.png")
    assert result.exit_code == 3
    assert "Nothing matched: frozen was never measured (the op is opaque)." in result.stderr
    assert not (tmp_path / "none.png").exists()


def test_options_select_as_in_other_commands(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "picture.svg"
    asked = ["--step", "4:20", "--epoch", "1", "--kind", "adjoint", "--group", "*=SZ", "--metric", "nuclear"]
    assert cli("plot", run_path, "trajectory", "re:head", *asked, "--scale", "raw", "-o", target).exit_code == 0
    assert cli("plot", run_path, "map", "-", "-o", target, input="head.weight\n").exit_code == 0
    probe = cli("plot", run_path, "map", "--probe", "val", "--metric", "sigma1", "-o", target)
    assert probe.exit_code == 0
    assert cli("plot", run_path, "scree", "--components", 2, "-o", target).exit_code == 0
    assert cli("plot", run_path, "trajectory", "--smooth", 1, "-o", target).exit_code == 0


def test_merged_runs_are_shown_together_or_by_their_labels(cli: Cli, merged_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    assert "over 2 runs" in cli("plot", merged_path, "difference", "-o", target).stderr
    result = cli("plot", merged_path, "map", "-o", target)
    assert result.exit_code == 1
    assert "holds several runs, and this picture shows one. Choose it by --run LABEL." in result.stderr
    assert cli("plot", merged_path, "map", "--run", "two", "-o", target).exit_code == 0
    assert "Nearest: 'two'" in cli("plot", merged_path, "map", "--run", "twoo", "-o", target).stderr
    assert cli("plot", merged_path, "map", "--run", "x*", "-o", target).exit_code == 3


def test_a_graph_is_that_of_the_study(cli: Cli, run_path: Path, study: Path, tmp_path: Path) -> None:
    target = tmp_path / "graph.svg"
    result = cli("plot", run_path, "graph", "--study", study, "-o", target)
    assert result.exit_code == 0
    assert "median over 21 steps" in result.stderr
    study.write_text(STUDY.replace("fc1", "fc7").replace("head", "tail"))
    wrong = cli("plot", run_path, "graph", "--study", study, "-o", target)
    assert wrong.exit_code == 1
    assert "No op of the study has a parameter of the run." in wrong.stderr
    study.write_text(STUDY.replace("yield", "return; yield"))
    assert "yield nothing" in cli("plot", run_path, "graph", "--study", study, "-o", target).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["map", "head.wieght"], "Nearest: 'head.weight'"),
        (["map", "--group", "diagnosis=SC"], "Nearest: 'diagnosis=SZ'"),
        (["map", "--metric", "stable_rnk"], "Nearest: 'stable_rank'"),
        (["map", "--step", "5"], "Nearest: 0, 2, 4, 6, 8"),
        (["map", "--probe", "vla"], "Nearest: 'val'"),
        (["map", "--run", "one"], "is a single run"),
        (["cosine", "--group", "all"], "compares groups, and there is only all"),
        (["difference", "--metric", "cosine"], "between two groups already"),
        (["difference", "--group", "*"], "compares two groups, and there are 3"),
        (["map", "--metric", "cosine", "--kind", "adjoint"], "of the groups' gradients"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_written(
    cli: Cli, run_path: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = cli("plot", run_path, *arguments, "-o", tmp_path / "x.png")
    assert result.exit_code == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["zzz*"], ["--step", "100:200"], ["--group", "x*"], ["--epoch", "9"], ["-"]])
def test_a_selection_that_matches_nothing_exits_with_3(
    cli: Cli, run_path: Path, tmp_path: Path, arguments: list[str]
) -> None:
    result = cli("plot", run_path, "map", *arguments, "-o", tmp_path / "x.png", input="")
    assert result.exit_code == 3
    assert "Nothing matched: no " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["map", "-o", "x.jpg"], "'x.jpg' does not say in which format: end FILE in png, svg, pdf"),
        (["map", "-o", "x"], "end FILE in png, svg, pdf"),
        (["map"], "Missing option '-o'"),
        (["heat", "-o", "x.png"], "'heat' is not one of"),
        (["graph", "-o", "x.png"], "Add --study STUDY"),
        (["map", "--study", "s.py", "-o", "x.png"], "--study is of graph. Leave it out for map."),
        (["scree", "--metric", "sigma1", "-o", "x.png"], "--metric is of map, trajectory"),
        (["map", "--smooth", "3", "-o", "x.png"], "--smooth is of trajectory, difference"),
        (["map", "--components", "3", "-o", "x.png"], "--components is of spectra, scree"),
        (["cosine", "--kind", "adjoint", "-o", "x.png"], "--kind is of map, trajectory"),
        (["map", "--kind", "gradients", "-o", "x.png"], "'gradients' is not one of"),
    ],
)
def test_wrong_usage_exits_with_2(cli: Cli, run_path: Path, arguments: list[str], words: str) -> None:
    result = cli("plot", run_path, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_file_that_cannot_be_written_is_said(cli: Cli, run_path: Path, tmp_path: Path) -> None:
    result = cli("plot", run_path, "map", "-o", tmp_path / "no" / "map.png")
    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


def test_without_matplotlib_the_extra_is_named(
    cli: Cli, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    result = cli("plot", run_path, "map", "-o", tmp_path / "map.png")
    assert result.exit_code == 1
    assert 'pip install "gradtrace[plot]"' in result.stderr


def test_a_run_that_is_not_there_is_a_failure(cli: Cli, tmp_path: Path) -> None:
    result = cli("plot", tmp_path / "nowhere.zarr", "map", "-o", tmp_path / "map.png")
    assert result.exit_code == 1
    assert "There is no run at" in result.stderr


def test_pictures_are_drawn_without_torch_and_without_a_window(shell: Shell, run_path: Path, tmp_path: Path) -> None:
    names = ("torch", "xarray", "pandas", "matplotlib.pyplot")
    told = f"print([m for m in {names} if m in sys.modules])"
    prelude = f"import atexit, sys\natexit.register(lambda: {told})"
    result = shell("plot", run_path, "map", "-o", tmp_path / "map.png", prelude=prelude)
    assert result.returncode == 0
    assert result.stdout.strip() == "[]"


def test_the_command_knows_the_pictures_and_formats_that_there_are() -> None:
    assert set(WHAT) == set(PICTURES)
    assert tuple(FORMATS) == sheet.FORMATS
    assert {what for pictures in ONLY.values() for what in pictures} <= set(WHAT)


def test_the_help_and_every_option_and_picture_are_documented() -> None:
    done = CliRunner().invoke(main, ["plot", "--help"], terminal_width=80, prog_name="gradtrace")
    text = REFERENCE.read_text(encoding="utf-8")
    assert f"```text\n{done.stdout}```" in text
    prose = text.replace(done.stdout, "")
    command: click.Command = import_module("gradtrace.cli.plot").command
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    assert [option for option in options if f"`{option}" not in prose] == []
    assert [what for what in WHAT if f"`{what}`" not in prose] == []
