"""Several hosts do what one does; and whatever is wrong is said, and never waited for.

Hosts are processes on this machine: see processes.py.
"""

import json
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import small_run
from jax.flatten_util import ravel_pytree

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.lab.process import entry, hosts, joining
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.wiring import build
from experiments import eval_fid, sample, train

# Without grids: drawing on several hosts has a test of its own.
HERE = shlex.split(
    "--train.devices 4 --optimizer.decay constant --train.steps 1000000 "
    "--sample.every 1000000"
)


@pytest.fixture(scope="module")
def folder(trained):
    """Of runs, and of the classifier that judges them; their networks are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_network", small_run.make_small)
        yield trained.folder.parent


def arguments_of(folder, name, *flags):
    where = ["--output", str(folder), "--name", name]
    return ["digits", *small_run.SMALL, *HERE, *where, *flags]


def here(folder, name, stop):
    """Trains up to a step in this process, on as many devices as two hosts have."""
    return small_run.train_small(folder, name, *HERE, "--train.stop-at", str(stop))


def assert_near(found, wanted, rtol):
    """Dictionaries and lists are the same but for rounding."""
    (a, form), (b, other) = map(jax.tree.flatten, (found, wanted))
    assert form == other
    np.testing.assert_allclose(a, b, rtol)


def assert_as_alone(run, folder, step):
    """A run is at a step what one host by itself makes of it, but for rounding."""

    def found(run):
        state, meta, *_ = small_run.restored(run)
        moments = state.opt_state[0]
        kinds = state.params, state.averages, moments.mu, moments.nu
        each = [ravel_pytree(kind)[0] for kind in kinds]
        exact = int(state.step), jax.random.key_data(state.key).tolist()
        return each, exact, meta["pending"], runs.read_lines(run.metrics)

    alone = here(folder, f"alone_{step}", step)
    each, exact, pending, lines = found(run)
    wanted, same, waiting, expected = found(alone)
    assert exact == same
    for x, y in zip(each, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
    assert_near(pending, waiting, 1e-6)
    assert_near(lines, expected, 1e-5)


# Three commands in one pair of processes: to come so far takes most of the time.
WALK = """
import shlex
from diffusion_jax.lab.process import entry
from experiments import eval_fid, sample, train

def walk(argv):
    drawing, judging, training = map(shlex.split, argv)
    return sample.main(drawing) or eval_fid.main(judging) or train.main(training)

