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

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry, hosts, joining
from diffusion_jax.lab.run_folder import runs
from experiments import eval_fid, sample, train

HERE = ["--train.devices", "4", "--optimizer.decay", "constant"]
# Without grids: drawing on several hosts has a test of its own.
ENDLESS = ["--train.steps", "1000000", "--sample.every", "1000000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def arguments_of(folder, name, *flags):
    where = ["--output", str(folder), "--name", name]
    return ["digits", *small_run.SMALL, *HERE, *ENDLESS, *where, *flags]


def here(folder, name, stop):
    """Trains up to a step in this process, on as many devices as two hosts have."""
    until = ["--train.stop-at", str(stop)]
    return small_run.train_small(folder, name, *HERE, *ENDLESS, *until)


def final_state(run):
    state, meta, *_ = small_run.restored(run)
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), meta


def assert_same_numbers(state, other):
    """Within a millionth of the largest number of the kind: weights, or a moment.

    But for the bias of the keys in attention, whose gradient is zero: Adam follows its
    rounding error.
    """
    moments, others = state.opt_state[0], other.opt_state[0]
    for kind, same in (
        (state.params, other.params),
        (state.averages, other.averages),
        (moments.mu, others.mu),
        (moments.nu, others.nu),
    ):
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(same))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(kind),
            jax.tree.leaves(same),
            strict=True,
        ):
            if not jax.tree_util.keystr(path).endswith("['key']['bias']"):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest)
    assert state.step == other.step
    np.testing.assert_array_equal(state.key, other.key)


def assert_as_alone(run, folder, step):
    """A run is at a step what one host by itself makes of it."""
    alone = here(folder, f"alone_{step}", step)
    (state, pending), (expected, waiting) = final_state(run), final_state(alone)
    assert_same_numbers(state, expected)
    hold_near(pending["pending"], waiting["pending"], 1e-6)
    hold_near(lines_of(run), lines_of(alone), 1e-5)


def hold_near(found, wanted, rtol):
    """Lists of dictionaries are the same but for rounding."""
    (a, form), (b, other) = (jax.tree.flatten(each) for each in (found, wanted))
    assert form == other
    np.testing.assert_allclose(a, b, rtol)


def lines_of(run):
    return runs.read_lines(run.metrics)


def printed(output):
    """What a command printed, but for the library that connects CPUs."""
    foreign = "[Gloo]", "connected to"
    return [s for s in output.splitlines() if not any(word in s for word in foreign)]


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
def walked(folder, trained):
    """Two hosts that drew, judged and went on with a run, until one got a signal.

    Their ends, what was drawn and judged with which arguments, and the run.
    """
    of, out = str(trained.folder), str(folder / "drawn.npz")
    drawing = [of, *shlex.split("--count 6 --batch-size 4 --format npz --out"), out]
    judging = [of, *shlex.split("--count 90 --steps 3 --batch-size 45")]
    run = here(folder, "begun", 7)
    lines = map(shlex.join, (drawing, judging, arguments_of(folder, "begun")))
    with processes.started(["-c", processes.KEEP + WALK, *lines], devices=2) as both:
        processes.wait_for(lambda: len(lines_of(run)) >= 2, *both)
        both[1].send_signal(signal.SIGTERM)
        return processes.ended(both), (drawing, judging), run


def test_what_one_host_began_two_go_on_with_until_one_gets_a_signal(folder, walked):
    results, _, run = walked
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    first, second = (printed(output) for _, output, _ in results)
    assert first[0] == "2 hosts, 4 devices"
    assert any(one.startswith("going on from step 7 of 1,000,000") for one in first)
    assert any("the same command goes on from here" in line for line in first)
    assert second == []
    assert "loss" not in results[1][2]
    assert not list(run.folder.glob(".hosts_*"))
    step = checkpoint.steps(run.checkpoints)[-1]
    assert step % hosts.ASK_EVERY == 1  # asked after one step, read after the next
    assert_as_alone(run, folder, step)
    # One host can go on with what two have made.
    here(folder, "begun", step + 1)
    assert int(final_state(run)[0].step) == step + 1


