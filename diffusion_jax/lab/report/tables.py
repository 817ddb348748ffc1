"""Tables of one run or of several side by side: as text, and for a page."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from diffusion_jax.errors import counted
from diffusion_jax.lab.report.reading import Story, best, finite
from diffusion_jax.lab.schema import json_fields, sampling
from diffusion_jax.lab.schema.config import Config, to_dict
from diffusion_jax.lab.trained import weights

LONGEST = 160
"""Characters of a cell: a file from elsewhere may have more."""
MOST_ROWS, MOST_TABLES = 40, 12
"""Of what there is more, the rest is left out: a page has its size."""
PLACES = ("name", "output")
"""Fields that say where a run is, not what it is."""
NONE = "-"
DIFFER = "What differs in their configurations"


class Table(NamedTuple):
    """Rows of text, the first cell of each its name."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    marked: frozenset[tuple[int, int]] = frozenset()
    """Cells that stand out, as (row, column)."""
    protocol: int = 0
    """So many of the last rows say how the numbers above were made."""


def text(table: Table) -> str:
    """Returns a table in columns, for a terminal.

    >>> print(text(Table("", ("", "a", "b"), [("loss", "0.5", "0.25")])))
            a  b
      loss  0.5  0.25
    """
    lines = [table.head, *table.rows]
    cells = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def printable(said: str) -> str:
    """Returns text in one line that does nothing to a terminal, cut where too long.

    >>> printable("a\\x1b[2Jb")
    'a?[2Jb'
    """
    short = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    return "".join(c if c.isprintable() else "?" for c in short)


def differing(found: Sequence[Story]) -> Table:
    """Returns the fields in which configurations differ, and their values."""
    values = [_fields(story.config) for story in found]
    names = [name for each in values for name in each]
    rows = [
        (name, *(each.get(name, NONE) for each in values))
        for name in dict.fromkeys(names)
        if name not in PLACES and len({each.get(name) for each in values}) > 1
    ]
    return Table(DIFFER, ("", *(story.name for story in found)), rows)


def configuration(story: Story) -> list[Table]:
    """Returns the fields of each section; those that are not the defaults stand out."""
    usual, fields, tables = _fields(Config()), _fields(story.config), list[Table]()
    for section, names in groupby(fields, lambda name: name.rpartition(".")[0]):
        chosen = [name for name in names if name not in PLACES]
        rows: list[tuple[str, ...]] = [
            (name.rpartition(".")[2], fields[name]) for name in chosen
        ]
        other = {(i, 1) for i, n in enumerate(chosen) if usual[n] != fields[n]}
        tables.append(Table(section or "run", (), rows, frozenset(other)))
    return tables


def figures(found: Sequence[Story]) -> Table:
    """Returns the figures by which one looks at a run first; the best stand out."""
    measures: list[tuple[str, Callable[[Story], float | None], str, int]] = [
        ("loss (mean of the last tenth)", lambda s: tail(s, "loss"), ".4f", -1),
        ("loss of held-out images", lambda s: last(s, "held_out_loss"), ".4f", -1),
        ("steps skipped", _skipped, ",.0f", 0),
        ("images a second", _rate, ",.0f", 1),
        ("hours of training", _hours, ".2f", 0),
        ("MiB on disk", lambda s: s.size / 2**20, ",.1f", 0),
    ]
    rows: list[tuple[str, ...]] = [("step", *map(_step, found))]
    marked = set[tuple[int, int]]()
    for name, read, form, sign in measures:
        values = [read(story) for story in found]
        if any(value is not None for value in values):
            marked |= _mark_best(len(rows), values, sign)
            said = (NONE if v is None else format(v, form) for v in values)
            rows.append((name, *said))
    nearest = [best(story) for story in found]
    for name in dict.fromkeys(d.name for d in nearest if d):
        values = [d.value if d and d.name == name else None for d in nearest]
        marked |= _mark_best(len(rows), values, -1)
        said = (
            f"{d.value:.4g} at step {d.step or 0:,}" if d and d.name == name else NONE
            for d in nearest
        )
        rows.append((f"lowest {name}", *said))
    head = ("", *(story.name for story in found))
    return Table("Figures", head, rows, frozenset(marked))