entry.guarded(walk, several=True)
"""


@pytest.fixture(scope="module")
def walked(folder):
    """Two hosts that drew, judged and went on with a run, until one got a signal.

    Their ends, what was drawn and judged with which arguments, and the run.
    """
    run, out = here(folder, "begun", 7), str(folder / "drawn.npz")
    of = shutil.copytree(run.folder, folder / "drawn")
    drawing = [str(of), *shlex.split("--count 6 --batch-size 4 --format npz"), "--out"]
    drawing.append(out)
    judging = [str(of), *shlex.split("--count 90 --steps 3 --batch-size 45")]
    lines = map(shlex.join, (drawing, judging, arguments_of(folder, "begun")))
    code = processes.KEEP + processes.TINY + WALK
    with processes.started(["-c", code, *lines], devices=2) as both:
        processes.wait_for(lambda: len(runs.read_lines(run.metrics)) >= 2, *both)
        both[1].send_signal(signal.SIGTERM)
        return processes.ended(both), (drawing, judging), run


def test_what_one_host_began_two_go_on_with_until_one_gets_a_signal(folder, walked):
    results, _, run = walked
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    foreign = "[Gloo]", "connected to"  # of the library that connects CPUs
    first, second = (
        [line for line in output.splitlines() if not any(w in line for w in foreign)]
        for _, output, _ in results
    )
    assert first[0] == "2 hosts, 4 devices"
    assert any(one.startswith("going on from step 7 of 1,000,000") for one in first)
    assert any("the same command goes on from here" in line for line in first)
    assert second == []
    assert "loss" not in results[1][2]
    assert not list(run.folder.glob(".hosts_*"))
    step = checkpoint.steps(run.checkpoints)[-1]
    assert step % hosts.ASK_EVERY == 1  # asked after one step, read after the next
    assert_as_alone(run, folder, step)


def test_two_hosts_draw_and_evaluate_as_one(walked, folder):
    results, (drawing, judging), _ = walked
    assert "fd_digits_classifier vs train" in results[0][1]
    cache, of = folder / ".cache" / "reference", Path(judging[0])

    def made():
        assert list(cache.iterdir())
        found = json.loads((of / "eval" / "fid.json").read_text())
        return np.load(drawing[-1])["images"].astype(int), found

    images_of_two, two = made()
    for path in (of / "eval", cache):
        shutil.rmtree(path)
    Path(drawing[-1]).unlink()
    assert sample.main(drawing) == eval_fid.main(judging) == 0
    images, one = made()
    assert images.std() > 10
    assert np.abs(images - images_of_two).max() <= 1
    assert (images != images_of_two).mean() < 0.02
    shares = (found["numbers"].pop("class_shares") for found in (two, one))
    np.testing.assert_allclose(*shares, atol=1e-4)
    for part in ("numbers", "half_of_train_against_the_other_half"):
        assert_near(two[part], one[part], 1e-4)


# A host that is silent for seconds counts as dead.
WATCHFUL = """
from diffusion_jax.lab.process import joining
joining.SILENT = 8
"""


def test_a_killed_host_ends_the_other_and_the_run_goes_on(folder):
    flags = arguments_of(folder, "killed", "--train.checkpoint-every", "200")
    run = runs.Run(folder / "killed")
    command = ["-c", processes.KEEP + WATCHFUL + processes.TRAIN, *flags]

    def beyond():
        saved = checkpoint.steps(run.checkpoints)
        return saved and runs.read_lines(run.metrics)[-1]["step"] > saved[-1] + 9

    with processes.started(command, devices=2) as both:
        processes.wait_for(beyond, *both)
        both[1].kill()
        killed = time.monotonic()
        [(code, _, errors)] = processes.ended(both[:1])
    assert code != 0
    assert time.monotonic() - killed < 60
    assert "must work until the end" in errors or "another task died" in errors
    step = checkpoint.steps(run.checkpoints)[-1] + 3
    here(folder, "killed", step)
    assert_as_alone(run, folder, step)


def test_the_loss_of_a_host_is_said_and_a_bug_shown(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(joining, "leave", left.append)
    lost = RuntimeError("UNKNOWN: Gloo all-reduce failed\nmore")
    joining._fail(RuntimeError, lost, None)
    said = capsys.readouterr().err
    assert "must work until the end; got UNKNOWN: Gloo all-reduce failed. See" in said
    joining._fail(KeyError, KeyError("a bug"), None)
    assert "KeyError: 'a bug'" in capsys.readouterr().err
    assert left == [1, 1]


# A command that needs no network, with shorter patience than that of a person.
IMPATIENT = """
import sys
from pathlib import Path
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts, joining
joining.TIMEOUT = hosts.SEEN_WITHIN = 3
given, rest = joining.split(sys.argv[1:])
joining.join(joining.decide(given, {}))
for check in (
    lambda: hosts.check_same("the word", "same"),
    lambda: hosts.check_shared(Path(rest[0])),
    lambda: hosts.check_shared(Path("runs")),
    lambda: hosts.check_same("the word", given["--host"]),
):
    try:
        check()
    except ConfigError as error:
        print(error, file=sys.stderr)
