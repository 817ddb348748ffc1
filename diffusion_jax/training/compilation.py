"""Options of the compiler, how many programs it made, and the same bits in every run.

Programs are counted from the first call of `count` on, in the whole process.

XLA times several kernels when it compiles and may choose others another time, and some
kernels add in any order. The flag `xla_gpu_deterministic_ops` forbids both, at some
cost of speed; a CPU computes the same bits without it.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import MutableMapping
from typing import NamedTuple

import jax

from diffusion_jax.errors import counted

# JAX has an event for each program, compiled or read, and one for each that was read.
ASKED = "/jax/core/compile/backend_compile_duration"
READ = "/jax/compilation_cache/cache_hits"

Options = dict[str, bool | int | float | str]
"""Options of XLA by their names, without the dashes of XLA_FLAGS."""

OPTIONS: dict[str, Options] = {"cpu": {"xla_backend_optimization_level": 1}}
"""Options of large programs, training steps and sampling, by JAX's name of a platform:
"cpu", "gpu", "tpu". Each was measured: on a CPU a training step takes a quarter less to
compile, and as long to run. A program with options cannot be part of another `jit`."""


class Programs(NamedTuple):
    """Numbers of programs of this process."""

    compiled: int
    cached: int
    """Read from the cache on disk in place of being compiled."""


def options(device: jax.Device) -> Options:
    """Returns the options of large programs for a device.

    None where JAX is told to optimise little, as in tests.

    >>> options(jax.devices()[0])
    {}
    """
    if jax.config.values["jax_disable_most_optimizations"]:
        return {}
    return OPTIONS.get(device.platform, {})


def count() -> Programs:
    """Returns how many programs there have been since the first call of this.

    Both are 0 with a version of JAX that has other names for its events.
    """
    seen = _listen()
    return Programs(max(seen[ASKED] - seen[READ], 0), seen[READ])


def since(before: Programs) -> str:
    """Returns the programs since an earlier `count`, in words; "" where none.

    >>> since(Programs(*(n - 1 for n in count())))
    '1 program compiled, 1 from the cache'
    """
    compiled, cached = (b - a for a, b in zip(before, count(), strict=True))
    if not compiled + cached:
        return ""
    return f"{counted(compiled, 'program')} compiled, {cached} from the cache"


@functools.cache
def _listen() -> Counter[str]:
    """Returns the numbers of all events of JAX from the first call on."""
    seen: Counter[str] = Counter()

    def event(event: str, **_: str | int) -> None:
        seen[event] += 1

    def duration(event: str, duration_secs: float, **_: str | int) -> None:
        seen[event] += 1

    jax.monitoring.register_event_listener(event)
    jax.monitoring.register_event_duration_secs_listener(duration)
    return seen


FLAG = "--xla_gpu_deterministic_ops"


def ask(env: MutableMapping[str, str] = os.environ) -> None:
    """Puts the flag into XLA_FLAGS, which JAX reads when it looks for devices.

    Raises:
      ValueError: the flag is there and false; or JAX has found a GPU without it.

    >>> env = {"XLA_FLAGS": "--xla_dump_to=/tmp/x"}
    >>> ask(env)
    >>> env
    {'XLA_FLAGS': '--xla_dump_to=/tmp/x --xla_gpu_deterministic_ops=true'}
    """
    flags = env.get("XLA_FLAGS", "")
    given = re.findall(rf"{FLAG}(?:=(\S+))?(?=\s|$)", flags)
    if given and given[-1].lower() in ("false", "0"):
        raise ValueError(
            f"XLA_FLAGS must not forbid deterministic kernels; got {FLAG}={given[-1]}. "
            "Take it out of XLA_FLAGS."
        )
    if given:
        return
    if _started() and jax.default_backend() == "gpu":
        raise ValueError(
            f"{FLAG}=true must be in XLA_FLAGS before JAX looks for devices; got a GPU "
            f"that was found without it. Start with XLA_FLAGS={FLAG}=true in the "
            "environment."
        )
    env["XLA_FLAGS"] = f"{flags} {FLAG}=true".strip()


def _started() -> bool:
    """Returns whether JAX has looked for devices, since when this setting is fixed."""
    before = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", before + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False
