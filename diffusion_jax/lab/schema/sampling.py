"""How a command draws samples: which rule, which times, and what each rule takes."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Rule = Literal[
    "ddpm",
    "ddim",
    "heun",
    "edm",
    "dpm_solver_pp",
    "unipc",
    "predictor_corrector",
    "langevin",
    "ode",
]
Grid = Literal["uniform", "quadratic", "logsnr", "karras"]
Variance = Literal["small", "large", "learned", "range", "analytic"]
Order = Literal["1", "2", "3", "2S", "2M", "3M", "SDE"]


class Taken(NamedTuple):
    """What a rule takes, and what it has where nothing is said."""

    options: dict[str, Any]
    """Names of its own options with their defaults; None is the run's."""
    grid: Grid | None = "uniform"
    """Times to walk; None is a rule that finds its own."""
    steps: int | None = None
    """Steps to make; None is all T."""


RULES: dict[Rule, Taken] = {
    "ddpm": Taken({"variance": None}),
    "ddim": Taken({"eta": 0.0}, steps=50),
    "heun": Taken({}, "karras", 18),
    "edm": Taken({"churn": 10.0}, "karras", 32),
    "dpm_solver_pp": Taken({"order": "2M"}, steps=20),
    "unipc": Taken({"order": "2"}, steps=20),
    "predictor_corrector": Taken({"corrections": 1, "snr": 0.16}, steps=500),
    "langevin": Taken({"moves": 10, "step_size": 0.2}, "logsnr", 100),
    "ode": Taken({"tolerance": 1e-3}, None),
}
ORDERS = {"dpm_solver_pp": ("1", "2S", "2M", "3M", "SDE"), "unipc": ("1", "2", "3")}
EXTRAS = (
    "threshold",
    "label",
    "guidance",
    "guidance_interval",
    "classifier_guidance",
)
OPTIONS = sorted({name for taken in RULES.values() for name in taken.options})


@dataclass(frozen=True)
class Sampling:
    """How a command draws samples: what is given replaces what the run has."""

    sampler: Rule | None = None
    """Sampling rule; the run's when not given, with what the run says of it. Another
    rule comes with its own defaults for all that follows."""
    steps: int | None = None
    """Reverse steps."""
    grid: Grid | None = None
    """Which times the steps go through: evenly spaced, denser near the data, evenly
    spaced in log-SNR, or as Karras et al. 2022."""
    variance: Variance | None = None
    """Variance of the reverse steps of ddpm; analytic is the best there is for the
    network, estimated once from the data."""
    eta: float | None = None
    """Noise of ddim, from 0 (none, the default) to 1 (as much as ddpm)."""
    order: Order | None = None
    """Of dpm_solver_pp: 1, 2S, 2M (the default), 3M or SDE; of unipc: 1, 2 (the
    default) or 3."""
    churn: float | None = None
    """Noise of edm over the whole chain, S_churn."""
    corrections: int | None = None
    """Langevin moves of predictor_corrector after each step."""
    snr: float | None = None
    """Size of those moves."""
    moves: int | None = None
    """Langevin moves of langevin at each level."""
    step_size: float | None = None
    """Their size, in units of the noise's variance."""
    tolerance: float | None = None
    """Of ode: error that a step may make, relative and absolute."""
    threshold: float | None = None
    """Dynamic thresholding in the place of the clip: a percentile, such as 0.995."""
    label: int | None = None
    """Class to draw, of a network with classes; all in turn when not given."""
    guidance: float | None = None
    """Classifier-free guidance: 1 is none, more is more of the class."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where sigma / alpha is above the first and at most the second."""
    classifier_guidance: float | None = None
    """Guidance by the run's noisy classifier (train_noisy_classifier), of any network:
    0 is none."""


@dataclass(frozen=True)
class Sample(Sampling):
    """The pictures made while training."""

    sampler: Rule = "ddpm"
    """Sampling rule; each has its own defaults for what is not given."""
    steps: int | None = None
    """Reverse steps; for ddpm all T when not given."""
    variance: Variance | None = None
    """Variance of the reverse steps of ddpm; diffusion.variance when not given."""
    every: int = 10_000
    """Steps between two grids; the last step always has one."""
    count: int = 64
    """Images in a grid."""
    clip: bool = True
    """Whether each predicted image is clipped to [-1, 1]; never by ode."""