joining.leave(2)
"""


def test_what_hosts_do_not_share_is_named(tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    results = processes.run(["-c", IMPATIENT, str(tmp_path)], places=places)
    for code, _, errors in results:
        assert code == 2, results
        unshared, unlike = (line for line in errors.splitlines() if "; got " in line)
        assert "/runs must be on a disk that all hosts share; got nothing" in unshared
        assert "on host 1 of what host 0 wrote there. Give a folder" in unshared
        assert "the word must be the same on all hosts; got another on host 1" in unlike


def test_a_coordinator_that_does_not_answer_is_named(tmp_path):
    with processes.started(["-c", IMPATIENT, str(tmp_path)], indices=[1]) as alone:
        [(code, _, errors)] = processes.ended(alone)
    assert code == 2
    assert "all 2 hosts must meet at 127.0.0.1:" in errors
    assert "within 3 s; got no answer for host 1. Start the same command" in errors


NODE = "SLURM_JOB_ID=7 SLURM_PROCID=1 SLURM_LOCALID=1"
STEP = f"{NODE} SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_NODES=2"
RANK = "OMPI_COMM_WORLD_RANK=1 OMPI_MCA_orte_hnp_uri=1.0;tcp://10.0.0.1:1"
MPI = f"OMPI_COMM_WORLD_SIZE=2 {RANK}"
SECOND = f"{MPI} OMPI_COMM_WORLD_LOCAL_RANK=1"
POD = "KUBERNETES_SERVICE_HOST=10.0.0.1 JOB_COMPLETION_INDEX=1"
# By environment: who announces several processes, and which GPU is this one's.
ANNOUNCED = {
    "": None,
    # salloc, or a script of sbatch: the job has tasks, this process is alone.
    f"{NODE} SLURM_NTASKS=4": None,
    f"{STEP} SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1": None,
    f"{STEP} SLURM_STEP_NUM_TASKS=2": ("SLURM", None),
    f"{STEP} SLURM_STEP_NUM_TASKS=16": ("SLURM", (1,)),
    f"{STEP} SLURM_STEP_NUM_TASKS=16 CUDA_VISIBLE_DEVICES=0": ("SLURM", None),
    f"{MPI} OMPI_COMM_WORLD_LOCAL_SIZE=1": ("Open MPI", None),
    f"{SECOND} OMPI_COMM_WORLD_LOCAL_SIZE=2": ("Open MPI", (1,)),
    # mpirun in an allocation of SLURM: its daemons are the step, not we.
    f"{STEP} SLURM_STEP_NUM_TASKS=2 {MPI}": ("Open MPI", None),
    f"OMPI_COMM_WORLD_SIZE=1 {RANK}": None,
    "TPU_WORKER_HOSTNAMES=localhost": None,
    "TPU_WORKER_HOSTNAMES=a,b TPU_WORKER_ID=1": ("the TPU slice", None),
    "TPU_WORKER_HOSTNAMES=a MEGASCALE_NUM_SLICES=2": ("the TPU slice", None),
    POD: None,  # may be one of many runs, as in a search
}


def env_of(text):
    return dict(word.split("=", 1) for word in text.split())


@pytest.mark.parametrize("env", ANNOUNCED)
def test_several_processes_are_seen_where_they_are_announced(env):
    job, found = joining.decide({}, env_of(env)), ANNOUNCED[env]
    assert job == (found and joining.Job(found[0], devices=found[1]))
    assert joining.decide({"--hosts": "1"}, env_of(env)) is None
    # A pod that works by itself is told how to join.
    said = "--host $JOB_COMPLETION_INDEX" in str(joining.note(env_of(env)))
    assert said == (env == POD)


def test_the_coordinator_is_named_by_flags_or_environment():
    def decided(flags, env=""):
        return joining.decide(joining.split(flags.split())[0], env_of(env))

    address, given = "JAX_COORDINATOR_ADDRESS", "--coordinator b:2 --hosts 4 --host 3"
    numbered = f"{address}=a:1 JAX_NUM_PROCESSES=3 JAX_PROCESS_ID=2"
    assert decided("", f"{address}=a:1") == joining.Job(address, "a:1")
    assert decided("", numbered) == joining.Job(address, "a:1", 3, 2)
    job = decided(given, f"{numbered} {STEP}")
    assert job[:4] == ("--coordinator", "b:2", 4, 3)
    assert decided("--coordinator [::1]:5 --hosts 2 --host 1")[1] == "[::1]:5"
    assert decided("--coordinator b:2 --hosts 1 --host 0") is None
    assert decided("--hosts auto") == joining.Job("--hosts auto")


UNFIT = {
    "--hosts 2": "no --coordinator and no --host",
    "--coordinator a:1 --host 0": "no --hosts",
    "--coordinator a:1 --hosts 2 --host 2": "2",
    "--coordinator a:1 --hosts 0 --host 0": "0",
    "--coordinator a:1 --hosts two --host 0": "'two'",
    "--coordinator a:1 --hosts 2 --host -1": "'-1'",
    "--coordinator a --hosts 2 --host 0": "'a'",
    "--coordinator a:99999 --hosts 2 --host 0": "'a:99999'",
    "--coordinator": "''",
    "JAX_COORDINATOR_ADDRESS=a:1 JAX_NUM_PROCESSES=x": "'x'",
    "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1": "2 processes without it",
}


def test_what_does_not_fit_is_refused(refuses):
    for said, got in UNFIT.items():
        flags, env = (said, "") if said.startswith("--") else ("", said)
        with refuses(got):
            joining.decide(joining.split(flags.split())[0], env_of(env))


def test_a_command_for_one_host_says_so_before_it_waits(monkeypatch, capsys):
    def leaves(main, *flags, **options):
        monkeypatch.setattr(sys, "argv", ["command", *flags])
        with pytest.raises(SystemExit) as left:
            entry.guarded(main, **options)
        return left.value.code

    several = ["--coordinator", "10.0.0.1:1", "--hosts", "2", "--host", "0"]
    assert leaves(lambda argv: 1 / 0, *several) == 2
    assert "must run on one host" in capsys.readouterr().err
    assert leaves(lambda argv: argv == ["x"], "x", "--hosts=1") is True
    # And help, which joins none, speaks of hosts.
    assert leaves(train.main, "--help", *several, several=True) == 0
    shown = capsys.readouterr().out
    assert "--train.batch-size" in shown
    assert all(flag in shown for flag in joining.FLAGS)
