"""Whether the tests notice mistakes: `make mutations`, or `python -m tests.mutations`.

A breakage is a mistake that somebody could make, and the tests that must fail with it.
They stand in *.txt, two or more of each module of the mathematics and one of each
machine, as changes do:

    @@ the file, for all that follow
    name: arguments for pytest, the quickest tests that must fail
    -what is there, once: a part of a line, or some
    +what stands there instead, if anything does
"""

from collections import namedtuple
from pathlib import Path

Breakage = namedtuple("Breakage", "name file tests old new")


def read(text):
    """Yields the breakages of a file."""
    for part in text.split("@@ ")[1:]:
        file, *lines = part.splitlines()
        heads = [n for n, line in enumerate(lines) if line[0] not in "-+"]
        for head, end in zip(heads, [*heads[1:], len(lines)], strict=True):
            name, _, tests = lines[head].partition(": ")
            old, new = (
                "\n".join(s[1:] for s in lines[head + 1 : end] if s[0] == sign)
                for sign in "-+"
            )
            yield Breakage(name, file, tests, old, new)


FILES = sorted(Path(__file__).parent.glob("*.txt"))
BREAKAGES = [breakage for path in FILES for breakage in read(path.read_text())]