def evaluations(found: Sequence[Story]) -> list[Table]:
    """Returns a table for each kind of evaluation: its numbers, then its protocol."""
    names = sorted({name for story in found for name in story.results})
    made = (_evaluation(name, found) for name in names if name != "fid_training")
    return [table for table in made if table.rows][:MOST_TABLES]


def _evaluation(name: str, found: Sequence[Story]) -> Table:
    numbers, protocols = [], []
    for story in found:
        result = story.results.get(name, {})
        numbers.append(_numbers(result))
        protocols.append(_protocol(result) if numbers[-1] else {})
    rows = [_row(key, numbers) for key in dict.fromkeys(k for n in numbers for k in n)]
    how = [
        _row(key, protocols) for key in dict.fromkeys(k for p in protocols for k in p)
    ]
    rows = rows[:MOST_ROWS]
    other = {
        (len(rows) + i, column)
        for i, (_, first, *more) in enumerate(how if rows else [])
        for column, value in enumerate(more, 2)
        if NONE not in (first, value) and value != first
    }
    head = ("", *(story.name for story in found))
    title = TITLES.get(name, name)
    return Table(title, head, rows + how * bool(rows), frozenset(other), len(how))


def _row(key: str, of_each: list[dict[str, str]]) -> tuple[str, ...]:
    return (key, *(each.get(key, NONE) for each in of_each))


TITLES = {
    "fid": "Distance of samples from the images (eval_fid)",
    "fid_raw": "Distance, without the moving average (eval_fid)",
    "fid_untrained": "Distance of an untrained network, a yardstick",
    "fid_given": "Distance of samples that were given (eval_fid)",
    "nll_train": "Bound on the training images (eval_nll)",
    "nll_test": "Bound on test images (eval_nll)",
    "nll_ode_train": "Probability flow on the training images (eval_nll)",
    "nll_ode_test": "Probability flow on test images (eval_nll)",
    "samplers": "Samplers (compare_samplers)",
    "legibility": "Legibility (legibility)",
    "codec_train": "Compressed training images, bytes each (codec compare)",
    "codec_test": "Compressed test images, bytes each (codec compare)",
}
BITS = {
    "bits_per_dim": "bits/dim",
    "prior": "prior L_T",
    "rate": "rate, bits/dim",
    "decoder": "decoder L_0, bits/dim",
    "rmse": "RMSE of 255, x0 seen from x_1",
}
LEGIBLE = {
    "certainty": "certainty, of that of held-out images (at least 0.9)",
    "copies": "share of copies (less than 0.02)",
}


def _numbers(result: dict[str, Any]) -> dict[str, str]:
    """Returns the numbers of a result by their names, without what has another form."""
    said: dict[str, str] = {}
    numbers = result.get("numbers")
    for name, value in numbers.items() if isinstance(numbers, dict) else ():
        if isinstance(value, dict) and finite(value.get("mean")):
            bar = f" ± {value['std']:.2g}" if finite(value.get("std")) else ""
            said[str(name)] = f"{value['mean']:.4g}{bar}"
        elif isinstance(value, list) and finite(*value):
            said["classes, in %"] = " ".join(f"{100 * x:.1f}" for x in value[:20])
    halves = result.get("half_of_train_against_the_other_half")
    if finite(halves):
        said["the same of one half of train vs other"] = f"{halves:.4g}"
    for key, name in {**BITS, **LEGIBLE}.items():
        if finite(result.get(key)):
            error = result.get("standard_error") if key == "bits_per_dim" else None
            bar = f" ± {error:.2g}" if finite(error) else ""
            said[name] = f"{result[key]:.4g}{bar}"
    said |= _points(result.get("points"))
    sizes = result.get("bytes_each")
    for name, value in sizes.items() if isinstance(sizes, dict) else ():
        if finite(value):
            said[str(name)] = f"{value:.1f}"
    return said


def _points(points: Any) -> dict[str, str]:
    """Returns the lowest distance of each rule, and with how many evaluations."""
    lowest: dict[str, tuple[float, float]] = {}
    for point in points if isinstance(points, list) else ():
        if isinstance(point, dict) and finite(
            point.get("distance"), point.get("evaluations")
        ):
            found = point["distance"], point["evaluations"]
            rule = str(point.get("rule"))
            lowest[rule] = min(found, lowest.get(rule, found))
    return {r: f"{d:.4g} at {n:.0f} evaluations" for r, (d, n) in lowest.items()}


