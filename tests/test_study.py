"""Loading a study: what is found, what is filled in, and that each way of getting it wrong is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradtrace.errors import StudyError
from gradtrace.study import REQUIRED, SHAPES, load_study

WHOLE = {
    "model": "def model(): return torch.nn.Linear(3, 2)",
    "batches": "def batches(): yield torch.ones(5, 3), torch.zeros(5, 2), ['a', 'b', 'a', 'b', 'a']",
    "loss": "def loss(output, batch): return (output - batch[1]).square().mean()",
    "groups": "def groups(batch): return {'site': batch[2]}",
}


@pytest.fixture(autouse=True)
def _own_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("mine", "gradtrace_study", "helper")):
            del sys.modules[name]


def write(folder: Path, name: str = "mine.py", *, without: str = "", **changed: str) -> str:
    parts = {key: text for key, text in (WHOLE | changed).items() if key != without}
    path = folder / name
    path.write_text("import torch\n" + "\n".join(parts.values()) + "\n")
    return str(path)


def test_a_whole_study_is_loaded_with_its_name_and_functions(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    (batch,) = study.batches()
    assert study.name == "mine"
    assert study.model()(study.inputs(batch)).shape == (5, 2)
    assert study.groups(batch) == {"site": ["a", "b", "a", "b", "a"]}


def test_inputs_default_to_the_first_item_and_the_optimizer_to_the_trainings(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    assert study.inputs(["x", "y"]) == "x"
    assert study.optimizer is None


def test_given_inputs_and_optimizer_are_used(tmp_path: Path) -> None:
    given = {
        "inputs": "def inputs(batch): return batch['x']",
        "optimizer": "def optimizer(p): return torch.optim.SGD(p, lr=0.5)",
    }
    study = load_study(write(tmp_path, **given))
    assert study.inputs({"x": 3}) == 3
    assert study.optimizer is not None
    assert isinstance(study.optimizer(study.model().parameters()), torch.optim.SGD)


def test_batches_that_are_no_tuples_need_inputs(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no inputs\(\).*dict.*def inputs\(batch\)"):
        load_study(write(tmp_path)).inputs({"x": 1})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_function_is_named_with_its_shape(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(write(tmp_path, without=name))
    assert f"lacks {name}()" in str(caught.value)
    assert SHAPES[name] in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_all_missing_functions_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(StudyError, match=r"lacks model\(\), batches\(\), loss\(\), groups\(\)"):
        load_study(str(tmp_path / "mine.py"))


def test_something_that_is_not_a_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"`batches` .* is a list, not a function"):
        load_study(write(tmp_path, batches="batches = []"))


def test_a_function_with_other_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"`loss\(output\)`.*2 argument.*def loss\(output, batch\)"):
        load_study(write(tmp_path, loss="def loss(output): return output.sum()"))


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(StudyError, match=r"other\.py does not exist.*mine\.py"):
        load_study(str(tmp_path / "other.py"))


def test_a_folder_lists_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(StudyError, match=r"is a folder.*mine\.py"):
        load_study(f"{tmp_path}/")


def test_a_syntax_error_names_the_line_and_stays_as_the_cause(tmp_path: Path) -> None:
    target = write(tmp_path, loss="def loss(output batch): pass")
    with pytest.raises(StudyError, match=r"not valid Python.*mine\.py, line 4") as caught:
        load_study(target)
    assert isinstance(caught.value.__cause__, SyntaxError)


def test_an_error_in_the_study_names_the_line_and_stays_as_the_cause(tmp_path: Path) -> None:
    target = write(tmp_path, loss="1 / 0")
    with pytest.raises(StudyError, match=r"ZeroDivisionError: division by zero \(mine\.py, line 4\)") as caught:
        load_study(target)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "mine" not in sys.modules


def test_a_module_that_the_study_lacks_is_not_taken_for_a_missing_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"importing the study .*mine\.py failed: .*no_such_package.*Install"):
        load_study(write(tmp_path, loss="import no_such_package"))


def test_a_module_is_loaded_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_package").mkdir()
    (tmp_path / "mine_package" / "__init__.py").write_text("")
    write(tmp_path / "mine_package", "one.py")
    monkeypatch.chdir(tmp_path)
    assert load_study("mine_package.one").name == "one"


def test_a_module_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"no module 'mine_three' in the current folder"):
        load_study("mine_three")


def test_a_dotted_name_that_python_cannot_import_points_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_plain").mkdir()
    (tmp_path / "mine_plain.py").write_text("")  # hides the folder from Python, which then takes it for no package
    write(tmp_path / "mine_plain", "two.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"Did you mean the file mine_plain/two.py\?"):
        load_study("mine_plain.two")


def test_a_module_inside_a_study_module_that_is_missing_is_the_studys_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "mine_five.py", loss="import helper_that_is_missing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"importing the study mine_five failed.*helper_that_is_missing.*line 4"):
        load_study("mine_five")


def test_a_study_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "helper_for_mine.py").write_text("WIDTH = 7\n")
    target = write(
        tmp_path, model="import helper_for_mine\ndef model(): return torch.nn.Linear(helper_for_mine.WIDTH, 2)"
    )
    assert load_study(target).model().in_features == 7


def test_a_study_named_like_a_library_does_not_replace_it(tmp_path: Path) -> None:
    load_study(write(tmp_path, "random.py"))
    import random

    assert hasattr(random, "shuffle")


def test_loading_again_reads_the_file_again(tmp_path: Path) -> None:
    assert load_study(write(tmp_path)).model().out_features == 2
    assert load_study(write(tmp_path, model="def model(): return torch.nn.Linear(3, 11)")).model().out_features == 11
