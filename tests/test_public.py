"""What users import: the list of names, how quickly it comes, and what is never used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import plait
from plait import _HOMES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "plait"
# What `import plait` must not wait for: torch takes a second, the others part of one.
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "typer",
    "rich",
    "pydantic",
    "matplotlib",
    "tokenizers",
    "minijinja",
)
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def run_python(code: str) -> str:
    """Run code in a fresh process; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    """Every module of the package that can be imported by name."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


def sources() -> list[Path]:
    """Every file that is shipped or run by a make target."""
    folders = [PACKAGE, ROOT / "bench", ROOT / "docs"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_names_are_sorted_and_complete() -> None:
    assert plait.__all__ == sorted(plait.__all__)
    assert set(plait.__all__) == {*_HOMES, "__version__"}
    assert dir(plait) == plait.__all__


def test_names_for_type_checkers_are_the_names_that_there_are() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    imported = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    }
    assert imported == _HOMES


@pytest.mark.parametrize("name", plait.__all__)
def test_every_name_resolves(name: str) -> None:
    value = getattr(plait, name)
    if name in _HOMES:
        assert value is getattr(importlib.import_module(_HOMES[name]), name)
        assert name in importlib.import_module(_HOMES[name]).__all__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = plait.nonsense


def test_the_errors_of_the_tree_are_public() -> None:
    from plait import errors

    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PlaitError)
    }
    assert tree <= set(plait.__all__)


def test_importing_plait_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, plait; print(*sys.modules)").split()
    assert not {module.partition(".")[0] for module in loaded} & set(HEAVY)


def test_the_version_is_printed_without_loading_torch() -> None:
    loaded = run_python(
        "import sys, contextlib\n"
        "from plait.cli import main\n"
        "sys.argv = ['plait', '--version']\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "print(*sys.modules)"
    )
    assert loaded.startswith(f"plait {plait.__version__}\n")
    assert "torch" not in loaded.split()


def test_every_module_can_be_imported_first() -> None:
    """Each in a fork of a process that holds its package, which always comes first, and nothing else of Plait."""
    needs = run_python(
        "import importlib, sys\n"
        f"for name in {modules()!r}:\n    importlib.import_module(name)\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] not in ('plait', '__main__')))\n"
    ).split()
    packages: dict[str, list[str]] = {}
    for name in modules():
        packages.setdefault(name if _is_package(name) else name.rpartition(".")[0], []).append(name)
    printed = run_python(
        "import importlib, os, sys, traceback\n"
        f"for name in {needs!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError:\n"
        "        pass  # made by another module when that is imported\n"
        "def apart(name, then):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "            then()\n"
        "        except BaseException:\n"
        "            traceback.print_exc()\n"
        "            os._exit(1)\n"
        "        print(name, flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n"
        "def members(names):\n"
        "    for name in names:\n"
        "        if name in sys.modules:\n"
        "            print(name, flush=True)  # the package imports it, and would do so before it\n"
        "        else:\n"
        "            apart(name, lambda: None)\n"
        f"for package, names in {packages!r}.items():\n"
        "    assert not any(module.partition('.')[0] == 'plait' for module in sys.modules)\n"
        "    apart(package, lambda: members(name for name in names if name != package))\n"
    )
    assert sorted(printed.split()) == modules()


def _is_package(name: str) -> bool:
    return (PACKAGE.parent / Path(*name.split(".")) / "__init__.py").exists()


def test_everything_imports_while_unpickling_is_poisoned() -> None:
    printed = run_python(
        "import importlib, pickle\n"
        "def poisoned(*args, **kwargs):\n    raise SystemExit('something was unpickled')\n"
        "pickle.loads = pickle.load = poisoned\n"
        f"for name in {modules()!r}:\n    importlib.import_module(name)\n"
        "try:\n    pickle.loads(b'')\nexcept SystemExit as error:\n    print(error)\n"
    )
    assert printed == "something was unpickled\n"


def _forbidden(tree: ast.AST) -> list[str]:
    """Uses of pickle and its relatives, `torch.load`, `eval` and `exec`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").partition(".")[0] in UNPICKLERS or "torch.load" in names:
                found.append(str(node.module))
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "load"):
                found.append("torch.load")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert _forbidden(ast.parse(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "import joblib.memory",
        "from torch import load",
        "torch.load('x')",
        "eval('1')",
        "f = exec",
        "__import__('pickle')",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_uses_that_are_forbidden_are_found(code: str) -> None:
    assert _forbidden(ast.parse(code)) != []


def test_what_looks_like_them_is_allowed() -> None:
    code = "model.eval()\nfrom plait.engine.loading import load\nload('x')\nplait.load('x')\nsession.exec"
    assert _forbidden(ast.parse(code)) == []


def test_the_walls_between_rooms_stand() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_starts_with_a_docstring_and_postponed_annotations(path: Path) -> None:
    text = path.read_text("utf-8")
    body = ast.parse(text).body
    if not body:
        assert path.name == "__init__.py"
        return
    assert text.startswith('"""')
    if len(body) > 1:
        assert ast.unparse(body[1]) == "from __future__ import annotations"
