"""Joins the processes of a job (`jax.distributed`), before JAX looks for devices.

A job is as many processes as there are hosts (or one a GPU, where a launcher starts it
so), all of the same command. They meet at a coordinator, the first of them:

  --coordinator HOST:PORT --hosts N --host I    said on the command line, or
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    in the environment, or
  SLURM's srun, Open MPI's mpirun, a slice of TPUs    that announce several processes;
  --hosts auto    asks JAX to find them, which may ask the network: TPU machines that
                  announce nothing, and Kubernetes.

On a machine by itself nothing of this happens, and nothing is asked of the network.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts

FLAGS = ("--coordinator", "--hosts", "--host")
TIMEOUT = 300
"""Seconds within which all hosts must have met."""
SILENT = 40
"""Seconds without a sign of life after which a host counts as dead, and the others end.
A thread of its own gives the signs: no compilation holds it up, nor does Python."""
LOST = ("Gloo", "heartbeat", "coordination service", "CoordinationService")
"""What the message of an error has in it when another host has gone."""
HELP = f"""
several hosts: the same command on each, RUN or --output on a disk they share
  --coordinator HOST:PORT   where they meet: the first host, and any free port of it
  --hosts N                 how many there are; 1 for this one alone; auto lets JAX
                            find them (TPU machines, Kubernetes)
  --host I                  which one this is: 0 is the first, which writes and prints
Under srun, mpirun and on TPU slices that announce their hosts none of them is needed.
All must have met within {TIMEOUT} s. When one dies the others end within a minute;
started again, all go on from the last checkpoint."""


HINT = "several hosts: --coordinator HOST:PORT --hosts N --host I (see --help-all)"


class Job(NamedTuple):
    """How to join the other hosts; JAX finds out what is None."""

    source: str
    """Who says that there are several, for messages."""
    address: str | None = None
    """Of the coordinator, HOST:PORT."""
    hosts: int | None = None
    """How many there are, which is processes."""
    host: int | None = None
    """This one's number, from 0."""
    devices: tuple[int, ...] | None = None
    """Which of this machine's GPUs are this process's; all of them when None."""


