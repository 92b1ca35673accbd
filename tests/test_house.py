"""Rules of the house that no other tool checks."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import domlora

SOURCE = Path(domlora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = sorted(module.name for module in pkgutil.walk_packages([str(SOURCE)], "domlora."))
ROOMS = {module.name for module in pkgutil.walk_packages([str(SOURCE)], "domlora.") if module.ispkg}
NO_NAMES = {"utils", "helpers", "common", "manager", "base"}


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(SOURCE)) for path in paths]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def public(module: ModuleType) -> set[str]:
    """Functions and classes that a module defines and does not hide."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ROOMS])
def test_all_names_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__"), "every module says what it offers"
    said = set(module.__all__)
    assert len(said) == len(module.__all__)
    assert not said - set(vars(module)), "__all__ names what is not there"
    assert not public(module) - said, "public names that __all__ leaves out"


@pytest.mark.parametrize("name", NAMES)
def test_public_things_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()
    for each in getattr(module, "__all__", ()):
        value = getattr(module, each)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        text = inspect.getdoc(value) if inspect.isfunction(value) else value.__dict__.get("__doc__")
        assert text, f"{each} has no docstring"
        assert not text.startswith(f"{value.__name__}("), f"{each} has only the docstring that dataclass makes"


def test_the_face_is_sorted_and_works() -> None:
    assert list(domlora.__all__) == sorted(domlora.__all__)
    for name in domlora.__all__:
        assert getattr(domlora, name) is not None


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_file_has_a_name_that_says_nothing(path: Path) -> None:
    assert not {path.stem, *path.relative_to(SOURCE).parts} & NO_NAMES


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_nothing_is_read_with_pickle(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for call in ("torch.load(", "torch.save(", "np.load(", "numpy.load(", "allow_pickle=True", "eval(", "exec("):
        assert f" {call}" not in text
        assert f"({call}" not in text


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_star_imports_and_no_mutable_defaults(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            assert not any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults), node.name


def test_functions_are_short() -> None:
    """About 25 lines each, and 9 of 10 under 40, docstrings counted."""
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert sum(length < 40 for length in lengths) / len(lengths) > 0.9
    assert max(lengths) <= 80


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_only_the_command_line_prints(path: Path) -> None:
    if path.parent.name == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")


OUTSIDERS = {
    "domlora.errors": {"torch", "numpy", "pyarrow", "ibis", "duckdb"},
    "domlora.features.schema": {"torch", "pyarrow", "ibis", "duckdb"},
    "domlora.features.encode": {"torch", "pyarrow", "ibis", "duckdb"},
    "domlora.adapters.attach": {"pyarrow", "ibis", "duckdb", "domlora.features", "domlora.data", "domlora.models"},
    "domlora.bundle": {"pyarrow", "ibis", "duckdb", "domlora.data"},
    "domlora.cli": {"torch", "pyarrow", "ibis", "duckdb", "matplotlib"},
}
PROBE = """
import json, sys
import importlib
before = set(sys.modules)
found = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    found[name] = sorted(set(sys.modules) - before)
    for each in [m for m in sys.modules if m == "domlora" or m.startswith("domlora.")]:
        del sys.modules[each]
print(json.dumps(found))
"""


def test_a_room_loads_only_what_it_needs() -> None:
    """A server without torch can encode, and help appears at once. In one process, lightest first."""
    order = sorted(
        OUTSIDERS,
        key=lambda name: ["errors", "schema", "encode", "cli", "attach", "bundle"].index(name.rpartition(".")[2]),
    )
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(order)], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    for name, refused in OUTSIDERS.items():
        assert not refused & set(loaded[name]), name


def test_the_servers_versions_are_those_of_the_constraints() -> None:
    root = Path(__file__).parent.parent
    known, own = (
        {line for line in (root / name).read_text(encoding="utf-8").splitlines() if "==" in line}
        for name in ("constraints.txt", "serving-requirements.txt")
    )
    assert own <= known, own - known
