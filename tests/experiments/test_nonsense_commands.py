"""Every command that reads a file is given a program in its place, which is not run."""

import json
import os
import pickle
import resource
import subprocess
import sys

import nonsense
import pytest
from PIL import Image

from diffusion_jax.lab.network_files import diffusers_config
from diffusion_jax.lab.schema import config

# By what is in the place of a file, every command that reads it.
READERS = {
    "bad": """
        sample bad; eval_fid bad --data digits; eval_nll bad --data digits;
        edit bad vary image.png; convert bad out; compare_samplers bad; legibility bad;
        train digits --init-from bad; convert bad out.safetensors --inception;
        eval_fid net --data digits --extractor inception --weights bad;
        eval_fid net --data digits --reference bad; eval_nll net --data npz:bad;
        eval_fid net --data digits --samples npz:bad; eval_nll net --data idx:bad;
        edit net vary bad; edit net inpaint image.png bad""",
    "cifar.tar.gz": "train cifar10 --data.path cifar.tar.gz",
    "images/bad.png": """
        train digits --data.source folder:images;
        eval_fid net --data digits --samples folder:images""",
    "runs/digits/config.json": """
        sample digits; eval_fid digits; eval_nll digits; edit digits vary image.png;
        convert digits out; compare_samplers digits; legibility digits;
        train digits --init-from runs/digits""",
    "runs/.classifiers/digits_8x8x1.safetensors": """
        eval_fid digits; compare_samplers digits""",
    "diffusers/scheduler_config.json": """
        sample diffusers; convert diffusers out; train digits --init-from diffusers""",
    "diffusers/diffusion_pytorch_model.bin": "convert diffusers out",
}
CASES = [
    (file, " ".join(line.split()))
    for file, lines in READERS.items()
    for line in lines.split(";")
]
# Address space of a command that imports JAX, and no more than it needs for that.
ROOM = 12 * 2**30
CHILDREN = resource.RUSAGE_CHILDREN


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which everything is right, until something is put into it."""
    nonsense.alone(monkeypatch, tmp_path)
    nonsense.write_network(tmp_path / "net")
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    small = config.replace(nonsense.SMALL, "data", source="digits")
    unet, scheduler = diffusers_config.to_diffusers(small)
    for name, values in {
        "runs/digits/config": config.to_dict(small),
        "diffusers/config": unet,
        "diffusers/scheduler_config": scheduler,
    }.items():
        nonsense.put(json.dumps(values).encode(), tmp_path / f"{name}.json")
    return tmp_path


@pytest.mark.parametrize(("file", "line"), CASES)
def test_a_program_is_refused_by_every_command_that_reads_data(file, line, folder):
    nonsense.put(nonsense.evil, folder / file)
    assert file.rpartition("/")[2] in nonsense.refuse_line(line, folder)


SOON = ["train nothing", "train --train.stepz=3"]


# Each of the others takes the seconds that it takes to import JAX.
@pytest.mark.parametrize(
    "line",
    [*SOON, "train digits --name new --train.devices 99", "sample bad"],
)
def test_a_command_refuses_in_its_own_process(line, folder):
    nonsense.put(nonsense.evil, folder / "bad")
    before, began = nonsense.listing(folder), resource.getrusage(CHILDREN)
    done = subprocess.run(
        [
            *("bash", "-c", f'ulimit -v {ROOM // 1024}; exec "$@"', "bash"),
            *(sys.executable, "-m", *f"experiments.{line}".split()),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    ended = resource.getrusage(CHILDREN)
    assert done.returncode == 2, done.stderr
    nonsense.check_words(done.stderr)
    assert ("bad" in done.stderr) == ("bad" in line)
    assert nonsense.listing(folder) == before
    # Processor time, which does not depend on what else the machine is doing: the
    # wall shows less than this on an idle one.
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    assert line not in SOON or seconds < 5, f"took {seconds:.1f} s"


def test_a_canary_sings_where_it_is_run(tmp_path):
    """What proves that nothing is executed, would show it if it were."""
    pickle.loads(nonsense.evil(tmp_path))
    assert (tmp_path / "canary").is_dir()


def test_a_believed_header_is_noticed():
    with pytest.raises(MemoryError), nonsense.little_memory():
        bytearray(4 * nonsense.ROOM)


def test_a_command_that_does_anything_is_noticed(tmp_path):
    """Each promise that `refuse` holds a command to, broken once."""

    def fails(argv):
        raise ValueError("no words of ours")

    def wrong(argv):
        raise ValueError("x must be 1; got 2. Give 1.")

    def writes(argv):
        (tmp_path / "trace").write_text("")
        return wrong(argv)

    def succeeds(argv):
        return 0

    assert "must be 1" in nonsense.refuse(wrong, [], tmp_path)
    with pytest.raises(ValueError, match="no words"):
        nonsense.refuse(fails, [], tmp_path)
    for main in (writes, succeeds):
        with pytest.raises(AssertionError):
            nonsense.refuse(main, [], tmp_path)