def split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the flags about hosts, by name, and all other arguments.

    Raises:
      ConfigError: such a flag without a value.

    >>> split(["cifar10", "--hosts", "2", "--host=1", "--name", "x"])
    ({'--hosts': '2', '--host': '1'}, ['cifar10', '--name', 'x'])
    """
    given: dict[str, str] = {}
    rest, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise ConfigError(
                f"{name} must have a value; got {value!r}. Say, for instance: "
                "--coordinator 10.0.0.1:1234 --hosts 2 --host 0."
            )
        given[name] = value
    return given, rest


def decide(given: Mapping[str, str], env: Mapping[str, str]) -> Job | None:
    """Returns how to join the other hosts; None for a process by itself.

    Decides by its arguments alone: nothing is asked of JAX or of a network.

    The flags are those of `split`.

    Raises:
      ConfigError: they are incomplete, or do not fit together.

    >>> decide({}, {}), decide({"--hosts": "1"}, {"JAX_COORDINATOR_ADDRESS": "a:1"})
    (None, None)
    """
    if given == {"--hosts": "1"}:
        return None
    devices = _own_devices(env)
    if given == {"--hosts": "auto"}:
        return Job("--hosts auto", devices=devices)
    if given:
        return _flagged(given, devices)
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        count, index = (
            None if name not in env else _number(name, env[name])
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        return Job("JAX_COORDINATOR_ADDRESS", address, count, index, devices)
    if _several(env, "OMPI_COMM_WORLD_SIZE"):
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise ConfigError(
                "Open MPI must name its launcher in OMPI_MCA_orte_hnp_uri, as version "
                f"4 does; got {env['OMPI_COMM_WORLD_SIZE']} processes without it. "
                "Add: --coordinator FIRST_HOST:1234 --hosts $OMPI_COMM_WORLD_SIZE "
                "--host $OMPI_COMM_WORLD_RANK."
            )
        return Job("Open MPI", devices=devices)
    # Of the step, which srun starts: a shell of salloc, or a script of sbatch before
    # its srun, knows the tasks of the whole job, and is alone.
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if _several(env, "SLURM_STEP_NUM_TASKS") and all(name in env for name in step):
        return Job("SLURM", devices=devices)
    tpus = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in tpus or _several(env, "MEGASCALE_NUM_SLICES"):
        return Job("the TPU slice")
    return None


def join(job: Job) -> None:
    """Joins the other hosts; only the first one prints from here on.

    Raises:
      ConfigError: JAX cannot find them, or they have unlike numbers of devices.
      SystemExit: not all came in time. (Not raised: the process ends, since what it
        waits for cannot be interrupted.)
    """
    where = f"at {job.address}" if job.address else f"as {job.source} says"

    def give_up() -> None:
        which = "this one" if job.host is None else f"host {job.host}"
        print(
            f"error: all {job.hosts or ''} hosts must meet {where} within {TIMEOUT} s; "
            f"got no answer for {which}. Start the same command on every host, with "
            "one coordinator and its own number each, and open the port between them.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    with contextlib.suppress(AttributeError):
        # That service takes every SIGTERM: `kill` would end no command.
        jax.config.update("jax_enable_preemption_service", False)
    # JAX itself aborts a process that waits in vain, with a stack trace.
    watch = threading.Timer(TIMEOUT, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            job.address,
            job.hosts,
            job.host,
            local_device_ids=job.devices,
            cluster_detection_method=None if None in job[1:4] else "deactivate",
            initialization_timeout=TIMEOUT + 30,
            heartbeat_timeout_seconds=SILENT,
            # The first host may be busy long after the others are done.
            shutdown_timeout_seconds=24 * 3600,
        )
    except (RuntimeError, ValueError, OSError, LookupError) as error:
        said = str(error).rstrip(".")
        raise ConfigError(
            f"the hosts must be found {where}; got {said}. Say which they are: "
            "--coordinator FIRST_HOST:1234 --hosts N --host I."
        ) from error
    finally:
        watch.cancel()
    if job.devices is None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under SLURM and Open MPI JAX gives a process one GPU, even one that has the
        # machine for itself.
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, "all")
    sys.excepthook = _fail
    count, devices = jax.process_count(), jax.device_count()
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    owners = [device.process_index for device in jax.devices()]
    held = [owners.count(host) for host in range(count)]
    if len(set(held)) > 1:
        raise ConfigError(
            "all hosts must have as many devices as each other; got "
            f"{', '.join(map(str, held))}. Hide some, with CUDA_VISIBLE_DEVICES, or "
            "leave a host out."
        )
    print(f"{count} hosts, {devices} devices", flush=True)


def note(env: Mapping[str, str]) -> str | None:
    """Returns a hint where hosts that should join seem to run alone; None elsewhere."""
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return (
            "note: each pod of this indexed job works by itself. To work together: "
            "--coordinator JOB-0.SUBDOMAIN:1234 --hosts N --host $JOB_COMPLETION_INDEX"
        )
    return None


def leave(code: int) -> None:
    """Ends the process of a host that failed; does nothing where there is but one.

    The usual end would wait for the other hosts, while they wait for this one. They are
    ended by JAX within `SILENT` seconds, when they have not heard of it.
    """
    if not jax.distributed.is_initialized():
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if hosts.first():
        time.sleep(2)  # else JAX ends the others before they print the same error
    os._exit(code)


def _fail(*error: Any) -> None:
    """Ends the process of a host by an error that nobody expected.

    But for one: that another host has died, which is said without a traceback.
    """
    said = str(error[1])
    if any(word in said for word in LOST):
        print(
            f"error: all {jax.process_count()} hosts must work until the end; got "
            f"{said.splitlines()[0]}. See what the others printed, and start the same "
            "command again on every host: a run goes on from its last checkpoint.",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(*error)
    leave(1)


def _flagged(given: Mapping[str, str], devices: tuple[int, ...] | None) -> Job | None:
    missing = [name for name in FLAGS if name not in given]
    if missing:
        raise ConfigError(
            "--coordinator, --hosts and --host must be given together; got no "
            f"{' and no '.join(missing)}. Say, for instance: --coordinator "
            "10.0.0.1:1234 --hosts 2 --host 0."
        )
    count, index = (_number(name, given[name]) for name in FLAGS[1:])
    if count < 1:
        raise ConfigError(f"--hosts must be at least 1; got {count}. Count them all.")
    if index >= count:
        raise ConfigError(
            f"--host must be in 0..{count - 1} with --hosts {count}; got {index}. "
            "The first host is 0."
        )
    address = given["--coordinator"]
    port = re.fullmatch(r".*[^:\[]:(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 2**16:
        raise ConfigError(
            f"--coordinator must be HOST:PORT, with a port in 1..65535; got "
            f"{address!r}. Say, for instance: --coordinator 10.0.0.1:1234."
        )
    if count == 1:
        return None
    return Job("--coordinator", address, count, index, devices)


def _own_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns the GPU of a process that shares its machine with others of the job."""
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES") or ""
    if visible and "," not in visible:
        return None  # the launcher has chosen already
    tasks, nodes = (env.get(f"SLURM_STEP_NUM_{n}", "1") for n in ("TASKS", "NODES"))
    if _several(env, "OMPI_COMM_WORLD_LOCAL_SIZE"):
        name = "OMPI_COMM_WORLD_LOCAL_RANK"
    elif "SLURM_LOCALID" in env and tasks != nodes:
        name = "SLURM_LOCALID"
    else:
        return None
    return (_number(name, env.get(name, "")),)


def _several(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name, "")
    return text.isdecimal() and int(text) > 1


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(
            f"{name} must be a whole number; got {text!r}. Give the number, or leave "
            "it out where JAX detects the cluster."
        )
    return int(text)
