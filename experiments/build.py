"""From a configuration to objects: the only place that asks what a name means."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import (
    continuous,
    gaussian,
    grids,
    langevin,
    losses,
    ode,
    samplers,
    schedule,
    solvers,
)
from diffusion_jax.nets.unet import UNet
from diffusion_jax.training import data, parallel, state
from experiments import sampling
from experiments.config import Config, ConfigError, micro_batches


def make_schedule(config: Config) -> schedule.Schedule:
    """Returns the noise schedule."""
    d = config.diffusion
    ends = {"beta_start": d.beta_start, "beta_end": d.beta_end}
    match d.schedule:
        case "linear":
            return schedule.linear(d.num_steps, **ends)
        case "quad":
            return schedule.quad(d.num_steps, **ends)
        case "const":
            return schedule.const(d.num_steps, beta=d.beta_end)
        case "jsd":
            return schedule.jsd(d.num_steps)
        case "warmup10":
            return schedule.warmup(d.num_steps, fraction=0.1, **ends)
        case "warmup50":
            return schedule.warmup(d.num_steps, fraction=0.5, **ends)
        case "cosine":
            return schedule.cosine(d.num_steps)


def make_network(config: Config, *, looped: bool = False) -> UNet:
    """Returns the network; its parameters come from `init_params`.

    Args:
      config: the configuration.
      looped: whether its gradient is taken inside a compiled loop, where XLA's
        convolution on CPU is many times slower than the matrix product.
    """
    net = config.net
    learned = config.diffusion.variance == "learned"
    conv = net.conv
    if conv == "auto":
        conv = "matmul" if looped and jax.default_backend() == "cpu" else "xla"
    return UNet(
        out_channels=config.data.channels * (2 if learned else 1),
        channels=net.channels,
        multipliers=net.multipliers,
        blocks=net.blocks,
        attention=net.attention,
        dropout=net.dropout,
        groups=net.groups,
        dtype=jnp.dtype(net.dtype),
        conv=conv,
        remat=net.remat,
    )


def call(
    net: UNet, params: Any, x: jax.Array, t: jax.Array, **options: Any
) -> jax.Array:
    """Returns the network's output, [B, H, W, channels]."""
    return cast(jax.Array, net.apply({"params": params}, x, t, **options))


