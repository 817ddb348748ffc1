"""The same bits in every run on a GPU, at some cost of speed.

XLA times several kernels when it compiles and may choose others another time, and some
kernels add in any order. The flag `xla_gpu_deterministic_ops` forbids both. A CPU
computes the same bits without it.
"""

import os
import re
from collections.abc import MutableMapping

import jax

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
