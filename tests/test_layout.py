"""The architecture, as rules that fail: import arrows, the package mapping, and no import by a folder's bare name."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "opensora_fast", "train", "profiling"]  # each may import itself and those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).glob("**/*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the absolute import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _layer(module: str) -> str | None:
    words = module.split(".")
    if words[0] != "opensora_fast":
        return None
    return words[1] if len(words) > 1 and words[1] in LAYERS else "opensora_fast"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    for module in _imports(path):
        root = module.split(".")[0]
        assert root not in ("kernels", "train", "profiling"), f"{path} imports {module} by its folder's name"
        layer = _layer(module)
        allowed = LAYERS[: own + 1]
        assert layer is None or layer in allowed, f"{path} imports {module}: only {allowed} lie below it"


NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_native_code_knows_no_torch_and_one_file_knows_python(path: Path) -> None:
    text = path.read_text()
    assert "torch/" not in text
    assert "ATen" not in text
    assert ("pybind11" in text) == (path.name == "bindings.cpp")


def test_every_command_names_a_module_of_the_package() -> None:
    from opensora_fast.cli import COMMANDS

    folders = _mapping()
    for module, _ in COMMANDS.values():
        package, name = module.rsplit(".", 1)
        assert (ROOT / folders[package] / f"{name}.py").is_file(), module


def test_typecheck_view_equals_the_mapping() -> None:
    folders = _mapping()
    view = ROOT / ".typecheck" / "opensora_fast"
    files = (ROOT / "opensora_fast").iterdir()
    expected = {path.name: path for path in files if path.suffix == ".py" or path.name == "py.typed"}
    expected |= {package.split(".")[1]: ROOT / folder for package, folder in folders.items() if "." in package}
    links = {link.name: link for link in view.iterdir() if link.name != "__pycache__"}
    assert links.keys() == expected.keys(), "run tools/typecheck_view.sh"
    for name, link in links.items():
        assert link.is_symlink()
        assert not os.readlink(link).startswith("/")
        assert link.resolve() == expected[name].resolve()


def test_import_starts_neither_torch_nor_cuda() -> None:
    code = "import sys, opensora_fast, opensora_fast.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def _mapping() -> dict[str, str]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["setuptools"]["package-dir"]
