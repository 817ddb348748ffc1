"""Elements of a page, in which text is only ever text: tables, pictures, charts in SVG.

Pictures are inside, and charts scale with the page, in its colours.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from diffusion_jax.lab.report.reading import Points
from diffusion_jax.lab.report.tables import Table, printable

Element = ElementTree.Element
MOST_PIXELS = 2**26
QUALITIES = (85, 70, 50)
"""Of WebP, one after the other, until a picture fits."""


def tag(name: str, /, *children: "str | Element", **attributes: object) -> Element:
    """Returns an element; what is text in it is escaped where the page is written.

    >>> html(tag("p", "a < b ", tag("b", "c"), " d", class_="note"))
    '<p class="note">a &lt; b <b>c</b> d</p>'
    """
    named = {
        key.rstrip("_").replace("_", "-"): printable(str(value))
        for key, value in attributes.items()
    }
    made = Element(name, named)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + printable(child)
        else:
            made.text = (made.text or "") + printable(child)
    return made


def html(element: Element) -> str:
    """Returns an element as text."""
    return ElementTree.tostring(element, encoding="unicode", method="html")


def table(of: Table, *, wide: bool = False) -> Element:
    """Returns a table; the rows of its protocol are quieter.

    With `wide` its cells are words, not numbers.
    """
    first = len(of.rows) - of.protocol
    body = tag("tbody")
    for i, (name, *cells) in enumerate(of.rows):
        row = tag("tr", tag("th", name, scope="row"))
        for j, cell in enumerate(cells, 1):
            marked = {"class_": "marked"} if (i, j) in of.marked else {}
            row.append(tag("td", cell, **marked))
        if i >= first:
            row.set("class", "protocol" + " first" * (i == first))
        body.append(row)
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in of.head)))
    parts = [head, body] if any(of.head) else [body]
    inner = tag("table", *parts, class_="words" if wide else "numbers")
    if len(of.head) > 2:  # narrow screens scroll
        inner.set("style", f"min-width: {7 * len(of.head)}rem")
    return tag("div", inner, class_="scroll", tabindex=0)


def picture(path: Path, said: str, room: int) -> Element | None:
    """Returns a picture of a file with a line below it; None where it is none.

    It is of a PNG file, and may take `room` bytes of the page.
    """
    try:
        kind, content = fitted(path, room * 3 // 4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image = tag("img", alt=said, loading="lazy")
    image.set("src", f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
    return tag("figure", image, tag("figcaption", said))


def fitted(path: Path, room: int) -> tuple[str, bytes]:
    """Returns the format and the bytes of a picture that takes no more than `room`.

    Without loss where it fits, else by WebP, and where that does not, smaller.

    Raises:
      OSError, ValueError, SyntaxError, Image.DecompressionBombError: no PNG file.
    """
    if not path.is_file():
        raise ValueError("no regular file")
    with Image.open(path, formats=["PNG"]) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError("too many pixels")
        image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    found = _encoded(image, "PNG", optimize=True)
    if len(found) <= room:
        return "png", found
    while True:
        for quality in QUALITIES:
            found = _encoded(image, "WEBP", quality=quality)
            if len(found) <= room or max(image.size) < 32:
                return "webp", found
        image = image.resize((image.width * 2 // 3 or 1, image.height * 2 // 3 or 1))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 12, 40
MOST_POINTS = 240
"""Points of a line; of more, means of neighbours are drawn."""
RATIO_OF_LOGARITHMS = 12
"""Largest over smallest value from which an axis is logarithmic."""


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: Points
    color: int = 0
    dashed: bool = False


def chart(
    title: str,
    series: Sequence[Series],
    *,
    xlabel: str = "step",
    unit: str = "",
    smooth: bool = False,
    lowest: bool = False,
    from_zero: bool = False,
) -> Element | None:
    """Returns a chart with a legend; None where there are not two points.

    The unit is of the values, where the title does not say it. `smooth` draws means of
    neighbours, with the points behind them; `lowest` has the legend say where a line is
    lowest; `from_zero` begins the axis at 0.
    """
    there = [s for s in series if len(s.points) > 1]
    drawn = [s._replace(points=thinned(s.points)) for s in there]
    if not drawn:
        return None
    xs, ys = zip(*(point for s in drawn for point in s.points), strict=True)
    low, high = 0 if from_zero else min(ys), max(ys)
    logarithmic = low > 0 and high > RATIO_OF_LOGARITHMS * low
    across = Axis(min(0, *xs), max(xs), LEFT, WIDTH - RIGHT)
    down = Axis(low, high, HEIGHT - BOTTOM, TOP, rounded=True, logarithmic=logarithmic)
    svg = tag("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    _axes(svg, across, down, xlabel)
    for s in drawn:
        soft = smooth and len(s.points) > 40
        if soft:
            svg.append(_line(s.points, across, down, f"behind s{s.color}"))
        points = smoothed(s.points) if soft else s.points
        dashed = " dashed" * s.dashed
        svg.append(_line(points, across, down, f"line s{s.color}{dashed}"))
        x, y = points[-1]
        end = tag("circle", class_=f"dot s{s.color}", r=3.5)
        end.set("cx", f"{across(x):.1f}")
        end.set("cy", f"{down(y):.1f}")
        end.append(tag("title", f"{s.name}: {number(y)} at {xlabel} {number(x)}"))
        svg.append(end)
    said = [unit] * bool(unit) + ["logarithmic scale"] * logarithmic
    head = tag("h3", title, tag("span", "".join(f", {words}" for words in said)))
    parts = [head, svg, _legend(there, xlabel, lowest=lowest)]
    return tag("figure", *parts, class_="chart")


class Axis:
    """Places numbers on a line of pixels."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        rounded: bool = False,
        logarithmic: bool = False,
    ) -> None:
        """Takes the numbers at the ends, and the pixels there.

        `rounded` moves the ends out to round numbers.
        """
        self.logarithmic, self.start, self.end = logarithmic, start, end
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        if rounded and not logarithmic:
            step = _step(low, high)
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        self.ticks = _powers(low, high) if logarithmic else _even(low, high)
        self.low, self.high = self._scaled(low), self._scaled(high)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def __call__(self, value: float) -> float:
        """Returns the pixel of a number."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _even(low: float, high: float) -> list[float]:
    """Returns about five round numbers between two.

    >>> _even(0, 5000)
    [0.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0]
    """
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _step(low: float, high: float) -> float:
    rough = high / 5 - low / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.99)


def _powers(low: float, high: float) -> list[float]:
    """Returns round numbers between two, evenly on a logarithmic scale.

    >>> _powers(0.03, 0.8), len(_powers(1e-9, 1e9))
    ([0.05, 0.1, 0.2, 0.5], 7)
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [k * 10.0**n for n in range(first, last + 1) for k in (1, 2, 5)]
    found = [x for x in found if low <= x <= high]
    if len(found) > 8:
        every = max(1, (last - first) // 6)
        found = [10.0**n for n in range(first, last + 1, every)]
        found = [x for x in found if low <= x <= high]
    return [float(f"{x:.3g}") for x in found]


def _axes(svg: Element, across: Axis, down: Axis, xlabel: str) -> None:
    for value in down.ticks:
        y = round(down(value), 1)
        ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}
        svg.append(tag("line", class_="grid", **ends))
        svg.append(tag("text", number(value), class_="end", x=LEFT - 8, y=y + 4))
    for value in across.ticks:
        x, y = round(across(value), 1), HEIGHT - BOTTOM + 18
        svg.append(tag("text", number(value), class_="middle", x=x, y=y))
    x, y = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5
    svg.append(tag("text", xlabel, class_="middle label", x=x, y=y))


