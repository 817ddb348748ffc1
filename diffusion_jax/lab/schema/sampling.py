"""How samples are drawn: the sampling rules, their times, and their options."""

import dataclasses
import operator
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import diffusion_jax
from diffusion_jax.errors import counted
from diffusion_jax.lab.schema.facts import (
    Count,
    Must,
    Positive,
    Whole,
    at_least,
    between,
)

Grid = Literal["uniform", "quadratic", "logsnr", "karras"]
Variance = Literal["small", "large", "learned", "range", "analytic"]
Order = Literal["1", "2", "3", "2S", "2M", "3M", "SDE"]


class Rule(NamedTuple):
    """A sampling rule (sampler) and its defaults."""

    make: Callable[..., Any]
    """Function of a denoiser, a schedule and its own options to a `Sampler`."""
    options: dict[str, Any]
    """Its own options, which are fields of `Sampling`, with their defaults; None stands
    for the run's value."""
    grid: Grid | None = "uniform"
    """Times to step through; None for a rule that chooses its own."""
    steps: int | None = None
    """Steps to make; None is all T."""
    orders: tuple[Order, ...] = ()
    """Values that its option order may have."""


def _late(name: str) -> Callable[..., Any]:
    """Returns a function of the library that is imported when it is called.

    It imports JAX, for which no command line should wait.
    """
    return lambda *of, **how: operator.attrgetter(name)(diffusion_jax)(*of, **how)


def _unipc(denoise: Any, schedule: Any, *, order: str) -> Any:
    return _late("solvers.unipc")(denoise, schedule, order=int(order))


def _ode(denoise: Any, schedule: Any, *, tolerance: float) -> Any:
    return _late("ode.ode")(denoise, schedule, rtol=tolerance, atol=tolerance)


RULES: dict[str, Rule] = {
    "ddpm": Rule(_late("samplers.ddpm"), {"variance": None}),
    "ddim": Rule(_late("samplers.ddim"), {"eta": 0.0}, steps=50),
    "heun": Rule(_late("solvers.heun"), {}, "karras", 18),
    "edm": Rule(_late("solvers.edm"), {"churn": 10.0}, "karras", 32),
    "dpm_solver_pp": Rule(
        _late("solvers.dpm_solver_pp"),
        {"order": "2M"},
        steps=20,
        orders=("1", "2S", "2M", "3M", "SDE"),
    ),
    "unipc": Rule(_unipc, {"order": "2"}, steps=20, orders=("1", "2", "3")),
    "predictor_corrector": Rule(
        _late("langevin.predictor_corrector"),
        {"corrections": 1, "snr": 0.16},
        steps=500,
    ),
    "langevin": Rule(
        _late("langevin.langevin"), {"moves": 10, "step_size": 0.2}, "logsnr", 100
    ),
    "consistency": Rule(_late("jumps.consistency"), {}, steps=2),
    "mean_flow": Rule(_late("jumps.mean_flow"), {}, steps=2),
    "ode": Rule(_ode, {"tolerance": 1e-3}, grid=None),
}
Tolerance = Annotated[float, Must("above 0 and below 1", lambda v: 0 < v < 1)]
OPTIONS = sorted({name for rule in RULES.values() for name in rule.options})
if typing.TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]


@dataclass(frozen=True)
class Sampling:
    """How a command draws samples; what is given replaces the run's values."""

    sampler: RuleName | None = None
    """Sampling rule (sampler, scheduler); the run's, with its options, when not given.
    Another rule has its own defaults for all options below."""
    steps: Count | None = None
    """Reverse steps, mostly as many evaluations of the network (NFE); for ddpm all T
    when not given."""
    grid: Grid | None = None
    """Times of the steps: evenly spaced, denser near the data, evenly spaced in
    log-SNR, or as Karras et al. 2022."""
    variance: Variance | None = None
    """Variance of the reverse steps of ddpm, diffusion.variance when not given;
    analytic is the optimal one for the network, estimated once from the data."""
    eta: Annotated[float | None, between(0, 1)] = None
    """Noise of ddim, from 0 (none, the default) to 1 (as much as ddpm)."""
    order: Order | None = None
    """Of dpm_solver_pp: 1, 2S, 2M (the default), 3M or SDE; of unipc: 1, 2 (the
    default) or 3."""
    churn: Annotated[float | None, at_least(0)] = None
    """Noise of edm over the whole chain, S_churn."""
    corrections: Whole | None = None
    """Langevin moves of predictor_corrector after each step."""
    snr: Positive | None = None
    """Size of those moves."""
    moves: Count | None = None
    """Langevin moves of langevin at each level."""
    step_size: Annotated[
        float | None, Must("above 0 and at most 2", lambda v: 0 < v <= 2)
    ] = None
    """Their size, in units of the noise's variance."""
    tolerance: Tolerance | None = None
    """Of ode: error that a step may make, relative and absolute."""
    threshold: Annotated[
        float | None, Must("above 0 and at most 1", lambda v: 0 < v <= 1)
    ] = None
    """Dynamic thresholding in place of the clip: a percentile, such as 0.995."""
    label: Whole | None = None
    """Class to draw, of a network with classes; all in turn when not given."""
    guidance: Annotated[float | None, at_least(0)] = None
    """Classifier-free guidance (CFG): 1 is none, more is more of the class."""
    guidance_interval: Annotated[
        tuple[float, float] | None, Must("rising, from 0", lambda v: 0 <= v[0] < v[1])
    ] = None
    """Guide only where sigma / alpha is above the first and at most the second."""
    classifier_guidance: Annotated[float | None, at_least(0)] = None
    """Guidance by the run's noisy classifier (train_noisy_classifier), of any network:
    0 is none."""


