"""Pictures: grids and strips of images, and plots of a run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffusion_jax.errors import needs
from diffusion_jax.storage import files

OWN, OTHERS = "#c1121f", ("#f4a259", "#5b8e7d", "#33658a")
"""Colours of a curve, and of those that it is compared with."""


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Returns images scaled to [-1, 1] as uint8, clipped and rounded to the nearest.

    What is not a number, as of a network that has diverged, is black.

    >>> print(to_uint8(np.array([-1.2, -1.0, 0.0, 1.0, np.nan])))
    [  0   0 128 255   0]
    """
    values = np.clip((np.asarray(x, np.float64) + 1) * 127.5, 0, 255)
    return np.rint(np.nan_to_num(values, nan=0.0)).astype(np.uint8)


def grid(
    images: np.ndarray, *, columns: int | None = None, side: int = 64, gap: int = 4
) -> Image.Image:
    """Returns one picture of many, in rows, on a white ground.

    Args:
      images: uint8, [N, H, W, C] with 1 or 3 channels.
      columns: images a row; as square as possible when not given.
      side: small images are enlarged by a whole factor to about this many pixels, each
        pixel staying a sharp square.
      gap: pixels between images.

    Raises:
      ValueError: images of another type or shape.

    >>> grid(np.zeros([6, 8, 8, 1], np.uint8), columns=3).size
    (208, 140)
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(
            "images must be uint8 of shape [N, H, W, 1 or 3]; got "
            f"{images.dtype} {images.shape}. to_uint8 makes them from [-1, 1]."
        )
    count, height, width, channels = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count * height / width))), count)
    rows = -(-count // columns)
    factor = max(1, round(side / max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    cell_height, cell_width = height * factor + gap, width * factor + gap
    canvas = np.full(
        (rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + i // columns * cell_height
        left = gap + i % columns * cell_width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


TEXT = 12
"""Height of the letters at the sides of a grid, in pixels."""


def labelled(
    picture: Image.Image, *, above: Sequence[str] = (), left: Sequence[str] = ()
) -> Image.Image:
    """Returns a grid with labels at its sides.

    The grid is the lower right part of it, pixel for pixel.

    Args:
      picture: of columns of one width and rows of one height.
      above: the label of each column, or none at all.
      left: the label of each row, or none at all.

    >>> labelled(Image.new("L", (8, 4)), above=["t = 0"]).size
    (8, 22)
    """
    font = ImageFont.load_default(TEXT)
    top = TEXT + 6 if above else 0
    side = max((math.ceil(font.getlength(word)) for word in left), default=-8) + 8
    size = picture.width + side, picture.height + top
    canvas = Image.new(picture.mode, size, "white")
    canvas.paste(picture, (side, top))
    draw, grey = ImageDraw.Draw(canvas), "#404040"
    for k, word in enumerate(above):
        middle = side + (k + 0.5) * picture.width / len(above)
        draw.text((middle, top - 2), word, grey, font, anchor="ms")
    for k, word in enumerate(left):
        middle = top + (k + 0.5) * picture.height / len(left)
        draw.text((side - 2, middle), word, grey, font, anchor="rm")
    return canvas


def by_class(
    images: np.ndarray, classes: int, *, columns: int | None = None
) -> Image.Image:
    """Returns the grid of images of all classes in turn, a column a class.

    Args:
      images: as of `grid`, the first of class 0.
      classes: how many there are; 0 for images that have none.
      columns: images a row. Their classes stand above if there is a whole number of
        columns for each, as there is, up to 20 classes, when this is not given.
    """
    if columns is None and 0 < classes <= min(20, len(images)):
        columns = classes
    picture = grid(images, columns=columns)
    if not (classes and columns and columns % classes == 0 and columns <= len(images)):
        return picture
    return labelled(picture, above=[str(k % classes) for k in range(columns)])


SOFTWARE = "diffusion_jax"
MARK = b"Software\0" + SOFTWARE.encode()
"""In the first bytes of every picture that `save` writes."""


def save(
    image: Image.Image,
    path: str | os.PathLike[str],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a picture under a temporary name, then renames it; returns the path.

    Args:
      image: the picture.
      path: where the PNG goes.
      about: how it was made, kept in it as JSON under the keyword Description.
    """
    path, said = Path(path), PngInfo()
    said.add_text("Software", SOFTWARE)
    if about is not None:
        said.add_text("Description", json.dumps(about))
    with files.replacing(path) as file:
        image.save(file, format="PNG", pnginfo=said)
    return path


