"""Flags and arguments that messages name are there for whoever reads them."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest
import tyro

import diffusion_jax
from diffusion_jax.lab.process import joining
from diffusion_jax.lab.process.flags import HELP_ALL
from diffusion_jax.lab.training import arguments
from experiments import codec, edit
from experiments import runs as listing

ROOT = Path(diffusion_jax.__file__).resolve().parents[1]
FILES = [*(ROOT / "diffusion_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
TREES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text())
    for file in sorted(FILES)
}
COMMANDS = [
    name.partition(".")[2]
    for name in TREES
    if re.fullmatch(r"experiments\.[a-z]\w*", name)
]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*\w)")
ARGUMENT = re.compile(r"(?<![\w.{-])([a-z_][a-z0-9_]*)=(?!=)")
# Where a message says that a flag is, if not in the command that is running.
SAYS = re.compile(r"experiments\.(\w+)|\b[Ii]n training|\btrain(?:ed)? with\b")
ANYWHERE = re.compile(r"where there is the flag|where they are drawn|RUN or --output")
OF_OTHERS = re.compile(r"\bhf download|XLA_FLAGS|--xla_gpu")
# What many commands import, and only these ask for.
ASKED_BY = {
    "diffusion_jax.codec.container": "codec",
    "diffusion_jax.lab.playground.answers": "codec",
    "diffusion_jax.lab.playground.plans": "",  # which writes lines of sample and edit
    "diffusion_jax.lab.coding.coder": "codec",
    "diffusion_jax.lab.training.encoding": "train",
    "diffusion_jax.lab.measure.bound": "eval_nll",
    "diffusion_jax.lab.measure.formats_compared": "codec",
    "diffusion_jax.lab.measure.extractors": "ablation compare_samplers eval_fid",
    "diffusion_jax.lab.run_folder.history": "train",
    "diffusion_jax.lab.run_folder.lock": "train",
    "diffusion_jax.lab.run_folder.runs": "train ablation",
    "diffusion_jax.lab.schema.checks": "",
    "diffusion_jax.lab.schema.few": "train distil",
    "diffusion_jax.lab.trained.opening": "sample edit eval_fid legibility",
    "diffusion_jax.lab.trained.weights": "sample edit eval_fid eval_nll legibility "
    "convert compare_samplers",
    "diffusion_jax.lab.training.beginning": "train",
    "diffusion_jax.lab.training.measuring": "train",
}
# Arguments of functions that are not ours.
FOREIGN = {"file_format", "rowvar", "check_vma", "xla_name", "return_inverse"}


def named(parser):
    for action in parser._actions:
        yield from (f for f in action.option_strings if f.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from named(one)


def flags_of(command):
    kinds = {
        "train": [arguments.Training],
        "distil": [arguments.Training],
        "edit": list(edit.COMMANDS.values()),
        "codec": list(codec.COMMANDS.values()),
        "runs": list(listing.COMMANDS.values()),
    }
    if command not in kinds:
        kinds = {command: [importlib.import_module(f"experiments.{command}").Options]}
    found = {flag for k in kinds[command] for flag in named(tyro.extras.get_parser(k))}
    return {flag.replace("_", "-") for flag in found} | {*joining.FLAGS, HELP_ALL}


def texts(tree):
    """Returns the strings of a tree, {} in place of values, without docstrings."""
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = getattr(node, "value", None)
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = (getattr(part, "value", None) for part in node.values)
            yield "".join(p if isinstance(p, str) else "{}" for p in parts)
        elif isinstance(text, str) and id(node) not in skipped:
            yield text


def imports(tree):
    """Returns the modules of ours that a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from {node.module, f"{node.module}.{alias.name}"} & TREES.keys()


IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}


def reached(name, seen):
    """Returns all modules that one imports, with what these import."""
    for other in IMPORTS[name] - seen:
        seen.add(other)
        reached(other, seen)
    return seen


REACHED = {c: reached(f"experiments.{c}", {f"experiments.{c}"}) for c in COMMANDS}


def test_flags_in_messages_are_there():
    with pytest.warns(DeprecationWarning, match="get_parser"):
        flags = {command: flags_of(command) for command in COMMANDS}
    wrong = []
    for name, tree in TREES.items():
        askers = [c for c in COMMANDS if name in REACHED[c]]
        askers = ASKED_BY[name].split() if name in ASKED_BY else askers
        for text in texts(tree):
            if OF_OTHERS.search(text):
                continue
            where = SAYS.search(text)
            of = [where[1] or "train"] if where else askers
            for word in FLAG.findall(text):
                flag = f"--{word.replace('_', '-')}"
                lacking = [command for command in of if flag not in flags[command]]
                if ANYWHERE.search(text):
                    lacking = [] if any(flag in f for f in flags.values()) else [text]
                if lacking:
                    wrong.append(f"{name}: {flag} is not in {lacking}: {text}")
    assert not wrong, "\n".join(wrong)


def test_arguments_in_messages_are_there():
    taken = {name: set(parameters(tree)) for name, tree in TREES.items()}
    for name, tree in TREES.items():
        callers = [other for other in TREES if name in IMPORTS[other]]
        around = (name, *callers, *IMPORTS[name])
        known = FOREIGN.union(*(taken[other] for other in around))
        raised = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
        for text in (text for node in raised for text in texts(node)):
            unknown = set(ARGUMENT.findall(text)) - known
            assert not unknown, f"{name}: {unknown}: {text}"


def parameters(tree):
    """Returns the arguments of public functions, and the fields of classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            yield from (a.arg for a in (*node.args.args, *node.args.kwonlyargs))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
