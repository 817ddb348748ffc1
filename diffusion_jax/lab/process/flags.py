"""Reads flags by tyro, whose help texts are wrapped once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docstring_parser
import tyro


def read(kind: Any, **options: Any) -> Any:
    """Returns what `tyro.cli` reads; each text of `--help` is a paragraph.

    Where the next line of a docstring is indented, as that of a field is, tyro keeps
    the break, and wraps what is before it once more.

    Args:
      kind: the dataclass of the flags.
      options: as of `tyro.cli`.
    """
    with _paragraphs():
        return tyro.cli(kind, **options)


@contextmanager
def _paragraphs() -> Iterator[None]:
    library: Any = docstring_parser
    parse = library.parse_from_object

    def joined(of: Any) -> Any:
        found = parse(of)
        for field in found.params:
            if field.description:
                field.description = " ".join(field.description.split())
        return found

    library.parse_from_object = joined
    try:
        yield
    finally:
        library.parse_from_object = parse
