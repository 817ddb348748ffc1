"""What an installed package offers: commands by name, and extras that are named."""

import configparser
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import diffusion_jax
import experiments.__main__ as entry_point
from diffusion_jax import ode
from diffusion_jax.data import datasets, parquet
from diffusion_jax.errors import MissingError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.network_files import diffusers_config, hub
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.training import loop
from experiments import ablation, compare_samplers, eval_nll, legibility

ROOT = Path(diffusion_jax.__file__).parents[1]
EXTRAS = {
    "sklearn: digits": [
        lambda: datasets.load("digits"),
        lambda: legibility.main([]),
    ],
    "matplotlib: plots": [
        lambda: pictures.curve([1], [1], title="", ylabel="", path="a.png"),
        # Before anything that takes long.
        lambda: ablation.main([]),
        lambda: compare_samplers.main([]),
        lambda: eval_nll.main(["--rate-distortion"]),
    ],
    "pyarrow: parquet": [lambda: parquet.find("a.parquet")],
    "diffrax: ode": [
        lambda: ode.integrate(lambda x, t: -x, jnp.ones([1, 1]), 0.0, 1.0)
    ],
    "huggingface_hub: hub": [lambda: hub.fetch("me/alone")],
    "torch: peers": [diffusers_config.peers],
}


@pytest.mark.parametrize("what", EXTRAS)
def test_an_extra_that_is_missing_is_named(what, monkeypatch):
    package, extra = what.split(": ")
    monkeypatch.setitem(sys.modules, package, None)
    offered = configparser.ConfigParser()
    offered.read(ROOT / "setup.cfg")
    assert extra in offered["options.extras_require"]
    install = rf"Install it with pip install 'diffusion-jax\[{extra}\]'\."
    for call in EXTRAS[what]:
        with pytest.raises(MissingError) as error:
            call()
        said = rf"cannot .+: {package} is missing\. {install}"
        assert re.fullmatch(said, str(error.value))


def test_a_run_ends_without_its_plot_where_there_is_nothing_to_draw_it(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = [{"step": 1, "loss": 0.5}]
    said = loop.draw_loss(Config(), runs.Run(tmp_path), line)
    assert str(said).startswith("none: cannot draw a plot: matplotlib is missing")


def typed(monkeypatch, capsys, *words):
    """The exit code, and what was printed, of words after the name of the script."""
    monkeypatch.setattr(sys, "argv", ["diffusion-jax", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/diffusion-jax", *words])
    try:
        code = entry_point.main() or 0
    except SystemExit as left:
        code = left.code
    return code, "".join(capsys.readouterr())


def test_each_command_is_run_by_its_name(monkeypatch, capsys):
    files = {path.stem for path in Path(entry_point.__file__).parent.glob("[a-z]*.py")}
    assert set(entry_point.COMMANDS) == files
    code, said = typed(monkeypatch, capsys, "--help")
    assert code == 0
    for name, what in entry_point.COMMANDS.items():
        assert re.search(rf"^  {name} +{what}$", said, re.M)
    assert max(map(len, said.splitlines())) <= 88
    assert typed(monkeypatch, capsys) == (code, said)
    code, said = typed(monkeypatch, capsys, "--version")
    assert (code, said) == (0, f"diffusion_jax {diffusion_jax.__version__}\n")
    code, said = typed(monkeypatch, capsys, "chekpoints")
    assert code == 2
    assert "must be one of" in said
    assert "got 'chekpoints'. Did you mean 'checkpoints'?" in said


@pytest.mark.filterwarnings("ignore:.*experiments:RuntimeWarning")
@pytest.mark.parametrize("words", ["train cifar10", "edit"])
def test_help_says_what_was_typed(words, monkeypatch, capsys):
    code, said = typed(monkeypatch, capsys, *words.split(), "--help")
    assert code == 0
    assert f"usage: diffusion-jax {words}" in said
