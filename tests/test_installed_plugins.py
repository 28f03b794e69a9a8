"""Adapters in packages of their own, built and installed by pip as anybody's, in a Python process that starts anew.

kron-linear lives in tests/example_plugin; what `gradtrace plugins new` writes is installed beside it. Each scenario is
one or more folders of installed distributions that the process gets on its path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradtrace.scaffold import checked_name, write_package

EXAMPLE = Path(__file__).parent / "example_plugin"
KRON = "from kron_linear import KronLinear; model = KronLinear((2, 5), (3, 11))"
# Both numbers of a group: ours, and from autograd its own.
MEASURE = """
import json, torch, gradtrace as gt

torch.manual_seed(0)
model, x = model.double(), torch.randn(7, 10, dtype=torch.float64)
labels = ["SZ", "HC", "SZ", "SZ", "HC", "HC", "HC"]
tree = gt.spectra(model, x, lambda y: y.square().mean(), groups={"diagnosis": labels}, keep=None, adapters=choice)
outputs = model(x)
of_group = outputs[torch.tensor([label == "SZ" for label in labels])].square().sum() / outputs.numel()
found = {}
for (name, node), gradient in zip(tree.children.items(), torch.autograd.grad(of_group, list(model.parameters()))):
    own = torch.linalg.matrix_norm(torch.atleast_2d(gradient), 2).item()
    found[name] = {**node.attrs, "largest": float(node["gradient"].sel(group="diagnosis=SZ")[0]), "own": own}
print(json.dumps(found))
"""
MIX = """

import torch

class Mix(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(10))

    def forward(self, x):
        return torch.lerp(x, x.cos(), self.weight)
"""


def build(folder: Path, name: str, more: str = "") -> Path:
    """The package of a new adapter, as `gradtrace plugins new` writes it, with `more` at the end of its module."""
    names = checked_name(name)
    write_package(names, folder / name)
    module = folder / name / "src" / names.module / "__init__.py"
    module.write_text(module.read_text() + more)
    return folder / name


def install(target: Path, *packages: Path) -> Path:
    """Where the packages were installed, without a network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--no-compile", "--target", str(target), *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run(*arguments: str, installed: tuple[Path, ...], **options: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds the installed folders, and turns warnings into errors."""
    path = os.pathsep.join(map(str, installed))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


def cli(*arguments: str, installed: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
    return run("-c", "from gradtrace.cli import main; main()", *arguments, installed=installed)


def measure(model: str, *, installed: tuple[Path, ...], choice: object = None) -> subprocess.CompletedProcess[str]:
    return run("-c", f"{model}\nchoice = {choice!r}\n{MEASURE}", installed=installed)


@pytest.fixture(scope="module")
def kron_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example: building writes beside the source."""
    folder = tmp_path_factory.mktemp("source") / "kron-linear"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def kron(tmp_path_factory: pytest.TempPathFactory, kron_source: Path) -> Path:
    return install(tmp_path_factory.mktemp("kron"), kron_source)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two that claim the same call."""
    source = tmp_path_factory.mktemp("others-source")
    packages = build(source, "acme-mix", MIX), build(source, "other-mix")
    return install(tmp_path_factory.mktemp("others"), *packages)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("broken-source")
    return install(tmp_path_factory.mktemp("broken"), build(source, "broken-one", "\nimport not_there\n"))


def test_an_installed_plugin_is_listed_with_version_and_origin(kron: Path) -> None:
    listed = cli("plugins", "list", "--json", installed=(kron,))
    assert listed.returncode == 0
    assert listed.stderr == ""
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["kron-linear"] == {
        "name": "kron-linear",
        "distribution": "kron-linear",
        "version": "1.2.3",
        "origin": "kron_linear:KronLinearAdapter",
        "ops": ["kron_linear"],
        "error": None,
    }
    assert rows["linear"]["distribution"] == "gradtrace"


def test_its_adapter_is_used_and_passes_its_own_tests(kron: Path, kron_source: Path) -> None:
    measured = measure(KRON, installed=(kron,))
    assert measured.returncode == 0, measured.stderr
    for name, node in json.loads(measured.stdout).items():
        assert node["adapters"] == ["kron-linear"], name
        assert node["rung"] == "factored", name
        assert node["kinds"] == ["gradient", "activation", "adjoint"], name
        assert node["largest"] == pytest.approx(node["own"], rel=1e-9), name
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(kron_source), installed=(kron,))
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout
    assert "skipped" not in tested.stdout


def test_a_new_package_installs_and_passes_its_tests_at_once(tmp_path: Path) -> None:
    source = build(tmp_path, "acme-adapter")
    target = install(tmp_path / "site", source)
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(source), installed=(target,))
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout
    assert "skipped" not in tested.stdout


def test_a_plugin_that_fails_to_import_is_named_and_the_others_go_on(kron: Path, broken: Path) -> None:
    listed = cli("plugins", "list", "--json", installed=(broken, kron))
    assert listed.returncode == 0
    errors = {row["name"]: row["error"] for row in json.loads(listed.stdout)}
    assert errors["broken-one"] == "ModuleNotFoundError: No module named 'not_there'"
    assert errors["kron-linear"] is None
    assert "The adapter 'broken-one' of broken-one cannot be used: ModuleNotFoundError" in listed.stderr
    measured = measure(KRON, installed=(broken, kron))
    assert measured.returncode == 0, measured.stderr
    assert "broken-one (broken-one 0.1.0): ModuleNotFoundError: No module named 'not_there'" in measured.stderr
    assert {node["rung"] for node in json.loads(measured.stdout).values()} == {"factored"}


def test_two_that_claim_one_call_are_an_error_that_a_choice_settles(others: Path) -> None:
    model = "from acme_mix import Mix; model = Mix()"
    refused = measure(model, installed=(others,))
    assert refused.returncode == 1
    assert refused.stdout == ""
    message = refused.stderr.splitlines()[-1]
    assert "AdapterError: `lerp` is claimed by several adapters" in message
    assert "acme-mix (acme-mix 0.1.0)" in message
    assert "other-mix (other-mix 0.1.0)" in message
    assert 'adapters={"lerp": "acme-mix"}' in message
    settled = measure(model, installed=(others,), choice={"lerp": "other-mix"})
    assert settled.returncode == 0, settled.stderr
    (node,) = json.loads(settled.stdout).values()
    assert node["adapters"] == ["other-mix"]
    assert node["largest"] == pytest.approx(node["own"], rel=1e-9)


def test_the_tutorials_files_are_those_of_the_example() -> None:
    """Blocks marked with a file's path are that file, one after another."""
    page = (Path(__file__).parents[1] / "docs" / "tutorial" / "an-adapter-in-fifteen-minutes.md").read_text()
    files: dict[str, list[str]] = {}
    for block in page.split("\n```python ")[1:]:
        path, _, rest = block.partition("\n")
        files.setdefault(path, []).append(rest.partition("\n```")[0])
    assert sorted(files) == ["src/kron_linear/__init__.py", "tests/test_adapter.py"]
    for path, parts in files.items():
        assert "\n\n\n".join(part.strip("\n") for part in parts) + "\n" == (EXAMPLE / path).read_text(), path