def _protocol(result: dict[str, Any]) -> dict[str, str]:
    """Returns how numbers were made, by what it says, as far as it is there."""
    said: dict[str, str] = {}
    for key, name in (
        ("count", "samples"),
        ("images", "images"),
        ("seeds", "seeds"),
        ("seed", "seed"),
        ("distance", "distance"),
        ("extractor", "features of"),
        ("data", "data"),
        ("split", "split"),
        ("variance", "variance"),
        ("trace", "trace"),
        ("tolerance", "tolerance"),
        ("rounding", "rounding"),
    ):
        if isinstance(result.get(key), str | int | float | list):
            said[name] = _plain(result[key])
    if isinstance(result.get("reference"), dict):
        said["against"] = "; ".join(map(_plain, result["reference"].values()))
    kind, step = result.get("weights"), result.get("training_step")
    step = result.get("step") if step is None else step
    if json_fields.is_whole(step):
        said["weights"] = weights.describe(str(kind or "averaged"), step)
    with suppress(KeyError, TypeError, ValueError):  # not every evaluation samples
        said["sampling"] = sampling.describe(result)
    return said


def _fields(config: Config | None) -> dict[str, str]:
    values = {} if config is None else json_fields.flat(to_dict(config))
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> str:
    """Returns a JSON value as a person writes it.

    >>> _plain(None), _plain([1, 2]), _plain(True), _plain(2e-4)
    ('-', '1 2', 'yes', '0.0002')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return NONE
    if isinstance(value, list):
        return " ".join(map(_plain, value[:40]))
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _mark_best(
    row: int, values: Sequence[float | None], sign: int
) -> set[tuple[int, int]]:
    """Returns the cell of the best value, where several are compared."""
    known = [value for value in values if value is not None]
    if not sign or len(set(known)) < 2:
        return set()
    top = max(known, key=lambda value: sign * value)
    return {(row, 1 + i) for i, value in enumerate(values) if value == top}


def last(story: Story, name: str) -> float | None:
    """Returns the last value of a metric."""
    points = story.points(name)
    return points[-1][1] if points else None


def tail(story: Story, name: str) -> float | None:
    """Returns the mean of the last tenth of a metric's values."""
    values = [value for _, value in story.points(name)]
    part = values[-max(1, len(values) // 10) :]
    return sum(part) / len(part) if part else None


def _step(story: Story) -> str:
    last = f" of {story.config.train.steps:,}" if story.config else ""
    return f"{story.step:,}{last}"


def _skipped(story: Story) -> float | None:
    counts = [value for _, value in story.points("skipped")]
    return sum(counts) if counts else None


def _rate(story: Story) -> float | None:
    """Returns the median of the speed, which pauses do not move."""
    rates = sorted(r for _, r in story.points("images_per_second", story.speed) if r)
    return rates[len(rates) // 2] if rates else None


def _hours(story: Story) -> float | None:
    """Returns the time between lines, without those between a stop and a resumption."""
    times = [at for _, at in story.points("time", story.speed)]
    gaps = sorted(b - a for a, b in pairwise(times))
    if not gaps:
        return None
    usual = 10 * gaps[len(gaps) // 2]
    return sum(gap for gap in gaps if gap <= usual) / 3600


def ago(seconds: float) -> str:
    """Returns how long ago something was.

    >>> ago(5), ago(600), ago(7200), ago(2e6)
    ('5 s', '10 min', '2 h', '23 days')
    """
    for unit, many in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * many or (unit == "h" and seconds < 48 * many):
            return f"{max(0, seconds) / many:.0f} {unit}"
    return counted(round(seconds / 86400), "day")


def size(count: int) -> str:
    """Returns bytes as a person reads them.

    >>> size(1000), size(3 * 2**30)
    ('1000 B', '3.0 GiB')
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.{int(units[0] != 'B')}f} {units[0]}"


def date(at: float) -> str:
    """Returns a time as the day and the minute, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