def _line(points: Points, across: Axis, down: Axis, kind: str) -> Element:
    line = tag("path", class_=kind)
    each = (f"{across(x):.1f} {down(y):.1f}" for x, y in points)
    line.set("d", "M" + "L".join(each))
    return line


def _legend(series: Sequence[Series], xlabel: str, *, lowest: bool) -> Element:
    """Returns the names of the lines with the last value, and the lowest if asked."""
    items = []
    for s in series:
        said = f" {number(s.points[-1][1])} at the end"
        if lowest:
            x, y = min(s.points, key=lambda point: point[1])
            said += f"; lowest {number(y)}, at {xlabel} {number(x)}"
        swatch = tag("i", class_=f"swatch s{s.color}" + " dashed" * s.dashed)
        items.append(tag("li", swatch, tag("b", s.name), said))
    return tag("ul", *items, class_="legend")


def thinned(points: Points) -> Points:
    """Returns at most so many points as are drawn, means of neighbours."""
    many = math.ceil(len(points) / MOST_POINTS)
    parts = (points[i : i + many] for i in range(0, len(points), many))
    return [_mean(part) for part in parts]


def smoothed(points: Points) -> Points:
    """Returns the means over windows of a tenth of the points, smaller at the ends."""
    reach = len(points) // 20
    found = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        found.append((x, _mean(points[i - near : i + near + 1])[1]))
    return found


def _mean(points: Points) -> tuple[float, float]:
    count = len(points)
    return sum(x / count for x, _ in points), sum(y / count for _, y in points)


def number(value: float) -> str:
    """Returns a number as an axis has it.

    >>> number(800_000), number(12_345), number(2500), number(0.031234), number(0)
    ('800k', '12,345', '2,500', '0.03123', '0')
    """
    if abs(value) >= 10_000 and value % 1000 == 0:
        many = [("k", 1e3), ("M", 1e6), ("G", 1e9)]
        unit, size = next(u for u in reversed(many) if value % u[1] == 0)
        return f"{value / size:,.0f}{unit}" if abs(value) < 1e13 else f"{value:.3g}"
    if 1000 <= abs(value) < 1e13:
        return f"{value:,.0f}"
    return f"{value:.4g}"
