"""How a network of few steps is trained, and which sampling rules it can take."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from diffusion_jax.lab.schema.facts import Count, Share, at_least

Method = Literal[
    "none", "progressive", "consistency", "consistency_training", "ect", "mean_flow"
]
DISTILLED: tuple[Method, ...] = (
    "ect",
    "consistency",
    "consistency_training",
    "progressive",
)
"""Those that have a teacher; the first where none is named."""
CONSISTENT: tuple[Method, ...] = ("ect", "consistency", "consistency_training")
"""Those whose x0 is the end of the path through x_t."""
SEES_NOISE = ("v", "edm", "velocity")
"""Predictions whose x0 is x_t without noise, and finite in pure noise."""


class Takes(NamedTuple):
    """What a network trained by a method can be sampled by."""

    rules: tuple[str, ...]
    """Sampling rules; empty for all but those of the other methods."""
    why: str
    """What its output is."""


TAKES: dict[str, Takes] = {
    "none": Takes((), "its x0 is a mean of images"),
    "progressive": Takes(("ddim",), "it was halved for these steps of ddim alone"),
    **dict.fromkeys(
        CONSISTENT,
        Takes(("consistency",), "its x0 is the end of a path, not a mean of images"),
    ),
    "mean_flow": Takes((), "it knows velocities and their means"),
}
OWN: dict[str, tuple[str, ...]] = {
    "consistency": CONSISTENT,
    "mean_flow": ("mean_flow",),
}
"""Rules that only networks of some methods can take."""


@dataclass(frozen=True)
class Few:
    """Networks that draw in one to four steps; see `experiments.distil`."""

    method: Method = "none"
    """none: as the other fields say. progressive: two steps of DDIM become one, again
    and again. consistency: the end of the teacher's paths, in continuous time (sCM).
    consistency_training: of the data's. ect: that by steps which shrink. mean_flow:
    average velocities, from scratch. All but the last begin with the weights that
    init_from names, the teacher's."""
    first: Count = 32
    """Of progressive: steps of DDIM of the first student; a power of two times last."""
    last: Count = 1
    """Of progressive: steps of the last one, which it is sampled with."""
    guidance: Annotated[float | None, at_least(0)] = None
    """Classifier-free guidance (CFG) of the teacher, which the student learns with the
    rest (Meng et al. 2023)."""
    learn_v: Share = 0.0
    """Share of the run in which the network first learns v of the data, beginning with
    weights that predict eps or x0; what it is then is its teacher."""
    tangent_warmup: Share = 0.3
    """Of consistency: share of the rest over which the tangent's derivative fades
    in."""


def takes(method: str, rule: str) -> bool:
    """Returns whether a network of a method can be sampled by a rule.

    >>> takes("none", "ddpm"), takes("ect", "ddpm"), takes("none", "consistency")
    (True, False, False)
    """
    rules = TAKES[method].rules
    return (not rules or rule in rules) and method in OWN.get(rule, (method,))


def problems(
    few: Few, schedule: str, prediction: str, *, dropped: bool, total: int
) -> Iterator[tuple[str, str]]:
    """Yields what a method cannot take, as (field, what must hold).

    Args:
      few: the section.
      schedule, prediction: of the diffusion.
      dropped: whether the network was trained with dropped labels.
      total: diffusion steps, T.
    """
    if few.method == "none":
        return
    if schedule == "learned":
        yield "diffusion.schedule", f"a fixed one with few.method {few.method}"
    if few.method == "mean_flow":
        for name, value in (("schedule", schedule), ("prediction", prediction)):
            wanted = {"schedule": "flow", "prediction": "velocity"}[name]
            if value != wanted:
                yield f"diffusion.{name}", f"{wanted} with few.method mean_flow"
    elif prediction not in SEES_NOISE:
        yield (
            "diffusion.prediction",
            f"one of {', '.join(SEES_NOISE)} with few.method {few.method}, since "
            f"{prediction} tells no image from pure noise; a student learns v first, "
            "but not with the schedule ve",
        )
    halved = few.first // few.last
    if few.method == "progressive" and (
        few.last * halved != few.first or halved & (halved - 1) or halved < 1
    ):
        yield "few.first", f"few.last = {few.last} times a power of two"
    most = total // (4 if few.learn_v else 2)
    if few.method == "progressive" and few.first > most:
        yield "few.first", f"at most {most}, for the {total} diffusion steps"
    if few.learn_v and few.method == "mean_flow":
        yield "few.learn_v", "0 with few.method mean_flow, which has no teacher"
    if few.guidance is not None and (few.method == "mean_flow" or not dropped):
        must = "left out where no teacher was trained with classes and dropped labels"
        yield "few.guidance", must


def sampling_problems(
    few: Few, sampler: str, steps: int | None, *, eta: float | None, grid: str | None
) -> Iterator[tuple[str, str]]:
    """Yields what a network of few steps cannot be sampled with, and why."""
    rules, why = TAKES[few.method]
    if rules and sampler not in rules:
        yield "sample.sampler", f"{' or '.join(rules)}, since {why}"
    if few.method not in OWN.get(sampler, (few.method,)):
        made = " or ".join(OWN[sampler])
        must = f"another than {sampler}, which is for networks of few.method {made}"
        yield "sample.sampler", must
    how = few.last, 0.0, "uniform"
    if few.method == "progressive" and sampler == "ddim" and (steps, eta, grid) != how:
        must = f"{few.last}, without eta and with the grid uniform, since {why}"
        yield "sample.steps", must
