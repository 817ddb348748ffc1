"""The training step: a pure function from (state, batch) to (state, metrics).

It takes any loss. What is random in a step comes from `fold_in(key, step)`, so a run
that is stopped and continued draws what the uninterrupted one would have drawn.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.training import flat
from diffusion_jax.training.averages import Profile

PyTree = Any
LossFn = Callable[..., Any]
Metrics = dict[str, jax.Array]

CAUSES = ("", "batch", "loss", "gradient", "update")
"""Why a step was skipped, by the "cause" in its metrics; "" where it was not."""


class TrainState(NamedTuple):
    """All that training carries from one step to the next."""

    step: jax.Array
    """Steps made, int32, including skipped ones."""
    params: PyTree
    averages: tuple[PyTree, ...]
    """Moving averages of params, one a profile; the first is the one to sample from."""
    opt_state: PyTree
    memory: PyTree
    """What the loss carries from step to step; () for nothing."""
    key: jax.Array
    """The run's key; never changes."""

    @property
    def ema_params(self) -> PyTree:
        """Returns the first average."""
        return self.averages[0]


StepFn = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def init(
    key: jax.Array,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    averages: int = 1,
    memory: PyTree = (),
) -> TrainState:
    """Returns the state before the first step; every average starts at params.

    All arrays are copies, since a compiled step donates those of its state.

    Args:
      key: the run's key.
      params: the first parameters.
      optimizer: an optax transformation.
      averages: how many, as many as `make_step` has profiles.
      memory: the first memory of the loss.
    """
    params, *copies = (jax.tree.map(jnp.copy, params) for _ in range(1 + averages))
    zero, memory = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, memory)
    opt_state = optimizer.init(params)
    return TrainState(zero, params, tuple(copies), opt_state, memory, jnp.copy(key))


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    averages: Sequence[Profile],
    clip_norm: float | None = 1.0,
    clip_each: bool = False,
    accumulate: int = 1,
    axis_name: str | None = None,
    remember: Callable[[PyTree, PyTree], PyTree] | None = None,
    report: Callable[[PyTree], Metrics] | None = None,
    check_update: bool = True,
) -> StepFn:
    """Returns the training step: gradient, clip, update, averages.

    A step in which the batch, the loss, the gradient's norm or the update is not finite
    changes nothing but the step number. The device decides that, so the host may read
    the metrics later.

    Args:
      loss_fn: from (params, batch, key) to the mean loss of the batch, a scalar. Every
        replica and every micro-batch gets the same key: what differs between examples
        has to come from the batch (a position, say).
      optimizer: an optax transformation.
      averages: the profile of each moving average: its decay as a function of the
        step, such as `averages.exponential(0.9999)`.
      clip_norm: largest global norm of the gradient; None for no clipping.
      clip_each: whether the gradient of every replica and micro-batch is clipped
        before they are averaged, as the official code does on its eight TPU cores,
        rather than the average.
      accumulate: number of micro-batches that a batch is cut into; the gradient is
        their mean. Memory goes down, time goes up a little.
      axis_name: the axis to average over under `pmap` or `shard_map`; None under
        `jit`, where the batch is whole.
      remember: for a loss with a memory: from state.memory and what the loss has seen
        of the whole batch, in its order, to the next memory. The loss is then from
        (params, batch, key, memory) to (mean loss, seen), where seen is a tree of
        arrays with the example as the leading axis.
      report: from what such a loss has seen to further metrics.
      check_update: whether new parameters and moments must be finite too, which takes
        one more pass over gradient, moments and parameters. False is for an optimizer
        whose update cannot overflow.

    Returns:
      A function of (state, batch), where the leading axis of every array in the batch
      is the example. Its metrics are scalars: the mean "loss", the "grad_norm" before
      clipping, "skipped", which is 1 where nothing was changed, the "cause" of that, an
      index of `CAUSES`, and "tensor", the first leaf of params whose gradient is not
      finite, or -1.

    >>> from diffusion_jax.training import averages
    >>> half = averages.exponential(0.5)
    >>> step = make_step(lambda w, x, key: w**2, optax.sgd(0.1), averages=[half])
    >>> state = init(jax.random.key(0), jnp.array(0.25), optax.sgd(0.1))
    >>> state, metrics = step(state, jnp.zeros([4]))
    >>> print(f"{state.params:.2f}", metrics["loss"], metrics["skipped"])
    0.20 0.0625 0
    """
    if accumulate < 1:
        raise ValueError(
            f"accumulate must be at least 1; got {accumulate}. It is the number of "
            "micro-batches that a batch is cut into."
        )

    def gradient(
        params: PyTree, batch: PyTree, key: jax.Array, memory: PyTree
    ) -> tuple[Any, PyTree]:
        if remember is None and report is None:
            seen: PyTree = ()
            loss, grad = jax.value_and_grad(loss_fn)(params, batch, key)
        else:
            found = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, seen), grad = found(params, batch, key, memory)
        return (loss, clip(grad, clip_norm) if clip_each else grad), seen

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        _check_averages(averages, state)
        key = jax.random.fold_in(state.key, state.step)
        wrong = _not_finite(batch)
        (loss, grad), seen = _accumulate(
            gradient, accumulate, state.params, batch, key, state.memory
        )
        if axis_name is not None:
            # Under shard_map this mean is right only with check_vma=False: otherwise
            # the gradient of replicated parameters has been summed already.
            loss, grad = jax.lax.pmean((loss, grad), axis_name)
            seen = jax.lax.all_gather(seen, axis_name, tiled=True)
            if _floating(batch):
                wrong = jax.lax.pmax(wrong.astype(jnp.int32), axis_name) > 0
        norm = optax.tree.norm(grad)  # `clip` has the same: XLA computes one
        # `clip` has made all leaves of a bad gradient NaN.
        tensor = _first_bad(() if clip_each else grad)
        if not clip_each:
            grad = clip(grad, clip_norm)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        means = tuple(
            optax.incremental_update(params, average, 1 - profile(state.step))
            for profile, average in zip(averages, state.averages, strict=True)
        )
        memory = state.memory if remember is None else remember(state.memory, seen)
        new = TrainState(state.step, params, means, opt_state, memory, state.key)
        # The averages lie between their old values and the parameters.
        kept = (memory, params, opt_state) if check_update else memory
        found = (wrong, ~jnp.isfinite(loss), ~jnp.isfinite(norm), _not_finite(kept))
        cause = jnp.select(found, range(1, len(CAUSES)), 0).astype(jnp.int32)
        new = jax.tree.map(lambda a, b: jnp.where(cause == 0, a, b), new, state)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": (cause > 0).astype(jnp.int32),
            "cause": cause,
            "tensor": tensor,
            **(report(seen) if report else {}),
        }
        return new._replace(step=state.step + 1), metrics

    return step


