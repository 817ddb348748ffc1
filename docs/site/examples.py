"""Shows the doctests of docstrings as examples, and what is set apart as written."""

import re
import textwrap
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives what begins with a prompt the heading that readers of docstrings know.

    And paragraphs that are indented, such as equations, keep their lines.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object."""
        if obj.docstring is None:
            return
        parts = obj.docstring.value.split("\n\n")
        apart = [all(line[:2] == "  " for line in part.split("\n")) for part in parts]
        said = "\n\n".join(
            textwrap.indent(part, "    ") if alone else part
            for part, alone in zip(parts, apart, strict=True)
        )
        obj.docstring.value = said
        if found := re.search(r"^>>> ", said, re.M):
            before, code = said[: found.start()], said[found.start() :]
            code = textwrap.indent(code.rstrip(), "    ")
            obj.docstring.value = f"{before}Examples:\n{code}"
