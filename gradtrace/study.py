"""A STUDY: a Python file (or module) of plain functions that say what to train, on what, and for which groups."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradtrace.errors import StudyError

SHAPES = {
    "model": "def model(): return MyNetwork()",
    "batches": "def batches(): yield x, y, diagnosis  # one epoch; a DataLoader can be returned as well",
    "inputs": "def inputs(batch): return batch[0]  # a tensor, a tuple (positional) or a mapping (keyword arguments)",
    "loss": "def loss(output, batch): return torch.nn.functional.cross_entropy(output, batch[1])",
    "groups": 'def groups(batch): return {"diagnosis": batch[2]}  # one label per sample',
    "optimizer": "def optimizer(parameters): return torch.optim.SGD(parameters, lr=0.1)",
}
"""Every function of a study and what it may look like; `inputs` and `optimizer` have defaults."""

ARGUMENTS = {"model": 0, "batches": 0, "inputs": 1, "loss": 2, "groups": 1, "optimizer": 1}
REQUIRED = ("model", "batches", "loss", "groups")


@dataclass(frozen=True)
class Study:
    """What `gradtrace train`, `graph` and `doctor` need to know about somebody's training."""

    target: str
    name: str
    model: Callable[[], Any]
    batches: Callable[[], Iterable[Any]]
    loss: Callable[[Any, Any], Any]
    groups: Callable[[Any], Any]
    inputs: Callable[[Any], Any]
    optimizer: Callable[[Any], Any] | None  # None: the training's default


def load_study(target: str) -> Study:
    """The study at `path/to/file.py` or in `package.module`.

    As with `python file.py` and `python -m package.module`, the file's folder (or the current one) becomes importable.
    Raises StudyError naming the study, and what is missing or wrong in it; an exception raised by the study's own code
    is kept as the error's cause.
    """
    is_file = target.endswith(".py") or "/" in target or "\\" in target
    module = _from_file(target) if is_file else _from_module(target)
    found: dict[str, Any] = {name: _function(module, name, target) for name in SHAPES}
    name = Path(target).stem if is_file else target.rpartition(".")[2]
    return Study(target=target, name=name, **found)


def _from_file(target: str) -> ModuleType:
    path = Path(target).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise StudyError(f"the study {target} {what}. {_studies_in(path if path.is_dir() else path.parent)}")
    _make_importable(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(_free_name(path), path)
    if spec is None or spec.loader is None:
        raise StudyError(f"the study {target} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, pickling and data loaders' workers look it up there
    loader = spec.loader
    try:
        _guarded(target, lambda: loader.exec_module(module))
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def _from_module(target: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not (target == error.name or target.startswith(f"{error.name}.")):
            raise _failed(target, error) from error
        beside = Path(*target.split(".")).with_suffix(".py")
        hint = f"Did you mean the file {beside}?" if beside.is_file() else "A file's name must end in .py."
        raise StudyError(
            f"the study {target!r} was read as a module, and there is no module {error.name!r} in the current folder "
            f"or among the installed packages. {hint}"
        ) from error
    except Exception as error:
        raise _failed(target, error) from error


def _function(module: ModuleType, name: str, target: str) -> Callable[..., Any] | None:
    found = getattr(module, name, None)
    if found is None:
        if name in REQUIRED:
            missing = [each for each in REQUIRED if getattr(module, each, None) is None]
            shapes = "\n".join(f"    {SHAPES[each]}" for each in missing)
            raise StudyError(f"the study {target} lacks {', '.join(f'{each}()' for each in missing)}. Add:\n{shapes}")
        return _first_of if name == "inputs" else None
    if not callable(found):
        raise StudyError(f"`{name}` in the study {target} is a {type(found).__name__}, not a function: {SHAPES[name]}")
    try:
        inspect.signature(found).bind(*[None] * ARGUMENTS[name])
    except TypeError as error:
        raise StudyError(
            f"`{name}{inspect.signature(found)}` in the study {target} cannot be called with "
            f"{ARGUMENTS[name]} argument(s) ({error}). It should look like: {SHAPES[name]}"
        ) from error
    except ValueError:  # a built-in that tells no signature
        pass
    return found


def _first_of(batch: Any) -> Any:
    """The default `inputs(batch)`: the first item of a tuple or list."""
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    raise StudyError(
        f"the study has no inputs(), and its batches are of type {type(batch).__name__}, not tuples whose first item "
        f"is the model's input. Add: {SHAPES['inputs']}"
    )


def _guarded(target: str, execute: Callable[[], None]) -> None:
    try:
        execute()
    except Exception as error:
        raise _failed(target, error) from error


def _failed(target: str, error: Exception) -> StudyError:
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename).name if error.filename else target}, line {error.lineno}"
        return StudyError(f"the study {target} is not valid Python: {kind}: {error.msg} ({where}).")
    inner = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    where = f" ({Path(inner[-1].filename).name}, line {inner[-1].lineno})" if inner else ""
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = f" Install what provides {error.name!r}, or check the spelling."
    return StudyError(f"importing the study {target} failed: {kind}: {error}{where}.{hint}")


def _is_machinery(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen") or Path(filename) == Path(importlib.__file__ or "")


def _studies_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    names = sorted(path.name for path in folder.glob("*.py"))
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"Python files in {folder}: {listed}." if names else f"There are no Python files in {folder}."


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _free_name(path: Path) -> str:
    """The file's own name where it is free, so that a data loader's worker processes can import it too."""
    stem = re.sub(r"\W", "_", path.stem)
    held = sys.modules.get(stem)
    own = held is not None and getattr(held, "__file__", None) in {str(path), str(path.resolve())}
    return stem if own or (held is None and stem not in sys.stdlib_module_names) else f"gradtrace_study_{stem}"
