"""Builds what trains from a configuration: optimiser, averages, state, loss, step."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import gaussian, learned, losses, schedule, timesteps, weightings
from diffusion_jax.lab.schema import few, latents
from diffusion_jax.lab.schema.config import Config, micro_batches, replace, warmup
from diffusion_jax.lab.wiring import (
    autoencoders,
    critics,
    few_steps,
    latent_space,
    moving,
)
from diffusion_jax.lab.wiring.build import (
    init_params,
    is_continuous,
    make_schedule,
    param_shapes,
    seen,
)
from diffusion_jax.training import averages, feed, flat, parallel, state

FIRST_TIME = 1e-5
"""Least continuous time, as in Song et al. 2021: at 0 vp has no noise."""
EPSILON = 1e-8
"""Of Adam."""


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns Adam, in the form of TensorFlow for the official preset."""
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
    """Returns whether updates of Adam may overflow though the gradient is finite.

    Its first moment is at most the norm that gradients are clipped to, and is divided
    by epsilon at least: at usual learning rates float32 holds that, and a check would
    be a pass over parameters and moments for nothing.
    """
    o = config.optimizer
    farthest = o.learning_rate * o.clip_norm / EPSILON * config.train.steps
    return farthest > float(jnp.finfo(jnp.float32).max) / 1e6


def init_state(
    config: Config,
    params: Any = None,
    key: jax.Array | None = None,
) -> state.TrainState:
    """Returns the training state before the first step.

    Parameters are a tree or packed, from the seed when None, and so is the key: given
    under jit, one compiled program serves all seeds.
    """
    key = jax.random.key(config.train.seed) if key is None else key
    key_params, key_run = jax.random.split(key)
    if params is None:
        params = init_params(config, key_params)
    memory: Any = ()
    if critics.compete(config) or critics.compare(config):
        memory = critics.memory_of(config, jax.random.fold_in(key, 2))
    if few_steps.has_teacher(config):
        memory = few_steps.memory_of(params)
    elif config.diffusion.density == "importance":
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
    """Returns the shapes of `init_state`; of `as_trained`'s state where packed."""

    def make(params: Any) -> state.TrainState:
        vector = flat.pack(params, config.train.fsdp) if packed else params
        return init_state(config, vector)

    return jax.eval_shape(make, param_shapes(config))


def as_trained(config: Config, whole: state.TrainState, mesh: jax.sharding.Mesh) -> Any:
    """Returns a state packed for training, on the devices of a mesh.

    Parameters, moments and averages are one vector each: a few large operations a step
    in place of a thousand small ones. A packed state is returned as it is.
    """
    if isinstance(whole.params, flat.Flat):
        return whole
    return flat.pack_all(whole, whole.params, _packing(mesh, config.train.fsdp))


def as_stored(trained: Any, mesh: jax.sharding.Mesh) -> state.TrainState:
    """Returns a state with its vectors unpacked to trees, as checkpoints have it."""
    return flat.unpack_all(trained, _unpacking(mesh))


# Programs of one tree: one of a whole state would be four times as large.


@functools.cache
def _packing(mesh: jax.sharding.Mesh, multiple: int) -> Callable[[Any], flat.Flat]:
    return jax.jit(lambda tree: _placed(flat.pack(tree, multiple), mesh))


@functools.cache
def _unpacking(mesh: jax.sharding.Mesh) -> Callable[[flat.Flat], Any]:
    return jax.jit(lambda vector: _placed(flat.unpack(vector), mesh))


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    placed = parallel.state_sharding(tree, mesh)
    return jax.lax.with_sharding_constraint(tree, placed)


def make_averages(config: Config) -> tuple[averages.Profile, ...]:
    """Returns the profiles of the moving averages (EMA); samples are of the first."""
    o = config.optimizer
    ramp = o.preset != "official"
    return (
        *(averages.exponential(decay, ramp=ramp) for decay in o.ema_decay),
        *(averages.power(length) for length in o.ema_lengths),
    )


def make_weighting(config: Config) -> weightings.Weighting:
    """Returns the weight of the squared error of eps, as a function of log-SNR."""
    d, value = config.diffusion, config.diffusion.weighting_value
    given: dict[str, Any] = {}
    if d.weighting == "edm":
        given = {"sigma_data": d.sigma_data}
    elif value is not None:
        given = {"bias" if d.weighting == "sigmoid" else "gamma": value}
    made: weightings.Weighting = getattr(weightings, d.weighting)(**given)
    return made


