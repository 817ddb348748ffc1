"""How training gets faster with the number of devices, for `bench --scaling`.

Strong scaling keeps the batch: the same step, sooner. Weak scaling keeps the share of
each device: a larger batch in, at best, the same time.
"""

from collections.abc import Callable
from typing import Any

import jax

from diffusion_jax.errors import ConfigError


def counts(found: int) -> list[int]:
    """Returns how many devices to measure on: powers of two, and all.

    >>> counts(8), counts(6), counts(1)
    ([1, 2, 4, 8], [1, 2, 4, 6], [1])
    """
    return sorted({found, *(2**n for n in range(found.bit_length()) if 2**n <= found)})


def check(batch_size: int, found: int) -> None:
    """Raises ConfigError unless every count of devices can share the batch."""
    if jax.process_count() > 1:
        raise ConfigError(
            "scaling must be measured on one host, which can leave some of its devices "
            f"idle; got {jax.process_count()} hosts. Run bench on one host, then on "
            "all, with --batch-sizes in proportion."
        )
    wrong = [n for n in counts(found) if batch_size % n]
    if wrong:
        raise ConfigError(
            f"batch_sizes must be multiples of {wrong[-1]} for scaling, which measures "
            f"on {', '.join(map(str, counts(found)))} devices; got {batch_size}. "
            "Change it with --batch-sizes."
        )


def measure(
    images_per_second: Callable[[int, int], float], batch_size: int, found: int
) -> list[dict[str, Any]]:
    """Returns a row for each number of devices, of both kinds of scaling.

    Args:
      images_per_second: of training, from (number of devices, batch size).
      batch_size: of strong scaling, and a device's in weak scaling.
      found: how many devices there are.
    """
    rows: list[dict[str, Any]] = []
    alone = images_per_second(1, batch_size)
    for devices in counts(found):
        for kind, size in ("strong", batch_size), ("weak", batch_size * devices):
            rate = alone if devices == 1 else images_per_second(devices, size)
            row = {"scaling": kind, "devices": devices, "batch": size}
            row |= {"per_second": rate, "times_one": rate / alone}
            rows.append({**row, "efficiency": rate / alone / devices})
            print(f"  {kind} scaling on {devices}: {rate:,.1f} per s")
    return rows
