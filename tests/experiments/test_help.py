"""What `--help` says: on a screen what matters, and of all when all is asked for."""

import importlib
import re
import sys

import pytest

import experiments.__main__ as entry_point
from diffusion_jax.lab.process import entry, flags
from experiments import codec, edit
from experiments import runs as listing
from experiments.configs import EXPERIMENTS, table

OF_SEVERAL = {
    "edit": edit.COMMANDS,
    "codec": codec.COMMANDS,
    "runs": listing.COMMANDS,
}
COMMANDS = [*entry_point.COMMANDS, "train cifar10"]
COMMANDS += [f"{of} {name}" for of, names in OF_SEVERAL.items() for name in names]
SEVERAL = ("train", "sample", "eval_fid")
WITHOUT_FLAGS = ("checkpoints", "runs list", "runs compare")
FLAG = r"--[a-z][a-z0-9.-]*"


def helped(monkeypatch, capsys, line):
    name, *words = line.split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    main = importlib.import_module(f"experiments.{name}").main
    with pytest.raises(SystemExit) as left:
        entry.guarded(main, several=name in SEVERAL)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_names_only_flags_that_exist(
    command, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    shown = helped(monkeypatch, capsys, f"{command} --help")
    lines = shown.splitlines()
    assert lines[0].startswith(f"usage: python -m experiments.{command.split()[0]} ")
    assert len(lines) <= 53
    assert max(map(len, lines)) <= 80
    if command in OF_SEVERAL:
        return
    assert "--help-all" in shown
    known = set(re.findall(FLAG, helped(monkeypatch, capsys, f"{command} --help-all")))
    listed = re.findall(rf"^  ({FLAG})", shown, re.M)
    assert len(listed) >= (command not in WITHOUT_FLAGS)
    assert set(listed) <= known


def test_help_of_training_has_the_experiments_in_a_table(monkeypatch, capsys):
    shown = helped(monkeypatch, capsys, "train --help")
    assert table() in shown
    assert re.search("^  cifar10_edm +cifar10 +32x32 +EDM$", shown, re.M)
    assert 15 <= len(re.findall(rf"^  {FLAG}", shown, re.M)) <= 22
    starts = re.findall(r"^  ([a-z0-9_]+\*?) ", table(), re.M)
    for name in EXPERIMENTS:
        assert any(re.fullmatch(start.replace("*", ".*"), name) for start in starts)


def test_a_name_of_no_flag_is_not_shown():
    class Wrong(edit.edit_options.Shared):
        MAIN = "nothing"

    with pytest.raises(KeyError):
        flags.main_flags(Wrong, None, "command", "")
