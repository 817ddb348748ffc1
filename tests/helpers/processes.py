"""Commands on several hosts: as many processes on this machine, with a few devices."""

import importlib.metadata
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK_XLA = " --xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)
"""Flags that compile in less. Programs are not cut into parts for threads: all cores
have work. And XLA writes loops in its older way, gone from jaxlib 0.11, in half of the
time."""
QUICK = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}
"""Environment of a process that compiles as the tests around do: little, and once."""
KEEP = """
from types import SimpleNamespace
from jax._src import compiler
alone = SimpleNamespace(process_id=0, client=None)
compiler.distributed = SimpleNamespace(global_state=alone)
"""
"""Code that has each host keep its programs on disk, as JAX has the first alone: to
compile them again takes most of the time of the others."""
TINY = """
import sys
sys.path.append("tests/helpers")
import small_run
from diffusion_jax.lab.wiring import build
build.make_network = small_run.make_small
"""
"""Code that has a command work with a tiny network, which is soon compiled."""
TRAIN = f"""
{TINY}
from diffusion_jax.lab.process import entry
from experiments import train
entry.guarded(train.command, several=True)
"""
"""The command of training with it."""
LONGEST = 240
"""Seconds that any of them may take before it is killed."""


def free_port() -> int:
    """A port that nobody listens on, now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(
    command: Sequence[str],
    *,
    hosts: int = 2,
    devices: int = 1,
    places: Sequence[Path] = (ROOT, ROOT),
    indices: Sequence[int] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """Starts `python COMMAND --coordinator ... --host I` for each I, and ends them.

    For some alone, where indices are given.
    """
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", str(hosts)]
    env = {
        **os.environ,
        **QUICK,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}{QUICK_XLA}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command, *where, "--host", str(index)],
            env=env,
            cwd=places[index],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (range(hosts) if indices is None else indices)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(seen: Callable[[], object], *at_work: subprocess.Popen) -> None:
    """Waits until something is seen, of processes that must not end before."""
    until = time.monotonic() + LONGEST
    while not seen():
        ended = [p.communicate() for p in at_work if p.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < until
        time.sleep(0.02)


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for their ends: exit code, what was printed, and what went to stderr."""
    until = time.monotonic() + LONGEST
    outputs = [
        process.communicate(timeout=max(1, until - time.monotonic()))
        for process in processes
    ]
    return [(p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]


def run(command: Sequence[str], **options: object) -> list[tuple[int, str, str]]:
    """Starts a command on several hosts and waits for its end."""
    with started(command, **options) as processes:
        return ended(processes)


@contextmanager
def no_file_beyond(size):
    """No file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
