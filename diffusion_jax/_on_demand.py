"""Modules of a package that are imported when they are first asked for."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def on_demand(
    package: str, names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and the `__dir__` of a package that imports nothing.

    Args:
      package: its `__name__`.
      names: of its modules.
    """

    def get(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(names)
