"""Drawings say how they were made, and take the place of nothing else."""

import importlib
import json
import os
import re
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import experiments
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.drawing import edit_options, outputs
from diffusion_jax.lab.run_folder import results
from experiments import codec, edit, sample

FEW = ("--count", "3", "--no-strip")


def draw(run, *flags):
    assert sample.main([str(run.folder), *FEW, *flags]) == 0


def test_ways_to_draw_do_not_meet_and_say_what_they_are(trained):
    draw(trained)
    draw(trained, "--sampler", "ddim", "--steps", "2")
    draw(trained, "--raw", "--format", "npz")
    *pictures, raw = sorted((trained.folder / "draw").iterdir())
    assert [path.name for path in (*pictures, raw)] == [
        "seed0_3.png",
        "seed0_3_ddim_steps2.png",
        "seed0_3_raw.npz",
    ]
    about = []
    for path in pictures:
        with Image.open(path) as picture:
            about.append(json.loads(picture.text["Description"]))
    with np.load(raw) as file:
        about.append(json.loads(str(file["about"])))
        assert file["images"].shape == (3, 8, 8, 1)
    said = [(a["sampler"], a["seed"]) for a in about]
    assert said == [("ddpm", 0), ("ddim", 0), ("ddpm", 0)]
    assert about[1]["command"].endswith("--count 3 --no-strip --sampler ddim --steps 2")
    digests = [a["weights_sha256"] for a in about]
    assert digests[0] == digests[1] != digests[2]


def test_a_set_takes_the_place_of_a_larger_one_and_of_nothing_else(trained, tmp_path):
    out = tmp_path / "set"
    flags = ("--format", "png", "--out", str(out), "--sampler", "ddim")
    draw(trained, *flags)
    assert sample.main([str(trained.folder), "--count", "2", *flags]) == 0
    assert sorted(os.listdir(out)) == ["000000.png", "000001.png"]
    with pytest.raises(ConfigError, match="there is step_0"):
        draw(trained, "--format", "png", "--out", str(trained.samples))
    (out / "000001.png").write_bytes(b"not of ours")
    with pytest.raises(ConfigError, match=r"there is 000001\.png"):
        outputs.check_folder(out)
    with pytest.raises(ConfigError, match="that is no folder"):
        outputs.check_folder(out / "000000.png")
    with pytest.raises(ConfigError, match="that is no file"):
        outputs.check_file(out, overwrite=True)


# By command: what it is given to write precious files, RUN for one that is trained.
WRITTEN = {
    "sample RUN --no-strip --out f": "f",
    "sample RUN --out f.png": "f_denoising.png",
    "sample RUN --format npz --out f": "f",
    "sample RUN --exact --out f.png": "f.json",
    "sample RUN --figure quality --out f.png": "f.json",
    "edit RUN vary /nowhere --out f.png": "f.png",
    "codec compress RUN --data --out f": "f",
    "codec decompress /nowhere --out f.npz": "f.npz",
    "bench digits --out f": "f",
    "bench digits --table --out f.json": "f.md",
    "compiled digits --out f": "f",
    "compiled digits --text f": "f",
    "convert RUN f.safetensors": "f.safetensors",
    "compare_samplers RUN --out .": "samplers.json",
    "compare_samplers RUN --out . --evaluations 9": "samplers.png",
    "compare_diffusers --keep .": "converted.safetensors",
    "report RUN --out f": "f",
    "playground RUN --page f.html": "f.html",
}
# Other paths that commands take: what they read, or a folder that is theirs alone.
READ = {"folder", "image", "mask", "first", "second", "listed", "file", "files"}
READ |= {"reference"}


@pytest.mark.parametrize("line", WRITTEN)
def test_what_a_command_did_not_write_stays(line, trained, tmp_path, monkeypatch):
    """And is named before anything compiles."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / WRITTEN[line]
    mine.write_text("precious")
    name, *flags = line.replace("RUN", str(trained.folder)).split()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", None)
        with pytest.raises(ConfigError, match=r"cannot write .*or give --overwrite"):
            importlib.import_module(f"experiments.{name}").main(flags)
    assert [mine] == list(tmp_path.iterdir())
    assert mine.read_text() == "precious"


def test_every_path_that_a_command_takes_is_one_of_these():
    kinds = [("edit", kind) for kind in (*edit.COMMANDS.values(), edit_options.Shared)]
    kinds += [("codec", kind) for kind in codec.COMMANDS.values()]
    for file in Path(experiments.__file__).parent.glob("[!_]*.py"):
        module = importlib.import_module(f"experiments.{file.stem}")
        kinds += [(file.stem, module.Options)] if hasattr(module, "Options") else []
    found = {
        (command, name)
        for command, kind in kinds
        for name, hint in typing.get_type_hints(kind).items()
        if Path in (hint, *typing.get_args(hint)) and name not in READ
    }
    flags = {
        (line.split()[0], f)
        for line in WRITTEN
        for f in re.findall(r"--(\w+) \S", line)
    }
    assert found <= flags | {("convert", "out")}


def test_a_drawing_takes_any_place_when_told_to(trained, tmp_path):
    mine = tmp_path / "precious.txt"
    for kind in ("grid", "npz"):
        mine.write_text("keep")
        flags = ("--format", kind, "--overwrite", "--sampler=ddim")
        draw(trained, "--out", str(mine), *flags)
        outputs.check_file(mine, overwrite=False)  # it is one now


def test_results_add_up_and_those_of_other_weights_are_left_out(trained):
    for value, digest in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        results.write(trained, "fid", {"mean": value, "weights_sha256": digest})
    folder = trained.folder / "eval"
    (folder / "samplers.json").write_text('{"rows": []}')
    (folder / "list.json").write_text("[1]")
    with (folder / results.ALL).open("a") as file:
        file.write('{"cut o')
    found = [(name, values["mean"]) for name, values in results.read(trained, "a")]
    assert found == [("fid", 3.0), ("fid", 1.0), ("fid", 3.0)]