def test_two_hosts_draw_and_evaluate_as_one(walked, trained):
    results, (drawing, judging), _ = walked
    assert "fd_digits_classifier vs train" in results[0][1]
    cache = trained.folder.parent / ".cache" / "reference"

    def made():
        (drawn,) = trained.folder.rglob("samples/*.npy")
        found = json.loads((trained.folder / "eval" / "fid.json").read_text())
        assert list(cache.iterdir())
        images = np.load(drawing[-1])["images"]
        return images.astype(int), np.load(drawn).astype(int), found

    images_of_two, drawn_by_two, two = made()
    for path in (trained.folder / "eval", cache):
        shutil.rmtree(path)
    Path(drawing[-1]).unlink()
    assert sample.main(drawing) == eval_fid.main(judging) == 0
    images, drawn, one = made()
    assert images.std() > 10
    assert np.abs(images - images_of_two).max() <= 1
    assert (images != images_of_two).mean() < 0.02
    assert np.abs(drawn - drawn_by_two).max() <= 1
    for name, number in one["numbers"].items():
        if name == "class_shares":
            np.testing.assert_allclose(two["numbers"][name], number, atol=1e-4)
        else:
            mean = pytest.approx(number["mean"], rel=1e-4)
            assert two["numbers"][name]["mean"] == mean
    halves = "half_of_train_against_the_other_half"
    assert two[halves] == pytest.approx(one[halves], rel=1e-4)


# The command of training, where a host that is silent for seconds counts as dead.
WATCHFUL = """
import runpy
from diffusion_jax.lab.process import joining
joining.SILENT = 8
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def test_a_killed_host_ends_the_other_and_the_run_goes_on(folder):
    flags = arguments_of(folder, "killed", "--train.checkpoint-every", "4")
    run = runs.Run(folder / "killed")
    command = ["-c", processes.KEEP + WATCHFUL, *flags]
    with processes.started(command, devices=2) as both:
        processes.wait_for(lambda: checkpoint.steps(run.checkpoints), *both)
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
    assert "more" not in said
    joining._fail(KeyError, KeyError("a bug"), None)
    assert "KeyError: 'a bug'" in capsys.readouterr().err
    assert left == [1, 1]


# A command that needs no network, with shorter patience than that of a person.
IMPATIENT = """
import os, sys
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
        assert (
            "/runs must be on a disk that all hosts share; got nothing on" in unshared
        )
        assert "host 1 of what host 0 wrote there. Give a folder" in unshared
        assert "the word must be the same on all hosts; got another on host 1" in unlike


def test_a_coordinator_that_does_not_answer_is_named(tmp_path):
    with processes.started(["-c", IMPATIENT, str(tmp_path)], indices=[1]) as alone:
        [(code, _, errors)] = processes.ended(alone)
    assert code == 2
    assert "all 2 hosts must meet at 127.0.0.1:" in errors
    assert "within 3 s; got no answer for host 1. Start the same command" in errors


