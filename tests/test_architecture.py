"""The floors of the house, read off the syntax trees: imports point down only."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusion_jax"
# A module or folder may import those of the floors below its own, and a folder itself.
# A new one needs a floor here.
FLOORS = (
    {"errors"},
    {"schedule", "latents"},
    {"continuous", "learned", "prediction"},
    {"gaussian", "weightings", "timesteps"},
    {"sde", "losses", "distillation", "grids", "guidance", "analytic"},
    {"samplers", "autoencoding"},
    {"solvers", "jumps", "langevin", "ode"},
    {"likelihood", "editing"},
)
MATHEMATICS = set.union(*FLOORS) - {"errors"}
WINGS = (
    {"errors"},
    {"nets", "storage"},
    {"checkpoints", "data", "interop", "evaluation", "codec"},
    {"training"},
    {"lab"},
)
LAB = (
    {"schema"},
    {"process", "wiring"},
    {"network_files"},
    {"run_folder"},
    {"trained"},
    {"coding", "report"},
    {"measure"},
    {"drawing", "training"},
    {"speed", "playground"},
)
# Of the mathematics, what a wing may know: the codec is one for any denoiser.
KNOWN = {"codec": {"schedule", "prediction", "gaussian"}}
# What a module may import beside jax and numpy: an extra, and only when it is called.
EXTRAS = {"ode": {"diffrax"}}
MAX_LINES = 450
MAX_OF_FUNCTION = 60

FILES = sorted(PACKAGE.rglob("*.py"))
ROOT_FILES = [f for f in FILES if f.parent == PACKAGE and f.name[0] != "_"]
COMMANDS = sorted((ROOT / "experiments").glob("[!_]*.py"))


def imports(file):
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


def neighbours(file, inside="diffusion_jax"):
    """Which modules and folders of a package a file imports."""
    found = (name for name in imports(file) if name.startswith(f"{inside}."))
    return {name.removeprefix(f"{inside}.").split(".")[0] for name in found}


def above(floors, place):
    """What stands no lower than a place, but for the place itself."""
    floor = next((k for k, names in enumerate(floors) if place in names), None)
    assert floor is not None, f"{place} must be on a floor; give it one."
    return set.union(*floors[floor:]) - {place}


def test_imports_point_down():
    assert neighbours(PACKAGE / "nets" / "unet.py") == {"errors", "nets"}
    for file in (f for f in FILES if f.parent != PACKAGE or f in ROOT_FILES):
        place = file.relative_to(PACKAGE).with_suffix("").parts
        floors, inside = FLOORS if len(place) == 1 else WINGS, "diffusion_jax"
        if len(place) > 2:
            floors, inside, place = LAB, "diffusion_jax.lab", place[1:]
        wrong = neighbours(file, inside) & above(floors, place[0])
        assert not wrong, f"{file} imports {wrong}, which stand no lower"
        if len(place) == 1 and file.stem != "errors":
            assert neighbours(file) <= set.union(*FLOORS) - {file.stem}, file


def test_wings_know_nothing_of_diffusion_and_the_library_none_of_experiments():
    for file in FILES:
        found = imports(file)
        assert "experiments" not in {name.split(".")[0] for name in found}, file
        if "lab" not in file.relative_to(PACKAGE).parts and file.parent != PACKAGE:
            known = KNOWN.get(file.parent.name, set())
            assert not neighbours(file) & (MATHEMATICS - known), file.name
            assert "diffusion_jax" not in found, file.name


def test_no_command_imports_a_command():
    names = {file.stem for file in COMMANDS}
    assert "train" in names
    for file in COMMANDS:
        wrong = neighbours(file, "experiments") & names
        assert not wrong, f"{file.name} imports {wrong}; share it in diffusion_jax.lab"


def test_each_folder_says_in_one_sentence_what_it_is_for():
    for file in (f for f in FILES if f.name == "__init__.py" and f.parent != PACKAGE):
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert said.splitlines()[:1] == [said], f"{file.parent.name}: {said!r}"
        assert said.endswith("."), file.parent.name


def test_mathematics_imports_jax_numpy_and_nothing_else():
    allowed = {"jax", "numpy", "diffusion_jax"} | set(sys.stdlib_module_names)
    for file in ROOT_FILES:
        extra = EXTRAS.get(file.stem, set())
        found = {name.split(".")[0] for name in imports(file)}
        assert found <= allowed | extra, file.name
        top = ast.parse(file.read_text()).body
        for node in (n for n in top if isinstance(n, ast.Import | ast.ImportFrom)):
            names = [*(a.name for a in node.names), getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & extra, file.name


def test_files_are_short_and_all_that_is_public_is_explained():
    """A docstring for the module and each public class, function and method."""
    for file in [*FILES, *COMMANDS]:
        text = file.read_text()
        lines = len(text.splitlines())
        assert lines <= MAX_LINES, f"{file.name} has {lines} lines; split it."
        tree = ast.parse(text)
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
        assert ast.get_docstring(tree), f"{file.name} says nothing"
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            said = function.body[0].end_lineno if ast.get_docstring(function) else 0
            length = function.end_lineno - (said or function.body[0].lineno - 1)
            assert length <= MAX_OF_FUNCTION, f"{file.name}: {function.name}, {length}"
        assert not silent, f"{file.name} without a docstring: {silent}"


def test_tests_stand_in_folders_of_what_they_test():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    folders |= {"mathematics", "experiments", "peers"}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        place = file.parent.relative_to(ROOT / "tests").parts
        whole = file.stem in ("test_architecture", "test_mutations")
        assert (place == ()) if whole else (place[0] in folders), file