def draw_times(
    config: Config,
    key: jax.Array,
    position: jax.Array,
    levels: schedule.Schedule,
    memory: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns a time and the weight of its loss for each position in the batch, [B].

    `memory` has the losses by time, for importance sampling.
    """
    d, size = config.diffusion, config.train.batch_size
    match d.spread:
        case "uniform":
            u = timesteps.uniform(key, position)
        case "low_discrepancy":
            u = timesteps.low_discrepancy(key, position, size)
        case "antithetic":
            u = timesteps.antithetic(key, position, size)
    one = jnp.ones_like(u)
    if config.few.method in few.OWN["consistency"]:
        return few_steps.times(config, u), one
    match d.density:
        case "importance" if config.few.method == "none":
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

    In place of images a latent run has what `latent_space.draw` takes. With classes the
    batch has a "label", [B], too. Flip, time, noise and label dropout come from the
    step's key and the image's position in the global batch, so they are the same
    however the batch is split. Only dropout, drawn for a whole micro-batch at a time,
    is not. That of an autoencoder is `autoencoders.make_loss`.

    The loss takes a memory, of which importance sampling makes its times, and returns
    the mean and {"t", "loss"} of each example, as `state.make_step` wants. There is
    dropout only with `train`.
    """
    if latents.is_autoencoder(config):
        return autoencoders.make_loss(config)

    def loss_fn(
        params: Any, batch: dict[str, jax.Array], key: jax.Array, memory: Any = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        position = batch["position"]
        # Split before it is folded: split(key, 3)[2] is fold_in(key, 2).
        key, key_t, key_dropout = jax.random.split(key, 3)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
        several = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        flip_key, label_key, eps_key = jnp.unstack(several, axis=1)
        dropout_key = jax.random.fold_in(key_dropout, position[0])
        if latents.is_latent(config):
            x0 = latent_space.draw(config, batch["image"], flip_key)
        else:
            x0 = batch["image"].astype(jnp.float32) / 127.5 - 1
            x0 = moving.moved(config.data, x0, flip_key)
        label = _label(config, batch, label_key)
        levels = make_schedule(config, params)
        t, weight = draw_times(config, key_t, position, levels, memory)
        options: dict[str, Any] = {"train": train, "rngs": {"dropout": dropout_key}}

        def denoiser(levels: schedule.Schedule) -> gaussian.Denoiser:
            return seen(config, params, levels, label, **options)

        eps = gaussian.normal(eps_key, x0.shape)
        if config.few.method != "none":
            again = jax.random.fold_in(key_t, 1)
            other = draw_times(config, again, position, levels, memory)[0]
            u = timesteps.uniform(jax.random.fold_in(key_t, 2), position)
            each = few_steps.loss(
                config, params, memory, x0, eps, (t, other, u), label, **options
            )
        elif config.diffusion.loss == "vlb" and is_continuous(config):
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
    """Returns the loss of each example at its time, [B]; not the continuous bound."""
    d, level = config.diffusion, levels(t)
    x_t = gaussian.q_sample(x0, eps, level)
    pred = denoise(x_t, t)
    if d.loss == "vlb":
        return losses.vlb(pred, x0, x_t, levels, t, variance=d.variance)
    if d.loss == "hybrid":
        return losses.hybrid(pred, x0, x_t, eps, levels, t, variance=d.variance)
    if d.weighting != "simple":
        each = losses.weighted(pred, eps, level, make_weighting(config))
        # The sigmoid weighting is per unit of log-SNR, not of time.
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
    """Returns the continuous-time bound from one time an example, in bits/dim, [B]."""
    levels = make_schedule(config, params)

    def term(level: schedule.NoiseLevel, slope: jax.Array) -> jax.Array:
        # The network takes the level from this argument alone, so that all of a learned
        # schedule's gradient goes through it.
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
    """Returns the labels, some dropped (replaced by `classes`); [B], or None."""
    net = config.net
    if not net.classes:
        return None
    label = batch["label"]
    if net.label_dropout:
        draw = jax.vmap(lambda k: jax.random.bernoulli(k, net.label_dropout))
        label = jnp.where(draw(key), net.classes, label)
    return label


def _pure_step(config: Config, mesh: jax.sharding.Mesh) -> state.StepFn:
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

    def by_importance(memory: timesteps.History, seen: dict[str, jax.Array]) -> Any:
        return timesteps.record(memory, seen["t"], seen["loss"])

    taught, remember = few_steps.has_teacher(config), cast(Any, None)
    if critics.compete(config):
        remember = functools.partial(critics.remembered, config, rate(config))
    elif not taught and config.diffusion.density == "importance":
        remember = by_importance
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
        remember=remember,
        report=functools.partial(
            autoencoders.means if latents.is_autoencoder(config) else _by_quarter,
            config,
        ),
        check_update=may_overflow(config),
    )

    def step(now: state.TrainState, batch: Any) -> tuple[state.TrainState, Any]:
        new, metrics = made(now, batch)
        if taught:
            new = few_steps.remembered(config, new)
        # Skipped steps are not counted by Adam.
        (_, count), *_ = optax.tree.get_all_with_path(now.opt_state, "count")
        return new, metrics | {"learning_rate": rate_at(count)}

    return step


def make_step(
    config: Config, mesh: jax.sharding.Mesh, stored: Any = None
) -> parallel.Step:
    """Returns the training step, compiled for the mesh by the configured strategy.

    `stored` are images on the devices, where batches are indices of them: `feed.Feed`.
    """
    step, strategy = _pure_step(config, mesh), config.train.parallel
    step = step if stored is None else feed.gathering(step)
    return parallel.data_parallel(step, mesh, strategy=strategy, stored=stored)


def _by_quarter(config: Config, seen: dict[str, jax.Array]) -> state.Metrics:
    """Returns sum and count of the losses in each quarter of the times, [2, 4]."""
    t, total = seen["t"], config.diffusion.num_steps
    quarter = 4 * t if is_continuous(config) else 4 * (t - 1) // total
    mine = jax.nn.one_hot(jnp.clip(quarter, 0, 3).astype(jnp.int32), 4)
    sums = (mine * seen["loss"][:, None]).sum(axis=0)
    return {"quarters": jnp.stack([sums, mine.sum(axis=0)])}


def gradient(chosen: Config) -> Callable[..., Any]:
    """Returns the gradient of the loss of a whole batch, to count operations of."""
    # Without micro-batches and loops, which do the same arithmetic.
    whole = replace(chosen, "optimizer", preset="modern")
    whole = replace(whole, "train", accumulate=1)
    whole = replace(whole, "diffusion", density="uniform")
    whole = replace(whole, "autoencoder", discriminator=0.0, perceptual=0.0)
    if few_steps.has_teacher(whole):
        whole = replace(whole, "few", method="none")
    loss = jax.grad(make_loss(whole), has_aux=True)
    return lambda params, batch: loss(params, batch, jax.random.key(0))[0]
