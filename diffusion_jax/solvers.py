"""Fast solvers of the probability flow, as rules for `samplers.sample`.

In x / alpha, with sigma / alpha as its time, the flow is d(x / alpha) = eps d(sigma /
alpha): `heun` and `edm` step in it (Karras et al. 2022). In half the log-SNR, lambda,
its linear part is solved exactly, and only x0 has to be extrapolated over the step
h = lambda_s - lambda_t (Lu et al. 2022):

  x_s = sigma_s / sigma_t x_t
        + alpha_s h sum_k phi_k(h) h^(k-1) d^(k-1) x0 / d lambda^(k-1)

over k from 1 on. With the first term alone both are `ddim`. All rules take the step to
sigma = 0, where h is infinite, by that term; and `heun` and `edm` the step from pure
noise, where sigma / alpha is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import errors, gaussian
from diffusion_jax.continuous import time_of
from diffusion_jax.samplers import Sampler, Step, check_grid, forgetful
from diffusion_jax.schedule import (
    PURE_NOISE,
    NoiseLevel,
    Schedule,
    is_discrete,
    real_data,
)

DPM_SOLVERS = ("1", "2S", "2M", "3M", "SDE")

# The step before the first one, in lambda: outputs that were never made are so far
# away that their differences weigh nothing, and the order rises with those there are.
FAR = 1e9


def heun(denoise: gaussian.Denoiser, schedule: Schedule) -> Sampler:
    """Returns the second-order solver of Algorithm 1, Karras et al. 2022.

    An Euler step in sigma / alpha (that is `ddim`), then once more with the mean of the
    slopes at both ends: two evaluations a step, one in the step to sigma = 0. It walks
    a rising grid too.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.

    >>> from diffusion_jax import grids, samplers, schedule
    >>> lin = schedule.linear()
    >>> rule = heun(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = samplers.sample(jax.random.key(0), rule, grids.karras(lin, 3), (1, 2))
    >>> bool((images == 0).all())
    True
    """

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        x_s, x0 = _trapezoid(denoise, schedule, x_t, t, s)
        return Step(x_s, memory, x0)

    return Sampler(forgetful(schedule, rising=True), step)


def edm(
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, np.inf),
    noise: float = 1.0,
) -> Sampler:
    """Returns the stochastic sampler of Algorithm 2, Karras et al. 2022.

    Before each step of `heun` noise is added, up to (1 + gamma) times sigma / alpha,
    gamma = min(churn / steps, sqrt(2) - 1). The network is asked at the time that has
    this level: of a discrete schedule the nearest whole one, and none beyond its end;
    of `ve`, `vp` and `sub_vp`, whose formulas go on, one beyond t = 1 as in the paper.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      churn: S_churn, amount of noise over the whole chain; 0 is `heun`.
      churn_range: S_tmin and S_tmax, the sigma / alpha between which noise is added.
      noise: S_noise, standard deviation of what is added; a little above 1 makes up
        for detail that the network takes away.

    Raises:
      ValueError: churn or noise is negative, or the range does not rise.
    """
    low, high = churn_range
    if not (churn >= 0 and noise >= 0 and 0 <= low <= high):
        raise ValueError(
            "churn, noise and churn_range must be at least 0, and the range rise; got "
            f"{churn}, {noise} and {churn_range}. The paper uses churn from 0 to 80."
        )

    def init(x: jax.Array, grid: np.ndarray) -> jax.Array:
        check_grid(schedule, grid)
        # Steps that `padded` leaves out are none.
        share = churn / (grid[1:] != grid[:-1]).sum()
        # As NumPy where the grid is known: XLA's GPU compiler (jax 0.11.2) fails on a
        # minimum of constants that a loop carries.
        return jnp.asarray(share.clip(None, np.sqrt(2) - 1), jnp.result_type(float))

    def step(
        keys: jax.Array, x_t: jax.Array, gamma: jax.Array, t: jax.Array, s: jax.Array
    ) -> Step:
        x_t, level = real_data(x_t), schedule(t)
        ratio = jnp.exp(-0.5 * level.logsnr)
        raised = time_of(schedule, level.logsnr - 2 * jnp.log1p(gamma), beyond=True)
        inside = (low <= ratio) & (ratio <= high)
        # Rounding to whole steps, or to the last one, never takes noise away.
        up = jnp.where(inside, jnp.maximum(raised, t).astype(t.dtype), t)
        x_up = gaussian.q_step(keys, x_t, level, schedule(up), noise=noise)
        x_s, x0 = _trapezoid(denoise, schedule, x_up, up, s)
        return Step(x_s, gamma, x0)

    # Compiled, for times beyond the end to be traced: what is known is refused.
    return Sampler(init, jax.jit(step)) if churn > 0 else heun(denoise, schedule)


def dpm_solver_pp(
    denoise: gaussian.Denoiser, schedule: Schedule, *, order: str = "2M"
) -> Sampler:
    """Returns DPM-Solver++ (Lu et al. 2022, "DPM-Solver++").

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      order: "1" is `ddim`; "2S" (Algorithm 1) takes a second evaluation half way, in
        lambda, to s, of a discrete schedule at the nearest whole time in between; "2M"
        (Algorithm 2) and "3M" extrapolate from the outputs of the steps before, one
        evaluation a step; "SDE" is 2M for the reverse SDE, whose first order is `ddpm`
        with the small variance.

    Raises:
      ValueError: an unknown order.

    >>> from diffusion_jax import grids, samplers, schedule
    >>> lin = schedule.linear()
    >>> rule = dpm_solver_pp(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = samplers.sample(jax.random.key(0), rule, grids.logsnr(lin, 5), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if order not in DPM_SOLVERS:
        errors.raise_unknown("order", order, DPM_SOLVERS)
    if order == "2S":
        return _single_step(denoise, schedule)
    kept = {"1": 0, "2M": 1, "3M": 2, "SDE": 1}[order]

    def init(x: jax.Array, grid: np.ndarray) -> _Past:
        check_grid(schedule, grid)
        far = (jnp.asarray(FAR, jnp.result_type(float)),) * kept
        left = _steps_to_data(schedule, grid)
        return _Past((jnp.zeros_like(x),) * kept, far, left)

    def step(
        keys: jax.Array, x_t: jax.Array, past: _Past, t: jax.Array, s: jax.Array
    ) -> Step:
        x0 = denoise(x_t, t).x0
        level, prev = schedule(t), schedule(s)
        h, ended = _jump(level, prev)
        first, second = _differences(x0, past, h)
        x_s = prev.sigma / level.sigma * x_t + prev.alpha * h * phi(1, h) * x0
        if order == "2M":
            x_s = x_s + prev.alpha * h * phi(1, h) * 0.5 * first
        elif order == "3M":
            x_s = x_s + prev.alpha * h * (phi(2, h) * first + phi(3, h) * second)
        elif order == "SDE":
            # The linear part decays twice as fast, and noise takes its place.
            share, noise = -jnp.expm1(-2 * h), gaussian.normal(keys, x_t.shape)
            kept_x = prev.sigma / level.sigma * jnp.exp(-h) * x_t
            x_s = kept_x + prev.alpha * share * (x0 + 0.5 * first)
            x_s = x_s + prev.sigma * jnp.sqrt(share) * noise
        outputs, gaps = (x0, *past.outputs)[:kept], (h, *past.gaps)[:kept]
        past = _Past(outputs, gaps, past.left - 1)
        return Step(jnp.where(ended, prev.alpha * x0, x_s), past, x0)

    return Sampler(init, step)


def unipc(denoise: gaussian.Denoiser, schedule: Schedule, *, order: int = 2) -> Sampler:
    """Returns UniPC for x0 predictions (Zhao et al. 2023), with B(h) = e^h - 1.

    Each output serves twice: it corrects the step that led to it, and predicts the
    next one. One evaluation a step, whatever the order.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      order: of the predictor, 1 to 3; the corrector raises it by one.

    Raises:
      ValueError: order is not 1, 2 or 3.

    >>> from diffusion_jax import grids, samplers, schedule
    >>> lin = schedule.linear()
    >>> rule = unipc(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = samplers.sample(jax.random.key(0), rule, grids.logsnr(lin, 5), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if order not in (1, 2, 3):
        raise ValueError(
            f"order must be 1, 2 or 3; got {order!r}. The paper's choice is 2, or 3 "
            "from ten steps on."
        )

    def init(x: jax.Array, grid: np.ndarray) -> _History:
        check_grid(schedule, grid)
        real = jnp.result_type(float)
        halves = tuple(jnp.asarray(-FAR * (i + 1), real) for i in range(order))
        outputs = (jnp.zeros_like(x),) * order
        level = schedule(grid[0])
        left = _steps_to_data(schedule, grid)
        return _History(x, level, outputs, halves, jnp.asarray(0), left)

    def step(
        keys: jax.Array, x_t: jax.Array, past: _History, t: jax.Array, s: jax.Array
    ) -> Step:
        x0 = denoise(x_t, t).x0
        level, prev = schedule(t), schedule(s)
        used = _order(past.made, past.left + 1, order)
        corrected = _unified(past, level, used, new=x0)
        now = _History(
            jnp.where(past.made > 0, corrected, x_t),
            level,
            (x0, *past.outputs)[:order],
            (0.5 * level.logsnr, *past.halves)[:order],
            past.made + 1,
            past.left - 1,
        )
        x_s = _unified(now, prev, _order(now.made, past.left, order), new=None)
        x_s = jnp.where(prev.sigma > 0, x_s, prev.alpha * x0)
        return Step(x_s, now, x0)

    return Sampler(init, step)


def phi(k: int, h: jax.Array) -> jax.Array:
    """Returns sum_n (-h)^n / (n + k)!, the phi-function of exponential integrators.

    phi_1 = (1 - e^-h) / h and phi_{k+1} = (1/k! - phi_k) / h, which loses all digits at
    small h: there the sum itself is taken.

    >>> print(phi(1, jnp.float32(1e-6)), phi(2, jnp.float32(2.0)).round(4))
    0.9999995 0.2838
    """
    small = jnp.abs(h) < 1
    z = jnp.where(small, 1.0, h)
    exact = -jnp.expm1(-z) / z
    for j in range(1, k):
        exact = (1 / math.factorial(j) - exact) / z
    z, series = jnp.where(small, h, 0.0), jnp.zeros_like(h)
    for n in reversed(range(16)):
        series = 1 / math.factorial(n + k) - z * series
    return jnp.where(small, series, exact)


class _Past(NamedTuple):
    """The last outputs, newest first, and the steps that followed them, in lambda."""

    outputs: tuple[jax.Array, ...]
    gaps: tuple[jax.Array, ...]
    left: jax.Array
    """Steps left to data, this one counted."""


class _History(NamedTuple):
    """What UniPC remembers: where the last step began, and the outputs until there."""

    x: jax.Array
    level: NoiseLevel
    outputs: tuple[jax.Array, ...]
    """Of x0, newest first; the newest is that at `x`."""
    halves: tuple[jax.Array, ...]
    """Their lambda, half the log-SNR."""
    made: jax.Array
    """How many outputs there are."""
    left: jax.Array
    """Steps left to data, this one counted."""


def _steps_to_data(schedule: Schedule, grid: np.ndarray) -> jax.Array:
    """Returns how many steps lead to sigma = 0: endless if the grid ends above it."""
    steps = (grid[1:] != grid[:-1]).sum()
    ends = jnp.isinf(schedule(grid[-1]).logsnr)
    return jnp.where(ends, steps, np.iinfo(np.int32).max).astype(jnp.int32)


def _jump(level: NoiseLevel, prev: NoiseLevel) -> tuple[jax.Array, jax.Array]:
    """Returns the step in lambda, and whether it is infinite (then 1 in its place)."""
    ended = jnp.isinf(prev.logsnr)
    h = 0.5 * (prev.logsnr - level.logsnr)
    return jnp.where(ended, 1.0, h), ended


def _trapezoid(
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One step of Heun's method in sigma / alpha: x_s, and x0 seen from x_t."""
    pred = denoise(x_t, t)
    level, prev = schedule(t), schedule(s)
    euler = prev.alpha * pred.x0 + prev.sigma * pred.eps
    width = prev.sigma - prev.alpha * jnp.exp(-0.5 * level.logsnr)

    def correct(x_s: jax.Array) -> jax.Array:
        return x_s + 0.5 * width * (denoise(x_s, s).eps - pred.eps)

    # From pure noise, too, sigma / alpha takes an endless step: by the first term.
    finite = (prev.sigma > 0) & (level.logsnr >= PURE_NOISE)
    x_s = jax.lax.cond(finite, correct, lambda x_s: x_s, euler)
    return x_s, pred.x0


def _single_step(denoise: gaussian.Denoiser, schedule: Schedule) -> Sampler:
    """DPM-Solver++(2S), Algorithm 1."""

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        x0 = denoise(x_t, t).x0
        level, prev = schedule(t), schedule(s)
        h, _ = _jump(level, prev)

        def second(x_t: jax.Array) -> jax.Array:
            u = time_of(schedule, 0.5 * (level.logsnr + prev.logsnr))
            if is_discrete(schedule):
                # Between t and s; where they are neighbours, s itself.
                u = jnp.clip(u, s, t - 1).astype(t.dtype)
            between = schedule(u)
            part = 0.5 * (between.logsnr - level.logsnr)
            x_u = between.sigma / level.sigma * x_t
            x_u = x_u + between.alpha * part * phi(1, part) * x0
            mean = x0 + 0.5 * h / part * (denoise(x_u, u).x0 - x0)
            return prev.sigma / level.sigma * x_t + prev.alpha * h * phi(1, h) * mean

        x_s = jax.lax.cond(prev.sigma > 0, second, lambda _: prev.alpha * x0, x_t)
        return Step(x_s, memory, x0)

    return Sampler(forgetful(schedule), step)


def _differences(
    x0: jax.Array, past: _Past, h: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and second derivative of x0 in lambda, times h and h^2 (0 if unknown).

    The released code of DPM-Solver++ and those that follow it lack the factor 2, and
    are of second order with it left out.
    """
    none = jnp.zeros_like(x0)
    if not past.outputs:
        return none, none
    ratio = past.gaps[0] / h
    first = (x0 - past.outputs[0]) / ratio
    if len(past.outputs) == 1:
        return first, none
    older = (past.outputs[0] - past.outputs[1]) * (h / past.gaps[1])
    # No third order in the last step but one: see `_order`.
    bend = jnp.where(past.left > 2, first - older, 0)
    both = past.gaps[0] + past.gaps[1]
    return first + past.gaps[0] / both * bend, 2 * h / both * bend


def _order(made: jax.Array, left: jax.Array, most: int) -> jax.Array:
    """The order of a step: no more than there are outputs, or steps left to data.

    The last steps to sigma = 0 are long in lambda: a parabola through what was before
    leads far astray there.
    """
    return jnp.minimum(jnp.minimum(made, left), most)


def _unified(
    past: _History, level: NoiseLevel, order: jax.Array, *, new: jax.Array | None
) -> jax.Array:
    """X at `level`, by the past alone (UniP), or with the output there (UniC)."""
    h, _ = _jump(past.level, level)
    newest, *older = past.outputs
    nodes = [(half - past.halves[0]) / h for half in past.halves[1:]]
    slopes = [(out - newest) / node for out, node in zip(older, nodes, strict=True)]
    if new is not None:
        nodes, slopes = [*nodes, jnp.ones_like(h)], [*slopes, new - newest]
    most = len(past.outputs)
    moments = [
        math.factorial(k) * phi(k + 1, h) / phi(1, h) for k in range(1, most + 1)
    ]
    rows = []
    for p in range(1, most + 1):
        # Of p outputs the newest is the expansion's centre; `new` is last, at node 1.
        chosen = [*range(p - 1)] + ([most - 1] if new is not None else [])
        weights = _weights([nodes[i] for i in chosen], moments)
        # With one unknown the paper takes its limit for small h.
        weights = [jnp.full_like(h, 0.5)] if len(chosen) == 1 else weights
        row = [jnp.zeros_like(h)] * len(nodes)
        for i, weight in zip(chosen, weights, strict=True):
            row[i] = weight
        rows.append(row)
    mean = newest
    for i, slope in enumerate(slopes):
        column = jnp.stack([row[i] for row in rows])
        mean = mean + column[jnp.maximum(order, 1) - 1] * slope
    kept = level.sigma / past.level.sigma * past.x
    return kept + level.alpha * h * phi(1, h) * mean


def _weights(nodes: list[jax.Array], moments: list[jax.Array]) -> list[jax.Array]:
    """The w with sum_i w_i nodes_i^k = moments_k for k = 0, 1, ...: by Lagrange."""
    weights = []
    for i, node in enumerate(nodes):
        others = nodes[:i] + nodes[i + 1 :]
        # Coefficients of prod (z - other), lowest first.
        product, scale = [jnp.ones_like(node)], jnp.ones_like(node)
        for other in others:
            zero = [jnp.zeros_like(node)]
            rise, fall = [*zero, *product], [*product, *zero]
            product = [a - other * b for a, b in zip(rise, fall, strict=True)]
            scale = scale * (node - other)
        total = sum(c * m for c, m in zip(product, moments, strict=False))
        weights.append(total / scale)
    return weights
