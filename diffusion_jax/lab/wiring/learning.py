"""From a configuration to learning: optimiser, averages, state, loss and step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import gaussian, learned, losses, schedule, timesteps, weightings
from diffusion_jax.lab.schema.config import Config, micro_batches, replace, warmup
from diffusion_jax.lab.wiring.build import (
    init_params,
    is_continuous,
    make_apply,
    make_denoiser,
    make_schedule,
    param_shapes,
)
from diffusion_jax.training import averages, compilation, feed, flat, parallel, state

# Least time in continuous time, as in Song et al. 2021: at 0 vp has no noise.
FIRST_TIME = 1e-5
EPSILON = 1e-8
"""Of Adam."""


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns Adam in the form that the preset names."""
    o = config.optimizer
    if o.preset == "official":
        return state.tf_adam(rate(config), b2=o.b2, eps=EPSILON)
    return optax.adam(rate(config), b2=o.b2, eps=EPSILON)


def rate(config: Config) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    o, rises = config.optimizer, warmup(config)
    steps = config.train.steps if o.decay == "cosine" else None
    return state.learning_rate(o.learning_rate, warmup=rises, decay_steps=steps)


def may_overflow(config: Config) -> bool:
    """Returns whether an update of Adam from a finite gradient may not be finite.

    Its first moment is at most the norm that gradients are clipped to, and is divided
    by epsilon at least: with a sane rate nothing gets near what float32 can hold, and
    to look for it would be a pass over parameters and moments for nothing.
    """
    o = config.optimizer
    farthest = o.learning_rate * o.clip_norm / EPSILON * config.train.steps
    return farthest > float(jnp.finfo(jnp.float32).max) / 1e6


def init_state(
    config: Config,
    params: Any = None,
    key: jax.Array | None = None,
    *,
    packed: bool = False,
) -> state.TrainState:
    """Returns the training state before the first step.

    Args:
      config: the configuration.
      params: those to start from, `initial.params`, a tree or a vector; from the seed
        when None.
      key: of the seed, made here when None. A program that is given it fits all seeds.
      packed: whether to return what `as_trained` makes of it.
    """
    key = jax.random.key(config.train.seed) if key is None else key
    key_params, key_run = jax.random.split(key)
    if params is None:
        params = init_params(config, key_params)
    params = flat.pack(params, config.train.fsdp) if packed else params
    memory: Any = ()
    if config.diffusion.density == "importance":
        memory = timesteps.history(config.diffusion.num_steps)
    return state.init(
        key_run,
        params,
        make_optimizer(config),
        averages=len(make_averages(config)),
        memory=memory,
    )


@functools.cache
def state_shapes(config: Config, *, packed: bool = False) -> state.TrainState:
    """Returns `jax.ShapeDtypeStruct` in place of the arrays of `init_state`."""
    make = functools.partial(init_state, config, packed=packed)
    return jax.eval_shape(make, param_shapes(config))


def as_trained(config: Config, whole: state.TrainState, mesh: jax.sharding.Mesh) -> Any:
    """Returns a state as it is trained, from any, on the devices of a mesh.

    Parameters, moments and averages are a vector each: a few large operations a step in
    place of a thousand small ones.
    """
    if isinstance(whole.params, flat.Flat):
        return whole
    return flat.pack_all(whole, whole.params, _packing(mesh, config.train.fsdp))


def as_stored(trained: Any, mesh: jax.sharding.Mesh) -> state.TrainState:
    """Returns a state that is all trees, as checkpoints have it."""
    return flat.unpack_all(trained, _unpacking(mesh))


# A program for each tree: of a whole state it would be one four times as large.


@functools.cache
def _packing(mesh: jax.sharding.Mesh, multiple: int) -> Callable[[Any], flat.Flat]:
    def pack(tree: Any) -> Any:
        return _placed(flat.pack(tree, multiple), mesh)

    return jax.jit(pack)


@functools.cache
def _unpacking(mesh: jax.sharding.Mesh) -> Callable[[flat.Flat], Any]:
    return jax.jit(lambda vector: _placed(flat.unpack(vector), mesh))


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    placed = parallel.state_sharding(tree, mesh)
    return jax.lax.with_sharding_constraint(tree, placed)


def make_averages(config: Config) -> tuple[averages.Profile, ...]:
    """Returns the profiles of the moving averages; the first is the one to use."""
    o = config.optimizer
    ramp = o.preset != "official"
    return (
        *(averages.exponential(decay, ramp=ramp) for decay in o.ema_decay),
        *(averages.power(length) for length in o.ema_lengths),
    )


