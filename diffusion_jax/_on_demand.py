"""Imports the modules of a package lazily, when they are first used."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def on_demand(
    package: str, names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns a lazy `__getattr__`, and the `__dir__`, of a package.

    Args:
      package: its `__name__`.
      names: of its modules.
    """

    def get(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(names)
