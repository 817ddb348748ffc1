"""Nonsense given to commands as a person gives it; and how much of it there is in all.

The other files give it to the same commands in their own process: see nonsense.py.
"""

import collections
import os
import pickle
import shutil
import subprocess
import sys

import nonsense
import pytest
import test_nonsense_config
import test_nonsense_files
import test_nonsense_images
import test_nonsense_weights

FILES = (
    test_nonsense_config,
    test_nonsense_files,
    test_nonsense_images,
    test_nonsense_weights,
)
LEAST = 300


def test_there_is_enough_nonsense(capsys):
    """Each case is another, and each file's are run by its own tests."""
    every = [case for file in FILES for case in file.CASES]
    names = collections.Counter(map(str, every))
    assert [name for name, count in names.items() if count > 1] == []
    assert len(every) >= LEAST
    kinds = collections.Counter(case.kind for case in every)
    with capsys.disabled():
        print(f"\n{len(every)} malformed inputs")
        for kind, count in kinds.most_common():
            print(f"  {count:4d}  {kind}")


def case_of(file, name):
    return next(case for case in file.CASES if case.name == name)


COMMANDS = {
    "sample of a pickle": (
        ["sample", "BAD"],
        case_of(test_nonsense_weights, "a pickle"),
        "bad.safetensors",
    ),
    "convert of a pickle of the new PyTorch": (
        ["convert", "BAD", "out.safetensors"],
        case_of(test_nonsense_weights, "a pickle of the new PyTorch"),
        "bad.bin",
    ),
    "eval_nll of objects": (
        ["eval_nll", "net.safetensors", "--data", "npz:BAD"],
        case_of(test_nonsense_files, "objects"),
        "bad.npz",
    ),
    "eval_fid of a lying header": (
        ["eval_fid", "net.safetensors", "--data", "digits", "--samples", "npz:BAD"],
        case_of(test_nonsense_files, "a header of all images there are"),
        "bad.npz",
    ),
    "train on a pickle of code": (
        ["train", "cifar10", "--data.path", "BAD"],
        case_of(test_nonsense_files, "a pickle of code"),
        "bad.tar.gz",
    ),
    "train on an archive with a link": (
        ["train", "cifar10", "--data.path", "BAD"],
        case_of(test_nonsense_files, "a symbolic link"),
        "bad.tar.gz",
    ),
    "edit of a bomb": (
        ["edit", "net.safetensors", "vary", "BAD"],
        case_of(test_nonsense_images, "a PNG of 10 gigapixels"),
        "bad.png",
    ),
}
# Address space of a command that imports JAX, and no more than it needs for that.
ROOM = 12 * 2**30


# Each takes the seconds that it takes to import JAX.
QUICK = ("sample of a pickle", "eval_nll of objects", "edit of a bomb")


@pytest.mark.parametrize("name", COMMANDS if nonsense.THOROUGH else QUICK)
def test_a_command_refuses_in_its_own_process(name, tmp_path):
    (module, *argv), case, file = COMMANDS[name]
    nonsense.write_network(tmp_path / "net.safetensors")
    made = case.make[1] if isinstance(case.make, tuple) else case.make
    (tmp_path / file).write_bytes(made(tmp_path) if callable(made) else made)
    before = nonsense.listing(tmp_path)
    done = subprocess.run(
        [
            *("bash", "-c", f'ulimit -v {ROOM // 1024}; exec "$@"', "bash"),
            sys.executable,
            "-m",
            f"experiments.{module}",
            *(word.replace("BAD", str(tmp_path / file)) for word in argv),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    nonsense.check_words(done.stderr)
    assert file in done.stderr
    assert nonsense.listing(tmp_path) == before


def test_a_canary_sings_where_it_is_run(tmp_path):
    """What proves that nothing is executed, would show it if it were."""
    pickle.loads(nonsense.evil(tmp_path))
    assert (tmp_path / "canary").is_dir()
    shutil.rmtree(tmp_path / "canary")


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