def make_weighting(config: Config) -> weightings.Weighting:
    """Returns the weight of the squared error of eps, as a function of log-SNR."""
    d, value = config.diffusion, config.diffusion.weighting_value
    gamma = {} if value is None else {"gamma": value}
    match d.weighting:
        case "simple":
            return weightings.simple()
        case "min_snr":
            return weightings.min_snr(**gamma)
        case "p2":
            return weightings.p2(**gamma)
        case "sigmoid":
            return weightings.sigmoid(**({} if value is None else {"bias": value}))
        case "edm":
            return weightings.edm(sigma_data=d.sigma_data)


def draw_times(
    config: Config,
    key: jax.Array,
    position: jax.Array,
    levels: schedule.Schedule,
    memory: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns a time and the weight of its loss for each position in the batch, [B]."""
    d, size = config.diffusion, config.train.batch_size
    match d.spread:
        case "uniform":
            u = timesteps.uniform(key, position)
        case "low_discrepancy":
            u = timesteps.low_discrepancy(key, position, size)
        case "antithetic":
            u = timesteps.antithetic(key, position, size)
    one = jnp.ones_like(u)
    match d.density:
        case "importance":
            return timesteps.importance(u, timesteps.probabilities(memory))
        case "log_normal":
            return timesteps.log_normal(u, levels), one
        case "logit_normal":
            return timesteps.logit_normal(u), one
    if is_continuous(config):
        return timesteps.times(u, first=FIRST_TIME), one
    return timesteps.steps(u, d.num_steps), one


def make_loss(config: Config, *, train: bool = True) -> state.LossFn:
    """Returns the loss of a batch {"image": uint8 [B, H, W, C], "position": [B]}.

    With classes the batch has a "label", [B], too. Flip, time, noise and whether the
    label is dropped come from the step's key and the image's position in the global
    batch, so they are the same however the batch is spread or cut. Only dropout, drawn
    for a whole micro-batch at a time, is not.

    It takes a memory, of which times drawn by importance are made, and returns beside
    the mean what it has seen, as `state.make_step` asks of a loss that remembers: each
    example's time and loss.

    Args:
      config: the configuration.
      train: whether there is dropout.
    """

    def loss_fn(
        params: Any, batch: dict[str, jax.Array], key: jax.Array, memory: Any = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        position = batch["position"]
        # Apart from the first: a fold of one key by 2 is what split makes of it third.
        key, key_t, key_dropout = jax.random.split(key, 3)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
        flip_key, label_key, eps_key = jnp.unstack(jax.vmap(_split3)(keys), axis=1)
        dropout_key = jax.random.fold_in(key_dropout, position[0])
        x0 = batch["image"].astype(jnp.float32) / 127.5 - 1
        if config.data.flip:
            chosen = jax.vmap(jax.random.bernoulli)(flip_key)
            x0 = jnp.where(chosen[:, None, None, None], x0[:, :, ::-1], x0)
        label = _label(config, batch, label_key)
        levels = make_schedule(config, params)
        t, weight = draw_times(config, key_t, position, levels, memory)

        def denoiser(levels: schedule.Schedule) -> gaussian.Denoiser:
            options = {"train": train, "rngs": {"dropout": dropout_key}}
            apply = make_apply(config, params, levels, **options)
            given = apply if label is None else lambda x, t: apply(x, t, label)
            return make_denoiser(config, given, levels)

        eps = gaussian.normal(eps_key, x0.shape)
        if config.diffusion.loss == "vlb" and is_continuous(config):
            fresh = jax.vmap(jax.random.fold_in, (0, None))(eps_key, 1)
            noise = gaussian.normal(fresh, x0.shape)
            each = _continuous_bound(config, params, denoiser, x0, eps, noise, t)
        else:
            each = _loss_at(config, denoiser(levels), levels, x0, eps, t)
        return (weight * each).mean(), {"t": t, "loss": each}

    return loss_fn


def _loss_at(
    config: Config,
    denoise: gaussian.Denoiser,
    levels: schedule.Schedule,
    x0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """The loss of each example at its time, [B], but for the continuous bound."""
    d, level = config.diffusion, levels(t)
    x_t = gaussian.q_sample(x0, eps, level)
    pred = denoise(x_t, t)
    if d.loss == "vlb":
        return losses.vlb(pred, x0, x_t, levels, t, variance=d.variance)
    if d.loss == "hybrid":
        return losses.hybrid(pred, x0, x_t, eps, levels, t, variance=d.variance)
    if d.weighting != "simple":
        each = losses.weighted(pred, eps, level, make_weighting(config))
        # That of SiD2 is per unit of log-SNR, not of time.
        return each * (weightings.slope(levels, t) if d.weighting == "sigmoid" else 1)
    prev = None if is_continuous(config) else levels(t - 1)
    sd = d.sigma_data
    return losses.simple(pred, x0, eps, level, prev, space=d.loss, sigma_data=sd)


def _continuous_bound(
    config: Config,
    params: Any,
    denoiser: Callable[[schedule.Schedule], gaussian.Denoiser],
    x0: jax.Array,
    eps: jax.Array,
    noise: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """The bound in continuous time by one time an example, in bits/dim, [B]."""
    levels = make_schedule(config, params)

    def term(level: schedule.NoiseLevel, slope: jax.Array) -> jax.Array:
        # The network sees the level through what it is given, so that the gradient of
        # a learned schedule comes by no other way.
        pred = denoiser(lambda _: level)(gaussian.q_sample(x0, eps, level), t)
        return losses.diffusion(pred, eps, (1 - FIRST_TIME) * -slope)

    if config.diffusion.schedule == "learned":
        between = learned.minimise_variance(params["schedule"], t, term)
    else:
        between = term(levels(t), -weightings.slope(levels, t))
    first, last = levels(jnp.asarray(FIRST_TIME)), levels(jnp.ones(()))
    z0 = gaussian.q_sample(x0, noise, first)
    return between + losses.prior(x0, last) + losses.reconstruction(x0, z0, first)


def _label(
    config: Config, batch: dict[str, jax.Array], key: jax.Array
) -> jax.Array | None:
    """The label of each example, some replaced by that of none; [B], or None."""
    net = config.net
    if not net.classes:
        return None
    label = batch["label"]
    if net.label_dropout:
        draw = jax.vmap(lambda k: jax.random.bernoulli(k, net.label_dropout))
        label = jnp.where(draw(key), net.classes, label)
    return label


def make_pure_step(config: Config, mesh: jax.sharding.Mesh) -> state.StepFn:
    """Returns the training step as a function of a packed state and a batch."""
    o, strategy = config.optimizer, config.train.parallel
    official = o.preset == "official"
    parts = micro_batches(config)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if config.net.conv == "auto" and parts > 1 and on_cpu:
        # In a compiled loop XLA's convolution on CPU is many times slower.
        config = replace(config, "net", conv="matmul")
    if strategy != "mesh" and official:
        parts = max(1, parts // mesh.size)
    loss_fn = parallel.gathered(flat.of_tree(make_loss(config)), mesh)
    rate_at = rate(config)
    made = state.make_step(
        loss_fn,
        make_optimizer(config),
        averages=make_averages(config),
        clip_norm=o.clip_norm,
        clip_each=official,
        accumulate=parts,
        axis_name=None if strategy == "mesh" else parallel.AXIS,
        remember=_remember if config.diffusion.density == "importance" else None,
        report=functools.partial(_by_quarter, config),
        check_update=may_overflow(config),
    )

    def step(now: state.TrainState, batch: Any) -> tuple[state.TrainState, Any]:
        new, metrics = made(now, batch)
        # Updates that Adam has made, in whichever of its parts they are counted.
        (_, count), *_ = optax.tree.get_all_with_path(now.opt_state, "count")
        return new, metrics | {"learning_rate": rate_at(count)}

    return step


def make_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    stored: Any = None,
    options: compilation.Options | None = None,
) -> parallel.Step:
    """Returns the training step, compiled for the mesh by the configured strategy.

    Args:
      config: the configuration.
      mesh: the devices.
      stored: the images that stay on them, where batches are indices: `feed.Feed`.
      options: of the compiler, as `parallel.data_parallel`.
    """
    strategy = config.train.parallel
    step = make_pure_step(config, mesh)
    if stored is not None:
        step = feed.gathering(step)
    return parallel.data_parallel(
        step, mesh, strategy=strategy, stored=stored, options=options
    )


def _by_quarter(config: Config, seen: dict[str, jax.Array]) -> state.Metrics:
    """Returns sums and numbers of the losses by quarters of the time, [2, 4]."""
    t, total = seen["t"], config.diffusion.num_steps
    quarter = 4 * t if is_continuous(config) else 4 * (t - 1) // total
    mine = jax.nn.one_hot(jnp.clip(quarter, 0, 3).astype(jnp.int32), 4)
    sums = (mine * seen["loss"][:, None]).sum(axis=0)
    return {"quarters": jnp.stack([sums, mine.sum(axis=0)])}


def _remember(memory: timesteps.History, seen: dict[str, jax.Array]) -> Any:
    return timesteps.record(memory, seen["t"], seen["loss"])


def _split3(key: jax.Array) -> jax.Array:
    return jax.random.split(key, 3)


def gradient(chosen: Config) -> Callable[..., Any]:
    """Returns the gradient of the loss of a whole batch, to be counted."""
    # Without parts and loops: the arithmetic is the same.
    whole = replace(chosen, "optimizer", preset="modern")
    whole = replace(whole, "train", accumulate=1)
    whole = replace(whole, "diffusion", density="uniform")
    loss = jax.grad(make_loss(whole), has_aux=True)
    return lambda params, batch: loss(params, batch, jax.random.key(0))[0]
