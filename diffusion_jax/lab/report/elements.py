"""Elements of a page, in which text is only ever text, and pictures are inside."""

import base64
import io
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

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

    Args:
      of: the table.
      wide: whether its cells are words, not numbers.
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

    Args:
      path: of a PNG file.
      said: the line.
      room: bytes that it may take in the page.
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
