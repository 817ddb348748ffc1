"""Tables that ship with the package, so that no machine computes them its own way.

`normal_quantile.npy` is round(2^20 Phi^-1((i + 1/2) / 2^16)) for i = 2^15..2^16 - 1,
the upper half; `normal_cdf.npy` is round(2^30 Phi(-8 + i / 256)) for i = 0..4096. Both
are int32, and whoever decodes reads them in place of calling a function of a library,
whose last digit differs between platforms.
"""

import functools
import hashlib
from importlib import resources

import numpy as np

SHA256 = {
    "normal_quantile": (
        "37f9656a37dad9ab61645405bad207e2fe7a0dabf033c8d4f77f4782ec998a19"
    ),
    "normal_cdf": "7b8bfbf24c526f358afce593e095d3f5bca3d0dc6c54f24b2879ea3946901ce5",
}
"""Of the values as little-endian int32."""


@functools.cache
def load(name: str) -> np.ndarray:
    """Returns a table, int32, that cannot be written to.

    Args:
      name: a key of SHA256.

    Raises:
      ValueError: the file is damaged.
    """
    file = resources.files(__package__) / f"{name}.npy"
    with file.open("rb") as opened:
        table = np.load(opened, allow_pickle=False)
    found = digest(table)
    if found != SHA256[name]:
        raise ValueError(
            f"{file} must have the sha256 {SHA256[name][:12]}; got {found[:12]}. "
            "Install the package again."
        )
    table.setflags(write=False)
    return table


def digest(table: np.ndarray) -> str:
    """Returns the sha256 of the values as little-endian int32."""
    return hashlib.sha256(table.astype("<i4").tobytes()).hexdigest()
