"""A run as a codec beside the usual image formats, on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.codec import container
from diffusion_jax.lab.coding import files
from diffusion_jax.lab.coding.coder import Coder
from diffusion_jax.lab.measure import formats_compared
from diffusion_jax.lab.measure.formats_compared import Point, Size
from diffusion_jax.lab.process import progress

SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Of the bits of a file, where it is cut to see what is left."""
SHOWN = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Of them, those whose images are shown."""
FEW = 16
"""Images that are compressed to a file each, and that are shown."""


class Compared(NamedTuple):
    """Sizes without loss, and rates with their errors."""

    sizes: list[Size]
    """The run's first, then those of formats."""
    own: list[Point]
    """Of the run's file, cut at SHARES."""
    alone: dict[str, list[Point]]
    """Of formats, a file for each of a few images."""
    together: dict[str, list[Point]]
    """Of formats, all images in one mosaic."""
    shown: list[tuple[str, Point, np.ndarray]]
    """What the first images are after a cut at SHOWN, with words for it."""


def compare(
    run: Coder, images: np.ndarray, few: np.ndarray, others: np.ndarray
) -> Compared:
    """Returns what a run and image formats make of the same images.

    What the run compresses is decompressed too, and compared by its checksum.

    Args:
      run: with its profile.
      images: uint8 [N, H, W, C], for sizes without loss.
      few: some of them, for a file that is cut and for those with loss of an image.
      others: images of the same kind, for histograms; may be none.

    Raises:
      DataError: images of another shape, so many that formats do not take them in one
        mosaic, or what came back was something else.
    """
    with progress.clock("image formats without loss"):
        sizes = formats_compared.lossless(images)  # refuses too many before all else
    packed = files.compress(run, images, layout="archive")
    files.decompress(run, packed)  # or it is refused
    cut = files.compress(run, few)
    each = [len(files.compress(run, one[None], batch_size=1)) for one in few[:FEW]]
    mine = [
        Size("this run, an archive of all", len(packed) / len(images)),
        Size(f"this run, a file of {len(few)} to be cut", len(cut) / len(few)),
        Size("this run, each image a file to be cut", float(np.mean(each))),
    ]
    if len(others):
        sizes.append(formats_compared.histograms(images, others))
    own, shown = _cuts(run, cut, few)
    with progress.clock("image formats with loss"):
        alone, together = formats_compared.lossy(images, few)
    return Compared(mine + sizes, own, alone, together, shown)


def _cuts(
    run: Coder, data: bytes, images: np.ndarray
) -> tuple[list[Point], list[tuple[str, Point, np.ndarray]]]:
    """Returns how near images are after cuts, and what some are."""
    file = container.opened(data, run.profile)
    points, shown = [], []
    for share in SHARES:
        bits = None if share == 1 else int(8 * file.length * share)
        back = files.decompress(run, data, bits=bits).images
        size = len(data) if bits is None else file.header + bits / 8
        point = formats_compared.point(images, back, size)
        points.append(point)
        if share in SHOWN:
            error = f"RMSE {point.rmse:.3g}" if bits else "lossless"
            each = f"{size / len(images):.3g} bytes each"
            said = f"{point.rate:.2g} bits/dim\n{each}\n{error}"
            shown.append((said, point, back[:FEW]))
    return points, shown


def table(sizes: Sequence[Size], dimensions: int) -> list[str]:
    """Returns sizes as lines: bytes an image, and bits/dim.

    >>> print(*table([Size("plain pixels", 64.0)], 64), sep="\\n")
                                               bytes/image   bits/dim
    plain pixels                                      64.0      8.000
    """
    lines = [f"{'':40}{'bytes/image':>14}{'bits/dim':>11}"]
    for name, size in sizes:
        lines.append(f"{name:40}{size:14.1f}{8 * size / dimensions:11.3f}")
    return lines