def curve(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    title: str,
    ylabel: str,
    path: str | os.PathLike[str],
    xlabel: str = "training step",
) -> Path:
    """Plots values against steps to a PNG file; returns the path.

    Args:
      steps: x, in steps.
      values: y; the axis is logarithmic where all are above 0.
      title: what the plot shows.
      ylabel: what y is, with its unit.
      path: where the PNG goes.
      xlabel: what x is.
    """
    figure, (axes,) = _figure(1)
    axes.plot(steps, values, color="#2a6f97", linewidth=1.5)
    if len(values) and min(values) > 0:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, values)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return save(_render(figure), path)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Image.Image:
    """Returns a plot of several curves, both axes logarithmic, with a legend.

    Args:
      series: points (x, y), both above 0, by the name of their curve.
      title: what the plot shows.
      xlabel: what x is.
      ylabel: what y is, with its unit.
    """
    figure, (axes,) = _figure(1)
    figure.set_size_inches(9, 5)
    from matplotlib import colormaps

    colors = colormaps["tab20"](np.arange(20))
    for i, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True) if points else ((), ())
        style = {"marker": "osD^v"[i % 5], "markersize": 4, "linewidth": 1.5}
        axes.plot(x, y, label=name, color=colors[i * 2 % 20 + i // 10], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    everything = [point for points in series.values() for point in points]
    _plain_numbers(axes.xaxis, [x for x, _ in everything])
    _plain_numbers(axes.yaxis, [y for _, y in everything])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _render(figure)


def bars(
    names: Sequence[str], columns: Mapping[str, Sequence[float]], *, title: str
) -> Image.Image:
    """Returns bars side by side, a row a name and a panel a column, with the numbers.

    Args:
      names: of the rows, from top to bottom.
      columns: values above 0, one a row, by the name of their panel. Its axis is
        logarithmic where they differ by more than ten times.
      title: what the plot shows.
    """
    figure, axes = _figure(len(columns))
    figure.set_size_inches(3.2 * len(columns) + 2, 0.3 * len(names) + 1.2)
    figure.suptitle(title)
    for axis, (column, values) in zip(axes, columns.items(), strict=True):
        rows = np.arange(len(names))[::-1]
        axis.barh(rows, values, color="#2a6f97", height=0.7)
        finite = [value for value in values if np.isfinite(value)]
        if finite and max(finite) > 10 * min(finite) > 0:
            axis.set_xscale("log")
            _plain_numbers(axis.xaxis, finite)
        for row, value in zip(rows, values, strict=True):
            axis.annotate(
                f"{value:.3g}",
                (value, row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.margins(x=0.2)
        axis.grid(False, which="both")
        axis.set(xlabel=column, yticks=[])
    axes[0].set_yticks(np.arange(len(names))[::-1], names)
    return _render(figure)


def rate_distortion(
    steps: np.ndarray, rate: np.ndarray, distortion: np.ndarray
) -> Image.Image:
    """Returns distortion and rate against reverse steps, and against each other.

    Args:
      steps: reverse steps taken, [T].
      rate: bits/dim received until then, [T].
      distortion: root mean squared error on the scale of 0..255, [T].
    """
    figure, axes = _figure(3)
    error, bits = "distortion (RMSE of 255)", "rate (bits/dim)"
    for axis, x, y, xlabel, ylabel in (
        (axes[0], steps, distortion, "reverse steps", error),
        (axes[1], steps, rate, "reverse steps", bits),
        (axes[2], rate, distortion, bits, error),
    ):
        axis.plot(x, y, color="#2a6f97", linewidth=1.5)
        axis.set(xlabel=xlabel, ylabel=ylabel)
    return _render(figure)


def rate_distortion_compared(
    own: tuple[str, Sequence[tuple[float, float]]],
    alone: Mapping[str, Sequence[tuple[float, float]]],
    together: Mapping[str, Sequence[tuple[float, float]]],
    cuts: Sequence[tuple[str, tuple[float, float], np.ndarray]],
    *,
    title: str,
) -> Image.Image:
    """Returns a plot of error by rate beside that of image formats, above images.

    Args:
      own: name and points (rate in bits/dim, root mean squared error of 255).
      alone: those of formats by their names, a file an image.
      together: those of formats, all images in one mosaic.
      cuts: some of the points, each with a line to stand above the images that came
        back, uint8 [N, H, W, C].
      title: of the plot.
    """
    figure, (axis,) = _figure(1)
    from matplotlib.ticker import LogLocator, NullLocator

    figure.set_size_inches(10, 7.8)
    rows = figure.add_gridspec(2, 1, height_ratios=(1.8, 1), hspace=0.04)
    axis.set_subplotspec(rows[0])
    lines = {"color": OWN, "linewidth": 2.8, "zorder": 3}
    axis.plot(*zip(*sorted(own[1]), strict=True), label=own[0], **lines)
    x, y = zip(*(point for _, point, _ in cuts), strict=True)
    axis.plot(x, y, "o", color=OWN, markersize=8, markeredgecolor="white", zorder=4)
    colors = dict(zip({**together, **alone}, OTHERS, strict=False))
    for series, where, style in (
        (together, "one mosaic", "o-"),
        (alone, "each image", "o:"),
    ):
        for name, points in series.items():
            x, y = zip(*sorted(points), strict=True)
            look = {"color": colors[name], "linewidth": 1.5, "markersize": 3.5}
            axis.plot(x, y, style, label=f"{name}, {where}", **look)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="rate (bits/dim)", ylabel="error (RMSE of 255)", title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    below = rows[1].subgridspec(1, len(cuts))
    for place, (said, _, images) in zip(below, cuts, strict=True):
        panel = figure.add_subplot(place)
        shown = grid(images, side=images.shape[1], gap=1)
        panel.imshow(np.asarray(shown.convert("RGB")), interpolation="nearest")
        panel.set_title(said, fontsize=9)
        panel.set_axis_off()
    return _render(figure)


def check_plots() -> None:
    """Raises MissingError where there is nothing to draw plots with."""
    needs("matplotlib", "draw a plot", "plots")


def _figure(count: int) -> tuple[Any, list[Any]]:
    """Returns a figure with some plots side by side."""
    check_plots()
    # Imported here because it takes a second, which `--help` should not.
    from matplotlib.figure import Figure

    width = 7 if count == 1 else 4 * count
    figure = Figure(figsize=(width, 4), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(True, which="both", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_numbers(axis: Any, values: Sequence[float]) -> None:
    """Labels a logarithmic axis with plain numbers, not with powers of ten."""
    axis.set_major_formatter("{x:g}")
    few = len(values) > 0 and max(values) < 10 * min(values)
    axis.set_minor_formatter("{x:g}" if few else "")


def _render(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