def init_params(config: Config, key: jax.Array) -> Any:
    """Returns fresh parameters of the network."""
    shape = (1, config.data.image_size, config.data.image_size, config.data.channels)
    init = jax.jit(make_network(config).init)
    return init(key, jnp.zeros(shape), jnp.zeros(1, jnp.int32))["params"]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns Adam in the form that the preset names."""
    o = config.optimizer
    decay_steps = config.train.steps if o.decay == "cosine" else None
    rate = state.learning_rate(
        o.learning_rate, warmup=o.warmup, decay_steps=decay_steps
    )
    if o.preset == "official":
        return state.tf_adam(rate, b2=o.b2, eps=1e-8)
    return optax.adam(rate, b2=o.b2, eps=1e-8)


def init_state(config: Config) -> state.TrainState:
    """Returns the training state before the first step, from the seed alone."""
    key_params, key_run = jax.random.split(jax.random.key(config.train.seed))
    params = init_params(config, key_params)
    return state.init(key_run, params, make_optimizer(config))


def make_loss(config: Config) -> state.LossFn:
    """Returns the loss of a batch {"image": uint8 [B, H, W, C], "position": [B]}.

    Flip, time and noise of an image come from the step's key and the image's position
    in the global batch, so they are the same however the batch is spread or cut. Only
    dropout, drawn for a whole micro-batch at a time, is not.
    """
    net = make_network(config, looped=micro_batches(config) > 1)
    levels, diffusion = make_schedule(config), config.diffusion

    def loss_fn(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        position = batch["position"]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
        flip_key, t_key, eps_key = jnp.unstack(jax.vmap(_split3)(keys), axis=1)
        dropout_key = jax.random.fold_in(jax.random.fold_in(key, 1), position[0])

        def apply(x: jax.Array, t: jax.Array) -> jax.Array:
            rngs = {"dropout": dropout_key}
            return call(net, params, x, t, train=True, rngs=rngs)

        x0 = batch["image"].astype(jnp.float32) / 127.5 - 1
        if config.data.flip:
            chosen = jax.vmap(jax.random.bernoulli)(flip_key)
            x0 = jnp.where(chosen[:, None, None, None], x0[:, :, ::-1], x0)
        t = jax.vmap(losses.sample_t, (0, None))(t_key, diffusion.num_steps)
        eps = gaussian.normal(eps_key, x0.shape)
        x_t = gaussian.q_sample(x0, eps, levels(t))
        denoise = gaussian.denoiser(
            apply,
            levels,
            diffusion.prediction,
            learned_variance=diffusion.variance == "learned",
        )
        pred = denoise(x_t, t)
        if diffusion.loss == "vlb":
            each = losses.vlb(pred, x0, x_t, levels, t, variance=diffusion.variance)
        else:
            each = losses.simple(
                pred, x0, eps, levels(t), levels(t - 1), space=diffusion.loss
            )
        return each.mean()

    return loss_fn


def make_step(config: Config, mesh: jax.sharding.Mesh) -> state.StepFn:
    """Returns the training step, compiled for the mesh by the configured strategy."""
    o, strategy = config.optimizer, config.train.parallel
    official = o.preset == "official"
    parts = micro_batches(config)
    if strategy != "mesh" and official:
        parts = max(1, parts // mesh.size)
    step = state.make_step(
        make_loss(config),
        make_optimizer(config),
        ema_decay=o.ema_decay,
        ema_ramp=not official,
        clip_norm=o.clip_norm,
        clip_each=official,
        accumulate=parts,
        axis_name=None if strategy == "mesh" else parallel.AXIS,
    )
    return parallel.data_parallel(step, mesh, strategy=strategy)


def make_grid(config: Config) -> np.ndarray:
    """Returns the times that a chain goes through, from T to 0."""
    total = config.diffusion.num_steps
    how = sampling.resolve(config.sample, total)
    if how["sampler"] == "ode":
        # All the way in one stretch, but for the step to data, where noise ends.
        return np.array([total, 1, 0])
    made: Callable[..., np.ndarray] = {
        "uniform": grids.uniform,
        "quadratic": grids.quadratic,
        "logsnr": grids.logsnr,
        "karras": grids.karras,
    }[how["grid"]]
    return made(make_schedule(config), how["steps"])


def make_sampler(config: Config, params: Any) -> samplers.Sampler:
    """Returns the sampling rule with these parameters."""
    return make_rule(config, make_denoiser(config, params))


def make_denoiser(config: Config, params: Any) -> gaussian.Denoiser:
    """Returns the network's prediction, as the chains of the configuration see it."""
    net = make_network(config)
    how = sampling.resolve(config.sample, config.diffusion.num_steps)
    return gaussian.denoiser(
        lambda x, t: call(net, params, x, t),
        sampling_schedule(config),
        config.diffusion.prediction,
        clip=how["clip"],
        threshold=config.sample.threshold,
        learned_variance=config.diffusion.variance == "learned",
    )


def sampling_schedule(config: Config) -> schedule.Schedule:
    """Returns the schedule that chains walk: in real time where the rule needs it."""
    levels = make_schedule(config)
    return continuous.interpolate(levels) if config.sample.sampler == "ode" else levels


