"""The training step: a pure function from (state, batch) to (state, metrics).

It takes any loss. What is random in a step comes from `fold_in(key, step)`, so a run
that is stopped and continued draws what the uninterrupted one would have drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
LossFn = Callable[[PyTree, PyTree, jax.Array], jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training carries from one step to the next."""

    step: jax.Array
    """Number of updates made, int32."""
    params: PyTree
    ema_params: PyTree
    """Exponential moving average of params: the ones to sample from."""
    opt_state: PyTree
    key: jax.Array
    """The run's key; never changes."""


StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def init(
    key: jax.Array, params: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step; the average starts at params.

    Everything is a copy: a compiled step uses its state up, and params stay the
    caller's.
    """
    params, average = (jax.tree.map(jnp.copy, params) for _ in range(2))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, average, optimizer.init(params), jnp.copy(key))


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    ema_ramp: bool = False,
    clip_norm: float | None = 1.0,
    clip_each: bool = False,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> StepFn:
    """Returns the training step: gradient, clip, update, average.

    Args:
      loss_fn: from (params, batch, key) to the mean loss of the batch, a scalar. Every
        replica and every micro-batch gets the same key: what differs between examples
        has to come from the batch (a position, say).
      optimizer: an optax transformation.
      ema_decay: decay of the moving average a step.
      ema_ramp: whether the decay rises from 0.1 as (1 + step) / (10 + step) until it
        reaches ema_decay. Without, the average starts as a copy of the parameters
        after the first update, as in the official code.
      clip_norm: largest global norm of the gradient; None for no clipping.
      clip_each: whether the gradient of every replica and micro-batch is clipped
        before they are averaged, as the official code does on its eight TPU cores,
        rather than the average.
      accumulate: number of micro-batches that a batch is cut into; the gradient is
        their mean. Memory goes down, time goes up a little.
      axis_name: the axis to average over under `pmap` or `shard_map`; None under
        `jit`, where the batch is whole.

    Returns:
      A function of (state, batch), where the leading axis of every array in the batch
      is the example. Its metrics are the mean "loss" and the "grad_norm" before
      clipping, both scalars.

    >>> step = make_step(lambda w, x, key: w**2, optax.sgd(0.1), ema_decay=0.5)
    >>> state = init(jax.random.key(0), jnp.array(0.25), optax.sgd(0.1))
    >>> state, metrics = step(state, jnp.zeros([4]))
    >>> print(f"{state.params:.2f}", metrics["loss"])
    0.20 0.0625
    """
    if accumulate < 1:
        raise ValueError(
            f"accumulate must be at least 1; got {accumulate}. It is the number of "
            "micro-batches that a batch is cut into."
        )

    def gradient(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(loss_fn)(params, batch, key)
        return loss, clip(grad, clip_norm) if clip_each else grad

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grad = _accumulate(gradient, accumulate, state.params, batch, key)
        if axis_name is not None:
            # Under shard_map this mean is right only with check_vma=False: otherwise
            # the gradient of replicated parameters has been summed already.
            loss, grad = jax.lax.pmean((loss, grad), axis_name)
        norm = optax.tree.norm(grad)
        if not clip_each:
            grad = clip(grad, clip_norm)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - _decay(state.step, ema_decay, ema_ramp)
        ema_params = optax.incremental_update(params, state.ema_params, rate)
        new = TrainState(state.step + 1, params, ema_params, opt_state, state.key)
        return new, {"loss": loss, "grad_norm": norm}

    return step


def clip(grad: PyTree, norm: float | None) -> PyTree:
    """Returns the gradient scaled down to a global norm of at most `norm`.

    >>> print(clip(jnp.array([3.0, 4.0]), 1.0))
    [0.6 0.8]
    """
    if norm is None:
        return grad
    scale = jnp.minimum(1.0, norm / jnp.maximum(optax.tree.norm(grad), norm))
    return optax.tree.scale(scale, grad)


def learning_rate(
    peak: float, *, warmup: int = 0, decay_steps: int | None = None
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      peak: the rate after the warm-up.
      warmup: steps over which it rises in a straight line; the first update has rate
        0, as in the official code.
      decay_steps: length of the run, over which the rate falls to 0 along a cosine;
        constant when not given.

    >>> rate = learning_rate(2e-4, warmup=5000)
    >>> print(f"{rate(0):g} {rate(2500):g} {rate(9000):g}")
    0 0.0001 0.0002
    """
    if decay_steps is not None:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps)
    if warmup == 0:
        return optax.constant_schedule(peak)
    return optax.linear_schedule(0.0, peak, warmup)


def tf_adam(
    rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float
) -> optax.GradientTransformation:
    """Returns Adam as TensorFlow 1 has it, with "epsilon hat".

    rate sqrt(1 - b2^n) / (1 - b1^n) m / (sqrt(v) + eps): the last form of Sec. 2,
    Kingma and Ba 2015. Against `optax.adam`, eps weighs more in the early steps.
    """

    def init_fn(params: PyTree) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update_fn(
        grad: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grad, state.mu, b1, 1)
        nu = optax.tree.update_moment(grad, state.nu, b2, 2)
        lr = rate(state.count) if callable(rate) else rate
        count = state.count + 1
        scale = -lr * jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _decay(step: jax.Array, decay: float, ramp: bool) -> jax.Array:
    if ramp:
        return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jnp.where(step < 1, 0.0, decay)


def _accumulate(
    gradient: LossFn, parts: int, params: PyTree, batch: PyTree, key: jax.Array
) -> Any:
    if parts == 1:
        return gradient(params, batch, key)

    # Every parts-th example goes into the same micro-batch, so that a batch that is
    # sharded over devices stays so.
    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: PyTree, micro: PyTree) -> tuple[PyTree, None]:
        return optax.tree.add(total, gradient(params, micro, key)), None

    micros = jax.tree.map(cut, batch)
    like = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micros), key)
    total, _ = jax.lax.scan(add, optax.tree.zeros_like(like), micros)
    return optax.tree.scale(1 / parts, total)