def clip(grad: PyTree, norm: float | None) -> PyTree:
    """Returns the gradient scaled down to a global norm of at most `norm`.

    One whose norm is not finite becomes NaN: scaled to 0, it would be averaged with
    others unnoticed.

    >>> print(clip(jnp.array([3.0, 4.0]), 1.0), clip(jnp.array([1e30, 0.0]), 1.0))
    [0.6 0.8] [nan nan]
    """
    if norm is None:
        return grad
    whole = optax.tree.norm(grad)
    scale = jnp.minimum(1.0, norm / jnp.maximum(whole, norm))
    return optax.tree.scale(jnp.where(jnp.isfinite(whole), scale, jnp.nan), grad)


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
    Kingma and Ba 2015. In `optax.adam` eps weighs less in the early steps.
    """

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

    return optax.GradientTransformation(optax.scale_by_adam().init, update_fn)


def _check_averages(averages: Sequence[Profile], state: TrainState) -> None:
    if len(averages) != len(state.averages):
        raise ValueError(
            f"averages must be as many as those of the state, {len(state.averages)}; "
            f"got {len(averages)}. Give their number to init too."
        )


def _accumulate(
    gradient: Callable[..., Any],
    parts: int,
    params: PyTree,
    batch: PyTree,
    key: jax.Array,
    memory: PyTree,
) -> Any:
    if parts == 1:
        return gradient(params, batch, key, memory)

    # Every parts-th example goes into the same micro-batch, so that a batch that is
    # sharded over devices stays so.
    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def whole(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def add(total: PyTree, micro: PyTree) -> tuple[PyTree, PyTree]:
        one, seen = gradient(params, micro, key, memory)
        return optax.tree.add(total, one), seen

    micros = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda x: x[0], micros)
    like, _ = jax.eval_shape(gradient, params, first, key, memory)
    total, seen = jax.lax.scan(add, optax.tree.zeros_like(like), micros)
    return optax.tree.scale(1 / parts, total), jax.tree.map(whole, seen)


def _floating(tree: PyTree) -> list[jax.Array]:
    """Returns the leaves of a type that has NaN and infinity."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _not_finite(tree: PyTree) -> jax.Array:
    """Returns whether any number of a tree is NaN or infinite."""
    bad = [~jnp.isfinite(x).all() for x in _floating(tree)]
    return jnp.stack(bad).any() if bad else jnp.zeros((), bool)


def _first_bad(grad: PyTree) -> jax.Array:
    """Returns the index of the first leaf that is not finite, int32; -1 without any."""
    if isinstance(grad, flat.Flat):
        vector, sizes = grad.vector, [math.prod(shape) for shape in grad.shapes]
        at = jnp.where(jnp.isfinite(vector), len(vector), jnp.arange(len(vector)))
        first = at.min()  # beside the norm, from the same pass
        leaf = (first >= np.cumsum(sizes)).sum()
        return jnp.where(first < len(vector), leaf, -1).astype(jnp.int32)
    leaves = jax.tree.leaves(grad)
    if not leaves:
        return jnp.full((), -1, jnp.int32)
    bad = jnp.stack([~jnp.isfinite(x).all() for x in leaves])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)
