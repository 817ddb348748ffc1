"""Reads flags by tyro. `--help` shows the main ones, `--help-all` shows all."""

import dataclasses
import inspect
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import docstring_parser
import tyro

from diffusion_jax.errors import raise_unknown

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
WIDTH, COLUMN = 80, 31
"""Characters of a line of `--help`, and where the texts of its flags begin."""


def read(
    kind: Any,
    *,
    args: Sequence[str],
    prog: str,
    brief: str | None = None,
    **options: Any,
) -> Any:
    """Returns what `tyro.cli` reads.

    The MAIN of the dataclass, if it has one, is a string with the names of those that
    `--help` shows, such as "count data.source"; `brief` is what it says in place of the
    description. Options are those of `tyro.cli`.

    Raises:
      SystemExit: help was asked for, or a flag does not exist or has another type.
    """
    if set(HELP) & set(args):
        said = options.get("description") if brief is None else brief
        print(main_flags(kind, options.get("default"), prog, said or ""))
        raise SystemExit(0)
    words = [HELP[-1] if word == HELP_ALL else word for word in args]
    if options.get("description"):
        # Where the next line is not indented, tyro joins the two.
        options["description"] = textwrap.indent(filled(options["description"]), "  ")
    with _paragraphs():
        return tyro.cli(kind, args=words, prog=prog, **options)


def overview(prog: str, text: str, commands: Mapping[str, type]) -> str:
    """Returns what `--help` says of a program that has commands of its own.

    The docstrings of the commands' dataclasses say what they do.
    """
    lines = [f"usage: {prog} COMMAND ...", "", filled(text), "", "commands:"]
    for name, kind in commands.items():
        said = f"{name:<16}{(kind.__doc__ or '').partition(chr(10))[0]}"
        lines += textwrap.wrap(
            said, WIDTH - 2, initial_indent="  ", subsequent_indent=" " * 18
        )
    return "\n".join([*lines, "", f"flags of one: {prog} {[*commands][-1]} --help"])


def of_several(
    args: Sequence[str], prog: str, text: str, commands: Mapping[str, type]
) -> tuple[str, Any]:
    """Returns the name of the command that is named first, and its options.

    Raises:
      ConfigError: no such command.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    name, *rest = args or HELP[1:]
    if asked([name]):
        print(overview(prog, text, commands))
        raise SystemExit(0)
    if name not in commands:
        raise_unknown("the command", name, tuple(commands))
    kind = commands[name]
    prog = f"{prog} {name}"
    return name, read(kind, args=rest, prog=prog, description=kind.__doc__)


def typed(values: Mapping[str, Any]) -> str:
    """Returns values by the names of their fields as one types them.

    What is None or empty has no flag: it is what one gets without.

    >>> typed({"net.multipliers": [1, 2], "data.flip": False, "data.hold_out": 0.1})
    '--net.multipliers 1 2 --data.no-flip --data.hold-out 0.1'
    >>> typed({"init_from": None, "data.source": "folder:my images"})
    "--data.source 'folder:my images'"
    """
    words = []
    for name, value in values.items():
        section, dot, field = name.replace("_", "-").rpartition(".")
        many = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, bool):
            words.append(f"--{section}{dot}{'' if value else 'no-'}{field}")
        elif value is not None and value != []:
            words += [f"--{section}{dot}{field}", *map(str, many)]
    return shlex.join(words)


def asked(args: Sequence[str]) -> bool:
    """Returns whether arguments ask for help."""
    return not {*HELP, HELP_ALL}.isdisjoint(args)


def filled(text: str) -> str:
    """Returns a docstring in lines of 78; paragraphs with indented lines stay."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if "\n " in p else textwrap.fill(p, WIDTH - 2) for p in parts)


class Flag(NamedTuple):
    """A field as `--help` shows it."""

    usage: str
    text: str


