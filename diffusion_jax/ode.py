"""The probability flow solved to a tolerance instead of on a grid.

`integrate` solves any field, one step size for each example, inside XLA: under `jit`,
`vmap`, `grad` and `pmap`. (`jax.shard_map` needs check_vma=False, since the solver's
loops begin with constants.) `ode` makes a sampling rule of it. The solver is diffrax's,
installed by `pip install 'diffusion-jax[ode]'`: Tsitouras' method of order 5 with an
embedded one of order 4, the steps chosen from the difference of the two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import continuous, gaussian, samplers, sde
from diffusion_jax.errors import check_positive, needs
from diffusion_jax.schedule import Schedule, is_discrete, real_data, widened

# Stages of a step, the last of which is the first of the next one.
STAGES = 6
MAX_STEPS = 4096


class Solution(NamedTuple):
    """The end of a solve, and what it cost."""

    x: Any
    """The state at t1, like the one given, [B, ...]; nan where max_steps was hit."""
    evaluations: jax.Array
    """How often each example needed the field, [B]. A batch costs what the slowest of
    its examples needs."""


def integrate(
    field: Callable[..., Any],
    x: Any,
    t0: ArrayLike,
    t1: ArrayLike,
    *args: Any,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """Returns the solution at t1 of dx/dt = field(x, t, *args), x(t0) = x.

    The step is chosen for each example by itself: the root mean square over its state
    of error / (atol + rtol |x|) stays below one. So an example does not depend on the
    batch around it.

    Args:
      field: a function of the state and t, [B], and of args. It is called with one
        example at a time, as a batch of one under `vmap`: what differs between
        examples, such as labels, must come through args.
      x: the state, a pytree of [B, ...].
      t0: time at which x is given, a scalar.
      t1: time wanted, a scalar, after t0 or before it.
      args: pytrees of [B, ...], passed on to field.
      rtol: tolerance relative to the state, per step.
      atol: absolute tolerance, per step.
      max_steps: the most steps that an example may take, refused ones counted.

    Raises:
      MissingError: diffrax is not installed.
      ValueError: a tolerance or max_steps that is not positive; or an example hit
        max_steps and this is known. Under a trace its state is nan.

    >>> end, evaluations = integrate(lambda x, t: -x, jnp.ones([1, 2]), 0.0, 1.0)
    >>> print(f"{end[0, 0]:.4f}", evaluations)
    0.3679 [31]
    """
    _check(rtol, atol, max_steps)
    needs("diffrax", "solve the probability flow", "ode")
    import diffrax

    x = jax.tree.map(real_data, x)
    t0, t1 = (jnp.asarray(t, jnp.result_type(float)) for t in (t0, t1))

    def slope(t: Any, state: Any, given: tuple[Any, ...]) -> Any:
        wide, extra = jax.tree.map(lambda leaf: leaf[None], (state, given))
        rate = field(wide, t[None], *extra)
        return jax.tree.map(lambda d, leaf: d[0].astype(leaf.dtype), rate, state)

    def one(state: Any, given: tuple[Any, ...]) -> tuple[Any, jax.Array, jax.Array]:
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Tsit5(),
            t0,
            t1,
            # A hundredth of the way, whatever the unit of time: steps grow tenfold.
            jnp.where(t1 == t0, 1, 0.01 * (t1 - t0)),
            state,
            given,
            stepsize_controller=diffrax.PIDController(rtol, atol),
            max_steps=max_steps,
            throw=False,
        )
        failed = solved.result != diffrax.RESULTS.successful
        return (
            jax.tree.map(lambda y: y[0], solved.ys),
            solved.stats["num_steps"],
            failed,
        )

    try:
        end, steps, failed = jax.vmap(one)(x, args)
    except TypeError as error:
        # What JAX says of the solver's loops is of no use to whoever wrote none.
        if "shard_map" not in str(error):
            raise
        raise ValueError(
            "shard_map around a solve must not check what varies over devices; got "
            "one that does. Pass it check_vma=False, or use jit over a mesh."
        ) from error
    if not isinstance(failed, jax.core.Tracer) and np.any(failed):
        raise ValueError(
            f"max_steps must be enough to reach t1; got {max_steps}, which was not for "
            f"{np.sum(failed)} of {len(failed)} examples. Raise it, or the tolerances."
        )
    end = jax.tree.map(lambda y: jnp.where(widened(failed, y), jnp.nan, y), end)
    return Solution(end, jnp.where(steps > 0, 1 + STAGES * steps, 0))


def follow(
    field: Callable[..., Any],
    schedule: Schedule,
    x: Any,
    t: ArrayLike,
    s: ArrayLike,
    *args: Any,
    **options: Any,
) -> Solution:
    """Returns the solution at time s of a field given in the time of a schedule.

    As `integrate`, but solved in log-SNR, in which a flow is as smooth as its network:
    dx/dlogsnr = field / (d logsnr / dt). In its own time the flow of an interpolated
    schedule jumps with every beta, which costs a solver thousands of steps.

    Args:
      field: a function of the state, t [B] and args, such as `sde.flow` makes.
      schedule: a continuous schedule.
      x: the state at t, a pytree of [B, ...].
      t, s: times at which sigma is above 0, scalars.
      args, options, Raises: as in `integrate`; options are rtol, atol and max_steps.

    >>> ve = continuous.ve()
    >>> field = sde.flow(gaussian.denoiser(lambda x, t: x, ve, "eps"), ve)
    >>> end, _ = follow(field, ve, jnp.ones([1, 1]), 0.5, 0.0)
    >>> print(f"{end[0, 0]:.3f}")  # dx/dsigma = x, and sigma falls by 0.697
    0.498
    """

    def rate(state: Any, logsnr: jax.Array, *given: Any) -> Any:
        now = continuous.time_of(schedule, logsnr)
        _, slope = jax.jvp(schedule, (now,), (jnp.ones_like(now),))
        speed = field(state, now, *given)
        return jax.tree.map(lambda d: d / widened(slope.logsnr, d), speed)

    ends = schedule(t).logsnr, schedule(s).logsnr
    return integrate(rate, x, *ends, *args, **options)


def ode(
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = MAX_STEPS,
) -> samplers.Sampler:
    """Returns the rule that follows the probability flow (Eq. 13, Song et al. 2021).

    Each step of the grid solves the flow from t to s to the tolerances, so that a grid
    of few times is enough, and walks a rising grid too, from data to noise. A step that
    begins or ends where sigma is 0, and the flow is singular, is DDIM's: to data it
    takes the x0 that the network sees.

    Args:
      denoise: the network's prediction as a function of (x_t, t). With a discrete
        schedule it is called at real times between the whole ones too, so make it
        with `gaussian.denoiser(..., continuous.interpolate(schedule), ...)`; and
        without a clip, which the solver would find rough.
      schedule: its noise schedule; a discrete one is interpolated.
      rtol, atol, max_steps: as in `integrate`. An example that hits max_steps is nan.

    Raises:
      ValueError: a tolerance or max_steps that is not positive.

    >>> from diffusion_jax import grids
    >>> vp = continuous.vp()
    >>> rule = ode(gaussian.denoiser(lambda x, t: 0 * x, vp, "x0"), vp)
    >>> grid = np.array([1.0, 1e-3, 0.0])
    >>> images = samplers.sample(jax.random.key(0), rule, grid, (1, 2))
    >>> bool((images == 0).all())
    True
    """
    _check(rtol, atol, max_steps)
    real = continuous.interpolate(schedule) if is_discrete(schedule) else schedule
    solve = partial(
        follow, sde.flow(denoise, real), real, rtol=rtol, atol=atol, max_steps=max_steps
    )

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> samplers.Step:
        t, s = (jnp.asarray(time, jnp.result_type(float)) for time in (t, s))
        x_t, level, prev = real_data(x_t), real(t).like(x_t), real(s).like(x_t)

        def jump(x: jax.Array) -> jax.Array:
            # Here, and not above, where it would be computed beside every solve.
            pred = denoise(x, t)
            return prev.alpha * pred.x0 + prev.sigma * pred.eps

        singular = (level.sigma == 0) | (prev.sigma == 0)
        x_s = jax.lax.cond(singular, jump, lambda x: solve(x, t, s).x, x_t)
        return samplers.Step(x_s, memory, denoise(x_t, t).x0)

    return samplers.Sampler(samplers.forgetful(schedule, rising=True), step)


def _check(rtol: float, atol: float, max_steps: int) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_positive(name, value, "The usual tolerance is 1e-5.")
    check_positive("max_steps", max_steps, f"The usual number is {MAX_STEPS}.")