def override(sample: Sample, given: Sampling) -> Sample:
    """Returns the run's way to sample with what is given in its place.

    With another rule the run's options go: they were those of its own.
    """
    chosen = {name: value for name, value in _fields(given) if value is not None}
    values = dataclasses.asdict(sample)
    if chosen.get("sampler", sample.sampler) != sample.sampler:
        values |= dict.fromkeys((*OPTIONS, "grid", "steps", "threshold"))
    return Sample(**(values | chosen))


def resolve(sample: Sample, num_steps: int) -> dict[str, Any]:
    """Returns what a chain of T = num_steps is drawn with: every option has a value.

    Of ddpm's variance the value may still be None: that of the run.
    """
    rule, taken = sample.sampler, RULES[sample.sampler]
    found: dict[str, Any] = {"sampler": rule}
    if taken.grid is not None:
        found["steps"] = sample.steps or min(taken.steps or num_steps, num_steps)
        found["grid"] = sample.grid or taken.grid
    for name, default in taken.options.items():
        value = getattr(sample, name)
        found[name] = default if value is None else value
    # A solver that adapts would find the corners of a clip, and go through them slowly.
    found["clip"] = sample.clip and rule != "ode"
    for name in EXTRAS:
        if getattr(sample, name) is not None:
            found[name] = getattr(sample, name)
    return found


def describe(found: dict[str, Any]) -> str:
    """Returns in a few words what `resolve` found, among other fields.

    >>> describe(resolve(Sample(sampler="unipc", steps=10), 1000))
    '10 steps of unipc (order 2, uniform grid)'
    """
    rule: Rule = found["sampler"]
    names = [*RULES[rule].options, *(name for name in EXTRAS if name in found)]
    said = [f"{name.replace('_', ' ')} {found[name]}" for name in names]
    if "grid" not in found:
        return f"{rule} ({', '.join(said)})"
    said.append(f"{found['grid']} grid")
    return f"{found['steps']} steps of {rule} ({', '.join(said)})"


def problems(sample: Sample) -> list[tuple[str, str, object]]:
    """Returns what is wrong, as (field, what must hold, what was got)."""
    rule, taken = sample.sampler, RULES[sample.sampler]
    for name in OPTIONS:
        if getattr(sample, name) is not None and name not in taken.options:
            may = [r for r, other in RULES.items() if name in other.options]
            must = f"left out with the sampler {rule}: it is for {' and '.join(may)}"
            return [(name, must, getattr(sample, name))]
    if taken.grid is None:
        for name in ("steps", "grid", "threshold"):
            if getattr(sample, name) is not None:
                must = f"left out with the sampler {rule}, which finds its own way"
                return [(name, must, getattr(sample, name))]
    checks = {
        "eta": ("from 0 to 1", lambda v: 0 <= v <= 1),
        "order": (
            f"one of {', '.join(ORDERS.get(rule, ()))} with {rule}",
            lambda v: v in ORDERS[rule],
        ),
        "churn": ("at least 0", lambda v: v >= 0),
        "corrections": ("at least 0", lambda v: v >= 0),
        "snr": ("above 0", lambda v: v > 0),
        "moves": ("at least 1", lambda v: v >= 1),
        "step_size": ("above 0 and at most 2", lambda v: 0 < v <= 2),
        "tolerance": ("above 0 and below 1", lambda v: 0 < v < 1),
        "threshold": ("above 0 and at most 1", lambda v: 0 < v <= 1),
        "guidance": ("at least 0", lambda v: v >= 0),
        "guidance_interval": ("rising, from 0", lambda v: 0 <= v[0] < v[1]),
        "classifier_guidance": ("at least 0", lambda v: v >= 0),
    }
    return [
        (name, must, getattr(sample, name))
        for name, (must, holds) in checks.items()
        if getattr(sample, name) is not None and not holds(getattr(sample, name))
    ]


def _fields(sampling: Sampling) -> list[tuple[str, Any]]:
    names = [field.name for field in dataclasses.fields(Sampling)]
    return [(name, getattr(sampling, name)) for name in names]
