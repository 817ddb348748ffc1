"""Options of the compiler, and how many programs it compiled or read from its cache.

Programs are counted from the first call of `count` on, in the whole process.
"""

import functools
from collections import Counter
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
