"""The floors of the house, read off the syntax trees: imports point down only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusion_jax"
# A module may import those of the floors below its own. A new one needs a floor here.
FLOORS = (
    {"schedule"},
    {"continuous", "learned", "prediction"},
    {"gaussian", "weightings", "timesteps"},
    {"sde", "losses", "grids", "guidance", "analytic"},
    {"samplers"},
    {"solvers", "langevin", "ode"},
    {"likelihood", "editing", "compression"},
)
MATHEMATICS = set.union(*FLOORS)
# What a module may import beside jax and numpy: an extra, and only when it is called.
EXTRAS = {"ode": {"diffrax"}}
WINGS = {"nets", "training", "evaluation"}
MAX_LINES = 450

FILES = sorted(PACKAGE.rglob("*.py"))
ROOT_FILES = [f for f in FILES if f.parent == PACKAGE and f.name[0] != "_"]
every_file = pytest.mark.parametrize(
    "file", FILES, ids=lambda f: str(f.relative_to(PACKAGE))
)


def imports(file: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it, as absolute names."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    return names


def neighbours(file: Path) -> set[str]:
    """Which modules and wings of the package a file imports."""
    return {
        name.split(".")[1]
        for name in imports(file)
        if name.startswith("diffusion_jax.")
    }


def test_imports_are_read_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "diffusion_jax" / "nets" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import diffusion_jax.losses\n"
        "from diffusion_jax import gaussian as g\n"
        "def f():\n    from ..schedule import linear\n"
        "from . import unet\n"
    )
    assert neighbours(file) == {"losses", "gaussian", "schedule", "nets"}


@pytest.mark.parametrize("file", ROOT_FILES, ids=lambda f: f.stem)
def test_mathematics_imports_point_down(file):
    floor = next((k for k, names in enumerate(FLOORS) if file.stem in names), None)
    assert floor is not None, f"{file.name} must be on a floor; give it one in FLOORS."
    below = set().union(*FLOORS[:floor])
    assert neighbours(file) <= below, f"{file.name} may import {sorted(below)} only."


@pytest.mark.parametrize("file", ROOT_FILES, ids=lambda f: f.stem)
def test_mathematics_imports_jax_numpy_and_nothing_else(file):
    allowed = {"jax", "numpy", "diffusion_jax"} | set(sys.stdlib_module_names)
    extra = EXTRAS.get(file.stem, set())
    assert {name.split(".")[0] for name in imports(file)} <= allowed | extra
    top = ast.parse(file.read_text()).body
    for node in (n for n in top if isinstance(n, ast.Import | ast.ImportFrom)):
        assert not {alias.name.split(".")[0] for alias in node.names} & extra
        assert (getattr(node, "module", None) or "").split(".")[0] not in extra


@every_file
def test_wings_know_nothing_of_diffusion(file):
    if file.parent.name in WINGS:
        assert not neighbours(file) & MATHEMATICS
        assert "diffusion_jax" not in imports(file)


@every_file
def test_library_never_imports_experiments(file):
    assert not {name for name in imports(file) if name.split(".")[0] == "experiments"}


@every_file
def test_file_is_short(file):
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_LINES, f"{file.name} has {lines} lines; split it."


@every_file
def test_all_that_is_public_is_explained(file):
    """A docstring for the module and each public class, function and method."""
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the module says nothing"
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    scopes = [tree, *(n for n in classes if not n.name.startswith("_"))]
    silent = [
        node.name
        for scope in scopes
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"without a docstring: {silent}"
