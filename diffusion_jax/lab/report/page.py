"""A run, or several side by side, as one page that needs no other file."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffusion_jax
from diffusion_jax import likelihood
from diffusion_jax.errors import counted
from diffusion_jax.lab.report import tables
from diffusion_jax.lab.report.elements import (
    Element,
    Series,
    chart,
    html,
    picture,
    table,
    tag,
)
from diffusion_jax.lab.report.reading import Story, finite
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import learning

MARK = "diffusion_jax report"
"""Says in the head of the page that this made it."""
MOST_RUNS = 8
"""As many as there are colours."""
ROOM = 1_200_000
"""Bytes of all pictures; the rest of a page is bounded by what its parts may have."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is fetched, and nothing runs, whatever stood in the files."""
MOST_STEPS = 100_000
"""Steps of a rate-distortion curve."""


def page(found: Sequence[Story], made: str, at: float) -> str:
    """Returns the page.

    `made` is the command line, `at` the time in seconds since 1970.
    """
    names = ", ".join(story.name for story in found)
    style = tag("style")
    style.text = resources.files(__package__).joinpath("style.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=MARK),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names}: report"),
        style,
    )
    foot = tag(
        "footer",
        tag("span", f"Made {tables.date(at)} by diffusion_jax "),
        tag("span", f"{diffusion_jax.__version__}: "),
        tag("code", made),
    )
    body = tag("body", *_body(found), foot)
    return "<!doctype html>\n" + html(tag("html", head, body, lang="en")) + "\n"


def _body(found: Sequence[Story]) -> Iterable[Element]:
    grids = chosen_grids(found)
    others = [p for story in found for p in _neighbours(story)]
    room = ROOM // max(1, sum(map(len, grids)) + len(others) + 1)
    yield _header(found, grids, room)
    wrong = [f"{story.name}: {said}" for story in found for said in story.wrong]
    if wrong:
        notes = (tag("li", said) for said in wrong[:40])
        yield tag("section", tag("h2", "What is damaged or missing"), tag("ul", *notes))
    if len(found) > 1:
        yield _section(table(tables.differing(found), wide=True), tables.DIFFER)
        yield _section(table(tables.figures(found)), "Figures")
    yield from _sections(_samples(found, grids, room), "Samples over steps", "rows")
    yield from _sections(curves(found), "Curves", "charts")
    shown = (
        tag("div", tag("h3", of.title), table(of)) for of in tables.evaluations(found)
    )
    yield from _sections(shown, "Evaluation", "tables")
    nearest = (
        picture(path, f"{story.name}: {path.stem}", room)
        for story in found
        for path in _neighbours(story)
    )
    about = "Samples, the nearest training images by pixels, and by features."
    yield from _sections(nearest, "Nearest neighbours", "rows", about)
    yield from _sections(rate_distortion(found), "Rate and distortion", "charts")
    for story in found:
        if story.config is not None:
            parts = [
                tag("div", tag("h3", of.title), table(of, wide=True))
                for of in tables.configuration(story)
            ]
            opened = {"open": "open"} if len(found) == 1 else {}
            title = "Configuration" + f" of {story.name}" * (len(found) > 1)
            about = "Values that are not the defaults stand out."
            words = tag("summary", title), tag("p", about)
            inner = tag("div", *parts, class_="fields")
            yield tag("section", tag("details", *words, inner, **opened))


def _header(found: Sequence[Story], grids: Sequence[list[Path]], room: int) -> Element:
    names = (
        tag("span", story.name, class_=f"name s{i}") for i, story in enumerate(found)
    )
    words = tag("div", tag("p", "Run report", class_="eyebrow"), tag("h1", *names))
    for story in found:
        said = f"{story.name}: " * (len(found) > 1) + described(story)
        words.append(tag("p", said, class_="lead"))
    if len(found) > 1:
        return tag("header", words)
    rows = tables.figures(found).rows
    tiles = (
        tag("div", tag("dt", name), tag("dd", value), class_="tile")
        for name, value in rows
    )
    words.append(tag("dl", *tiles, class_="tiles"))
    last = picture(grids[0][-1], "Samples of the last step", room) if grids[0] else None
    return tag("header", words, *([] if last is None else [last]))


def described(story: Story) -> str:
    """Returns what was trained, in a line."""
    config = story.config
    if config is None:
        return "its configuration cannot be read"
    count = _weights(config)
    data, diffusion, net = config.data, config.diffusion, config.net
    shape = "x".join(map(str, data.shape))
    classes = f", {counted(net.classes, 'class', 'classes')}" * bool(net.classes)
    return (
        f"{data.source} as {shape}{classes}; {diffusion.prediction} predicted under "
        f"the {diffusion.schedule} schedule, T = {diffusion.num_steps:,}; loss "
        f"{diffusion.loss}; {counted(count, 'weight')} ({net.channels} channels x "
        f"{' '.join(map(str, net.multipliers))}); {config.train.steps:,} steps of "
        f"{counted(config.train.batch_size, 'image')}"
    )


@functools.lru_cache
def _weights(config: Config) -> int:
    """Returns how many weights a network has; to trace it takes part of a second."""
    shapes = learning.state_shapes(config).params
    return sum(x.size for x in jax.tree.leaves(shapes))