def main_flags(kind: Any, default: Any, prog: str, description: str) -> str:
    """Returns the text of `--help`: a line or two for each flag that it shows.

    Without a default the flags have the defaults of their fields. Indented lines of the
    description stay as they are.
    """
    flags = dict(_flags(kind, default))
    names = kind.MAIN.split() if hasattr(kind, "MAIN") else list(flags)
    chosen = {name: flags[name] for name in names}
    named = [f.usage for f in chosen.values() if not f.usage.startswith("-")]
    lines = [" ".join(["usage:", prog, *named, "[OPTIONS]"]), ""]
    lines += [filled(description), ""]
    lines.append("flags, and in brackets what they are when not given:")
    for usage, text in chosen.values():
        first, *more = textwrap.wrap(text, WIDTH - COLUMN)
        lines.append(f"  {usage} ".ljust(COLUMN) + first)
        lines += [" " * COLUMN + line for line in more]
    said = f"all {len(flags)} flags, with all that is said of each"
    return "\n".join([*lines, "", f"{said}: {HELP_ALL}"])


def _flags(kind: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Flag]]:
    """Yields all flags by the names of their fields, such as data.source."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = {
        field.arg_name: field.description or ""
        for base in reversed(kind.__mro__[:-1])
        for field in docstring_parser.parse_from_object(base).params
    }
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], list[Any]()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        value = field.default if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(hint):
            alone = tyro.conf.OmitArgPrefixes in marks or any(
                getattr(mark, "name", None) == "" for mark in marks
            )
            inner = prefix if alone else f"{prefix}{field.name}."
            yield from _flags(hint, value, inner)
            continue
        name, usage = f"{prefix}{field.name}", _usage(hint)
        text = texts.get(field.name, "")
        for mark in marks:
            text = getattr(mark, "help", None) or text
            usage = getattr(mark, "metavar", None) or usage
        if tyro.conf.Positional not in marks:
            no = "no-" if value is True else ""
            usage = f"--{prefix}{no}{field.name} {usage}".replace("_", "-").strip()
        elif value is not dataclasses.MISSING:
            usage = f"[{usage}]"
        yield name, Flag(usage, _text(text, hint, value))


def _plain(hint: Any) -> Any:
    """Returns a type without its marks, and the first of several."""
    if typing.get_origin(hint) is typing.Annotated:
        return _plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _plain(next(a for a in typing.get_args(hint) if a is not type(None)))
    return hint


def _usage(hint: Any) -> str:
    """Returns what stands for the value of a flag."""
    kind = _plain(hint)
    if kind is bool:
        return ""
    if typing.get_origin(kind) is tuple:
        return f"{_usage(typing.get_args(kind)[0])} ..."
    if typing.get_origin(kind) is Literal:
        return "NAME"
    return {int: "N", float: "X", str: "TEXT"}.get(kind, kind.__name__.upper())


def _text(text: str, hint: Any, value: Any) -> str:
    """Returns what a flag is, in a few words; the names it may be; and its default."""
    short = re.split(r"(?<!\.)[.;:](?: |$)", " ".join(text.split()))[0]
    if short.count("(") > short.count(")"):
        short = short.rpartition(" (")[0]
    if isinstance(value, bool) and short.startswith("Whether to "):
        does = short.removeprefix("Whether to ")
        short = f"Do not {does}" if value else does[:1].upper() + does[1:]
    end = ""
    if value not in (None, (), dataclasses.MISSING) and not isinstance(value, bool):
        words = map(str, value if isinstance(value, tuple) else (value,))
        end = textwrap.shorten(f"[{' '.join(words)}]", 30, placeholder=" ...]")
    # Two lines, of which the first may end early.
    room = 2 * (WIDTH - COLUMN) - 12 - len(end)
    kind = _plain(hint)
    if typing.get_origin(kind) is Literal:
        names = ", ".join(map(str, typing.get_args(kind)))
        both = f"{short}: {names}"
        short = names if len(names) <= room < len(both) else both
    elif len(short) > room:  # what is after a comma is not begun
        short = short[:room].rpartition(",")[0] or short
    return f"{textwrap.shorten(short, room, placeholder=' ...')} {end}".strip()


@contextmanager
def _paragraphs() -> Iterator[None]:
    """Has tyro take each text of a field for one paragraph.

    Where the next line of a docstring is indented, as that of a field is, tyro keeps
    the break, and wraps what is before it once more.
    """
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