NODE = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
STEP = {**NODE, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
LAUNCHER = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("env", "source", "devices"),
    [
        ({}, None, None),
        # salloc, or a script of sbatch: the job has tasks, this process is alone.
        ({**NODE, "SLURM_NTASKS": "4"}, None, None),
        ({**STEP, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2"}, "SLURM", None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "16"}, "SLURM", (1,)),
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "16", "CUDA_VISIBLE_DEVICES": "0"},
            "SLURM",
            None,
        ),
        ({**MPI, **LAUNCHER, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "Open MPI", None),
        (
            {
                **MPI,
                **LAUNCHER,
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            "Open MPI",
            (1,),
        ),
        # mpirun in an allocation of SLURM: its daemons are the step, not we.
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", **MPI, **LAUNCHER}, "Open MPI", None),
        ({**MPI, **LAUNCHER, "OMPI_COMM_WORLD_SIZE": "1"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "the TPU slice", None),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            "the TPU slice",
            None,
        ),
        (POD, None, None),  # may be one of many runs, as in a search
    ],
)
def test_several_processes_are_seen_where_they_are_announced(env, source, devices):
    job = joining.decide({}, env)
    assert (job and job.source) == source
    if job is not None:
        assert job == joining.Job(source, devices=devices)
        assert joining.decide({"--hosts": "1"}, env) is None


def test_the_coordinator_is_named_by_flags_or_environment():
    address = {"JAX_COORDINATOR_ADDRESS": "a:1"}
    assert joining.decide({}, address) == joining.Job("JAX_COORDINATOR_ADDRESS", "a:1")
    numbers = {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert joining.decide({}, {**address, **numbers})[1:4] == ("a:1", 3, 2)
    given = {"--coordinator": "b:2", "--hosts": "4", "--host": "3"}
    assert joining.decide(given, {**address, **STEP})[:4] == (
        "--coordinator",
        "b:2",
        4,
        3,
    )
    assert joining.decide({**given, "--coordinator": "[::1]:5"}, {})[1] == "[::1]:5"
    assert joining.decide({**given, "--hosts": "1", "--host": "0"}, {}) is None
    assert joining.decide({"--hosts": "auto"}, {}) == joining.Job("--hosts auto")


@pytest.mark.parametrize(
    ("flags", "env", "got"),
    [
        ("--hosts 2", {}, "no --coordinator and no --host"),
        ("--coordinator a:1 --host 0", {}, "no --hosts"),
        ("--coordinator a:1 --hosts 2 --host 2", {}, "2"),
        ("--coordinator a:1 --hosts 0 --host 0", {}, "0"),
        ("--coordinator a:1 --hosts two --host 0", {}, "'two'"),
        ("--coordinator a:1 --hosts 2 --host -1", {}, "'-1'"),
        ("--coordinator a --hosts 2 --host 0", {}, "'a'"),
        ("--coordinator a:99999 --hosts 2 --host 0", {}, "'a:99999'"),
        ("--coordinator", {}, "''"),
        ("", {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "x"}, "'x'"),
        ("", MPI, "2 processes without it"),
    ],
)
def test_what_does_not_fit_is_refused(flags, env, got, refuses):
    with refuses(got):
        joining.decide(joining.split(flags.split())[0], env)


def leaves(monkeypatch, main, *flags, **options):
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as left:
        entry.guarded(main, **options)
    return left.value.code


def test_a_command_for_one_host_says_so_before_it_waits(monkeypatch, capsys):
    flags = ["--coordinator", "10.0.0.1:1", "--hosts", "2", "--host", "0"]
    assert leaves(monkeypatch, lambda argv: 1 / 0, *flags) == 2
    assert "must run on one host" in capsys.readouterr().err
    seen = []
    assert leaves(monkeypatch, lambda argv: seen.append(argv), "x", "--hosts=1") is None
    assert seen == [["x"]]


def test_help_speaks_of_hosts_and_joins_none(monkeypatch, capsys):
    flags = ["--help", "--coordinator", "10.0.0.1:1", "--hosts", "2", "--host", "0"]
    assert leaves(monkeypatch, train.main, *flags, several=True) == 0
    shown = capsys.readouterr().out
    assert "--train.batch-size" in shown
    assert all(flag in shown for flag in joining.FLAGS)


def test_a_pod_that_works_by_itself_is_told_how_to_join():
    assert "--host $JOB_COMPLETION_INDEX" in joining.note(POD)
    assert joining.note({}) is None


@pytest.mark.parametrize(("signals", "stops"), [([], 4), ([15], 1)])
def test_one_host_stops_at_once(signals, stops):
    stop = hosts.make_stop(signals)
    assert next(step for step in range(1, 5) if stop(step, step == 4)) == stops


def test_one_host_has_nobody_to_agree_with(tmp_path):
    hosts.check_same("this", "that")
    hosts.check_shared(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert hosts.tell(3) == 3
    with pytest.raises(ConfigError):
        joining.split(["--hosts"])