def _section(inner: Element, title: str) -> Element:
    return tag("section", tag("h2", title), inner)


def _sections(
    parts: Iterable[Element | None], title: str, kind: str, about: str = ""
) -> Iterable[Element]:
    """Yields a section of the parts that there are, if there are any."""
    there = [part for part in parts if part is not None]
    if there:
        inner = tag("div", *there, class_=kind)
        words = [tag("p", about)] * bool(about)
        yield tag("section", tag("h2", title), *words, inner)


def chosen_grids(found: Sequence[Story]) -> list[list[Path]]:
    """Returns of each run the grids of samples to show, evenly over its steps."""
    most = 8 if len(found) == 1 else 4
    chosen = []
    for story in found:
        grids = sorted(story.run.samples.glob("step_*.png"))
        places = np.unique(np.linspace(0, len(grids) - 1, most).round().astype(int))
        chosen.append([grids[i] for i in places] if grids else [])
    return chosen


def _samples(
    found: Sequence[Story], grids: Sequence[list[Path]], room: int
) -> Iterable[Element | None]:
    for story, paths in zip(found, grids, strict=True):
        shown = []
        for path in paths:
            at = path.stem.removeprefix("step_")
            said = f"step {int(at):,}" if at.isdecimal() else path.stem
            made = picture(path, said, room)
            shown += [] if made is None else [made]
        strip = tag("div", *shown, class_="strip")
        named = [tag("h3", story.name)] * (len(found) > 1)
        yield tag("div", *named, strip) if shown else None


def _neighbours(story: Story) -> list[Path]:
    return sorted((story.run.folder / "eval").glob("neighbours*.png"))[:2]


def curves(found: Sequence[Story]) -> Iterable[Element | None]:
    """Yields the charts of what was logged; lines of one run have one colour."""
    several = len(found) > 1

    def lines(of: str, *, speed: bool = False, dashed: bool = False) -> list[Series]:
        said = of.replace("_", " ")
        return [
            Series(
                f"{story.name}{', ' + said if dashed else ''}" if several else said,
                story.points(of, story.speed if speed else None),
                i if several else int(dashed),
                dashed,
            )
            for i, story in enumerate(found)
        ]

    both = [*lines("loss"), *lines("held_out_loss", dashed=True)]
    yield chart("Loss", both, smooth=True, lowest=True)
    if not several:
        quarters = _quarters(found[0])
        yield chart("Loss by time", quarters, smooth=True, lowest=True)
    speed = lines("images_per_second", speed=True)
    yield chart("Speed", speed, unit="images a second", from_zero=True)
    yield chart("Norm of the gradient", lines("grad_norm"), smooth=True)
    rates = lines("learning_rate")
    yield chart("Learning rate", rates, from_zero=True)
    every, title = _distances(found), "Distance of samples, by step"
    yield chart(title, every, lowest=True)


def _quarters(story: Story) -> list[Series]:
    """Returns the loss of the examples in each quarter of the times."""
    names = ("least noise", "less", "more", "most noise")
    found = []
    for i, name in enumerate(names):
        points = [
            (line["step"], quarters[i])
            for line in story.metrics
            if isinstance(quarters := line.get("loss_by_time"), list)
            and len(quarters) == len(names)
            and finite(line["step"], quarters[i])
        ]
        found.append(Series(name, points, i))
    return found


def _distances(found: Sequence[Story]) -> list[Series]:
    series = list[Series]()
    for i, story in enumerate(found):
        every = [d for d in story.measured if d.step is not None and finite(d.step)]
        for name, same in itertools.groupby(
            sorted(every, key=lambda d: (d.name, d.step)), key=lambda d: d.name
        ):
            newest = {d.step: d.value for d in same}
            points = [(float(at or 0), value) for at, value in newest.items()]
            named = f"{story.name}, {name}" if len(found) > 1 else name
            color = i if len(found) > 1 else len(series) % MOST_RUNS
            series.append(Series(named, points, color))
    return series


def rate_distortion(found: Sequence[Story]) -> Iterable[Element | None]:
    """Yields Fig. 5 (Ho et al. 2020), of training and of test images."""
    for split, of in (("train", "training"), ("test", "test")):
        series = [
            Series(story.name, _code(story.results.get(f"nll_{split}", {})), i)
            for i, story in enumerate(found)
        ]
        yield chart(
            f"Error by rate, {of} images",
            series,
            xlabel="rate (bits/dim)",
            unit="RMSE of 255",
        )


def _code(result: dict[str, Any]) -> list[tuple[float, float]]:
    """Returns rate and distortion of a bound; none where it is not as it is written."""
    prior, terms, mse = (result.get(key) for key in ("prior", "terms", "mse"))
    if not (isinstance(terms, list) and isinstance(mse, list) and finite(prior)):
        return []
    if not (finite(*terms, *mse) and 1 < len(terms) == len(mse) <= MOST_STEPS):
        return []
    values = np.asarray(mse, np.float64)
    code = likelihood.rate_distortion(np.asarray(prior), np.asarray(terms), values)
    pairs = zip(code.rate.tolist(), code.distortion.tolist(), strict=True)
    return [pair for pair in pairs if finite(*pair)]