@dataclass(frozen=True)
class Sample(Sampling):
    """The pictures made while training."""

    sampler: RuleName = "ddpm"
    """Sampling rule (sampler, scheduler); each has its own defaults for what is not
    given."""
    every: Count = 10_000
    """Steps between two grids; the last step always has one."""
    count: Annotated[int, between(1, 2**20)] = 64
    """Images in a grid."""
    clip: bool = True
    """Whether each predicted image is clipped to [-1, 1]; never by ode."""


EXTRAS = [
    field.name
    for field in dataclasses.fields(Sampling)
    if field.name not in ("sampler", "steps", "grid", *OPTIONS)
]
"""Options of every rule."""


def override(sample: Sample, given: Sampling) -> Sample:
    """Returns the run's way to sample, with given values in place of its own.

    With another rule the options of the run's rule are dropped.
    """
    chosen = {k: v for k, v in dataclasses.asdict(given).items() if v is not None}
    values = dataclasses.asdict(sample)
    if chosen.get("sampler", sample.sampler) != sample.sampler:
        values |= dict.fromkeys((*OPTIONS, "grid", "steps", "threshold"))
    return Sample(**(values | chosen))


def resolve(sample: Sample, num_steps: int) -> dict[str, Any]:
    """Returns all options of a chain of T = num_steps, with defaults filled in.

    The variance of ddpm may still be None, which stands for the run's.
    """
    rule = RULES[sample.sampler]
    found: dict[str, Any] = {"sampler": sample.sampler}
    if rule.grid is not None:
        found["steps"] = sample.steps or min(rule.steps or num_steps, num_steps)
        found["grid"] = sample.grid or rule.grid
    for name, default in rule.options.items():
        value = getattr(sample, name)
        found[name] = default if value is None else value
    # An adaptive solver would take tiny steps at the corners that a clip makes.
    found["clip"] = sample.clip and rule.grid is not None
    given = {name: getattr(sample, name) for name in EXTRAS}
    return found | {name: value for name, value in given.items() if value is not None}


def describe(found: dict[str, Any]) -> str:
    """Returns the options that `resolve` found, in a few words.

    >>> describe(resolve(Sample(sampler="unipc", steps=10), 1000))
    '10 steps of unipc (order 2, uniform grid)'
    """
    rule = found["sampler"]
    names = [*RULES[rule].options, *(name for name in EXTRAS if name in found)]
    said = [f"{name.replace('_', ' ')} {found[name]}" for name in names]
    if "grid" not in found:
        return f"{rule} ({', '.join(said)})"
    said.append(f"{found['grid']} grid")
    return f"{counted(found['steps'], 'step')} of {rule} ({', '.join(said)})"


def problems(sample: Sample) -> Iterator[tuple[str, str]]:
    """Yields what does not fit the rule, as (field, what must hold)."""
    chosen, rule = sample.sampler, RULES[sample.sampler]
    for name in OPTIONS:
        if getattr(sample, name) is not None and name not in rule.options:
            may = [r for r, other in RULES.items() if name in other.options]
            must = f"left out with the sampler {chosen}: it is for {' and '.join(may)}"
            yield f"sample.{name}", must
    for name in ("steps", "grid", "threshold"):
        if getattr(sample, name) is not None and rule.grid is None:
            must = f"left out with the sampler {chosen}, which chooses its own steps"
            yield f"sample.{name}", must
    if sample.order is not None and sample.order not in rule.orders:
        yield "sample.order", f"one of {', '.join(rule.orders)} with {chosen}"