def make_rule(config: Config, denoise: gaussian.Denoiser) -> samplers.Sampler:
    """Returns the sampling rule for any denoiser on `sampling_schedule`."""
    levels = sampling_schedule(config)
    how = sampling.resolve(config.sample, config.diffusion.num_steps)
    options = {
        name: how[name] for name in sampling.RULES[config.sample.sampler].options
    }
    match config.sample.sampler:
        case "ddpm":
            variance = options["variance"] or config.diffusion.variance
            return samplers.ddpm(denoise, levels, variance=variance)
        case "ddim":
            return samplers.ddim(denoise, levels, **options)
        case "heun":
            return solvers.heun(denoise, levels)
        case "edm":
            return solvers.edm(denoise, levels, **options)
        case "dpm_solver_pp":
            return solvers.dpm_solver_pp(denoise, levels, **options)
        case "unipc":
            return solvers.unipc(denoise, levels, order=int(options["order"]))
        case "predictor_corrector":
            return langevin.predictor_corrector(denoise, levels, **options)
        case "langevin":
            return langevin.langevin(denoise, levels, **options)
        case "ode":
            tolerance = options["tolerance"]
            return ode.ode(denoise, levels, rtol=tolerance, atol=tolerance)


def count_evaluations(config: Config, params: Any) -> float:
    """Returns the network evaluations that one sample takes, counted on a draw.

    Only where the steps depend on the network is it the real one that is asked.
    """
    denoise = gaussian.denoiser(lambda x, t: 0 * x, sampling_schedule(config), "x0")
    if sampling.RULES[config.sample.sampler].grid is None:
        denoise = make_denoiser(config, params)
    shape = (1, *[config.data.image_size] * 2, config.data.channels)

    def make(counted: gaussian.Denoiser) -> samplers.Sampler:
        return make_rule(config, counted)

    return samplers.count_evaluations(make, denoise, make_grid(config), shape)


def make_draw(
    config: Config, count: int, mesh: jax.sharding.Mesh
) -> Callable[..., np.ndarray]:
    """Returns a function of (params, key, first) that draws `count` images.

    Compiled once, whatever the parameters; image i depends on (key, first + i) alone.
    The result is float, [count, H, W, C], about [-1, 1].
    """
    grid, size = make_grid(config), config.data.image_size
    # Devices that cannot share the images equally draw all of them each.
    spread = count % mesh.size == 0
    out = parallel.sharded(mesh) if spread else parallel.replicated(mesh)

    @jax.jit
    def draw(params: Any, key: jax.Array, first: jax.Array) -> jax.Array:
        sampler = make_sampler(config, params)
        shape = (count, size, size, config.data.channels)
        images = samplers.sample(key, sampler, grid, shape, first=first)
        return jax.lax.with_sharding_constraint(images, out)

    def drawn(params: Any, key: jax.Array, first: int = 0) -> np.ndarray:
        return np.asarray(draw(params, key, jnp.asarray(first)))

    return drawn


def describe_sampling(config: Config) -> dict[str, Any]:
    """Returns what has to be known of samples beside the weights and the seed."""
    about = sampling.resolve(config.sample, config.diffusion.num_steps)
    if "variance" in about:
        about["variance"] = about["variance"] or config.diffusion.variance
    return about


def load_data(config: Config, *, split: str = "train") -> data.Dataset:
    """Returns the images of a split, "train" or "test".

    Raises:
      ConfigError: they do not have the configured size or channels.
    """
    d = config.data
    try:
        dataset = data.load(
            d.source,
            split=split,
            data_dir=d.path,
            image_size=d.image_size,
            channels=d.channels,
            download=d.download,
        )
    except data.DataError as error:
        hint = "\ndata_dir is --data.path here." if "data_dir" in str(error) else ""
        raise data.DataError(f"{error}{hint}") from error
    shape = dataset.images.shape[1:]
    if shape != (d.image_size, d.image_size, d.channels):
        raise ConfigError(
            f"the images of {d.source} must be {d.image_size}x{d.image_size} with "
            f"{d.channels} channels; got {shape}. Set --data.image-size and "
            "--data.channels to what the images are."
        )
    return dataset


def _split3(key: jax.Array) -> jax.Array:
    return jax.random.split(key, 3)
