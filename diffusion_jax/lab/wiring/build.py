"""Builds the schedule, the network and the data from a configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import continuous, errors, gaussian, guidance, learned, schedule
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, first_of
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import CONTINUOUS, GIVEN, UNKNOWN, Config
from diffusion_jax.lab.wiring import autoencoders
from diffusion_jax.nets import fresh, unet
from diffusion_jax.nets.unet import UNet

Apply = Callable[..., jax.Array]

FIRST_LOGSNR = (-5.0, 13.3)
"""Ends of a learned schedule before training (Kingma et al. 2021)."""
ALIKE = (
    *("channels", "multipliers", "blocks", "attention"),
    *("dropout", "groups", "variant", "fourier"),
)
"""Fields of a configuration's network that the U-Net has under the same names."""
IN_TRAINING = {
    "data_dir": "In training data_dir is --data.path.",
    "skip_unreadable=True": "In training that is --data.skip-unreadable.",
    "image_size": "In training image_size is --data.image-size.",
    "channels=": "In training channels is --data.channels.",
    "fit=": "No flag gives fit: crop them yourself, or give them as a folder:PATH.",
    "a folder of images": "In training the folder is --data.source folder:PATH.",
    "do without labels": "In training --net.classes 0 does without labels.",
}
"""Words of errors of `datasets.load`, and the flags of training that they mean."""


def make_schedule(config: Config, params: Any = None) -> schedule.Schedule:
    """Returns the noise schedule of training; a learned one is made of `params`."""
    d = config.diffusion
    total, ends = d.num_steps, {"beta_start": d.beta_start, "beta_end": d.beta_end}
    made: schedule.Schedule = {
        "linear": lambda: schedule.linear(total, **ends),
        "quad": lambda: schedule.quad(total, **ends),
        "const": lambda: schedule.const(total, beta=d.beta_end),
        "jsd": lambda: schedule.jsd(total),
        "warmup10": lambda: schedule.warmup(total, fraction=0.1, **ends),
        "warmup50": lambda: schedule.warmup(total, fraction=0.5, **ends),
        "cosine": lambda: schedule.cosine(total),
        "sigmoid": lambda: schedule.sigmoid(total),
        "vp": continuous.vp,
        "sub_vp": continuous.sub_vp,
        "ve": lambda: continuous.ve(sigma_min=d.sigma_min, sigma_max=d.sigma_max),
        "continuous_cosine": continuous.cosine,
        "flow": continuous.flow,
        "learned": lambda: learned.schedule(params["schedule"]),
    }[d.schedule]()
    return continuous.shifted(made, d.logsnr_shift) if d.logsnr_shift else made


def chain_schedule(config: Config, params: Any = None) -> schedule.Schedule:
    """Returns the schedule of T discrete steps, for sampling and bounds."""
    made = make_schedule(config, params)
    if not is_continuous(config):
        return made
    return continuous.discretize(made, config.diffusion.num_steps, clean=True)


def is_continuous(config: Config) -> bool:
    """Returns whether the network learns at continuous times."""
    return config.diffusion.schedule in CONTINUOUS


def time_shift(config: Config) -> int:
    """Returns what is subtracted from t for the network: 1 for discrete schedules."""
    return 0 if is_continuous(config) else 1


def make_network(config: Config) -> UNet:
    """Returns the U-Net; its parameters come from `init_params`."""
    net = config.net
    split = config.diffusion.variance in ("learned", "range")
    return UNet(
        out_channels=latents.seen(config)[-1] * (2 if split else 1),
        # The last row stands for no label.
        num_classes=net.classes + (1 if net.classes and net.label_dropout else 0),
        spans=has_spans(config),
        **{name: getattr(net, name) for name in ALIKE},
        **autoencoders.computed(net),
    )


def has_spans(config: Config) -> bool:
    """Returns whether the network is told how far a jump goes."""
    return config.few.method == "mean_flow"


def as_computed(config: Config, params: Any) -> Any:
    """Returns the parameters with the network's cast to its dtype; see `unet.cast`.

    Its output is the same to the bit.
    """
    return {**params, "net": unet.cast(params["net"], jnp.dtype(config.net.dtype))}


def make_apply(
    config: Config, params: Any, levels: schedule.Schedule, **options: Any
) -> Apply:
    """Returns the network as a function of x, t and, with classes, the label.

    A network of jumps also takes how far they go, in the unit of t; 0 when not given.
    `levels` is the schedule whose times t are; options are those of the network's call.
    """
    net = make_network(config)

    def fed(t: jax.Array) -> jax.Array:
        if config.diffusion.prediction == "edm" or not is_continuous(config):
            return t  # as `gaussian.denoiser` feeds it
        if config.diffusion.schedule == "learned":
            # The log-SNR, since a time's noise changes as the schedule learns.
            low, high = FIRST_LOGSNR
            return 1000 * (high - levels(t).logsnr) / (high - low)
        # The derivative in t, which teaches jumps, would be noise by fast waves.
        return (10 if has_spans(config) else 1000) * t / continuous.last_time(levels)

    def apply(
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        span: jax.Array | None = None,
    ) -> jax.Array:
        variables, told = {"params": params["net"]}, dict(options)
        if has_spans(config):
            told["span"] = fed(jnp.zeros_like(t) if span is None else span)
        return cast(jax.Array, net.apply(variables, x, fed(t), label, **told))

    return apply


def make_denoiser(
    config: Config, apply: Apply, levels: schedule.Schedule, **options: Any
) -> gaussian.Denoiser:
    """Returns the network as a denoiser; options are clip and threshold."""
    return gaussian.denoiser(
        apply,
        levels,
        config.diffusion.prediction,
        variance=config.diffusion.variance,
        sigma_data=config.diffusion.sigma_data,
        time_shift=time_shift(config),
        **options,
    )


def seen(
    config: Config,
    params: Any,
    levels: schedule.Schedule,
    label: jax.Array | None,
    span: jax.Array | None = None,
    *,
    guide: float | None = None,
    **options: Any,
) -> gaussian.Denoiser:
    """Returns the network in training as a denoiser of images with these labels.

    Args:
      config: of the run.
      params: the parameters.
      levels: the schedule of the times.
      label: classes, [B], or None.
      span: how far jumps go, [B], in a network that is told.
      guide: scale of classifier-free guidance.
      **options: of the network's call.
    """
    apply = make_apply(config, params, levels, **options)
    if guide is not None and label is not None:
        null, channels = config.net.classes, latents.seen(config)[-1]
        apply = guidance.classifier_free(
            apply, label, null, scale=guide, channels=channels
        )
    else:
        apply = partial(apply, label=label, span=span)
    return make_denoiser(config, apply, levels)


def init_params(config: Config, key: jax.Array) -> Any:
    """Returns fresh parameters: {"net": ...}, and "schedule" where it is learned.

    Those of a network are NumPy arrays.
    """
    if latents.is_autoencoder(config):
        net = autoencoders.make_network(config, config.net)
        own = fresh.params(net, key, _image(config))
        return {"net": own, **autoencoders.init_decoder(config)}
    params = {"net": fresh.params(make_network(config), key, *_inputs(config))}
    if config.diffusion.schedule == "learned":
        params["schedule"] = _init_schedule(jax.random.fold_in(key, 1))
    return params


def param_shapes(config: Config) -> Any:
    """Returns the shapes of `init_params`, as `jax.ShapeDtypeStruct`."""
    if latents.is_autoencoder(config):
        beside = jax.eval_shape(lambda: autoencoders.init_decoder(config))
        return {"net": autoencoders.shapes(config), **beside}
    shapes = {"net": fresh.shapes(make_network(config), *_inputs(config))}
    if config.diffusion.schedule == "learned":
        shapes["schedule"] = jax.eval_shape(lambda: _init_schedule(jax.random.key(0)))
    return shapes


def _inputs(config: Config) -> tuple[Any, ...]:
    """Returns an image, a time, a label or None and, of jumps, a span: all zeros."""
    label = np.zeros(1, np.int32) if config.net.classes else None
    span = (np.zeros(1, np.float32),) if has_spans(config) else ()
    return _image(config), np.zeros(1, np.float32), label, *span


def _image(config: Config) -> np.ndarray:
    return np.zeros((1, *latents.seen(config)), np.float32)


def _init_schedule(key: jax.Array) -> learned.Params:
    low, high = FIRST_LOGSNR
    return learned.init(key, logsnr_min=low, logsnr_max=high)


def load_data(
    config: Config, *, split: str = "train", labelled: bool = False
) -> datasets.Dataset:
    """Returns the images of a split, "train" or "test"; held-out ones are the latter.

    With `labelled` they must have labels though the network has no classes.

    Raises:
      ConfigError, DataError: as `load_parts`; there are no test images.
    """
    if split == "test" and not config.data.hold_out:
        found = _load(config, split, labelled=labelled)
    else:
        train, held = load_parts(config, labelled=labelled)
        found = train if split == "train" or held is None else held
    return datasets.middle(found, config.data.shape[:2])


def load_parts(
    config: Config, dataset: datasets.Dataset | None = None, *, labelled: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Returns the images to train on, and the held-out ones or None.

    With data.random_crop they are larger than what the network sees. `dataset` has all
    images, in place of those that the configuration names.

    Raises:
      ConfigError, DataError: they cannot be loaded, or are too few.
    """
    whole = dataset or _load(config, "train", labelled=labelled)
    share = config.data.hold_out
    return datasets.held_out(whole, share) if share else (whole, None)


def _load(config: Config, split: str, *, labelled: bool) -> datasets.Dataset:
    """Returns the images of a split of the source, none held out.

    Raises:
      ConfigError: they have another size or channels, or the source is unknown.
    """
    d = config.data
    if d.source.startswith(GIVEN):
        raise ConfigError(
            "the data must be in files; got a run whose images were given in memory. "
            "Save them, as an npz with images and labels, and name them where there is "
            "the flag: --data npz:FILE."
        )
    if d.source == UNKNOWN:
        raise ConfigError(
            "the data must be known; got a network from elsewhere, which says nothing "
            "of what it was trained on. Name it where you convert the network, or "
            "here where there is the flag: --data cifar10, or --data folder:PATH."
        )
    try:
        dataset = datasets.load(
            d.source,
            split=split,
            data_dir=d.path,
            image_size=d.loaded[:2],
            channels=d.channels,
            download=d.download,
            skip_unreadable=d.skip_unreadable,
            labelled=labelled or config.net.classes > 0,
        )
    except errors.DataError as error:
        hints = [said for word, said in IN_TRAINING.items() if word in str(error)]
        more = f"\n{' '.join(hints)}" if hints else ""
        raise errors.DataError(f"{error}{more}") from error
    shape = dataset.images.shape[1:]
    if shape != d.loaded:
        raise ConfigError(
            f"the images of {d.source} must be {d.shape[0]}x{d.shape[1]} with "
            f"{d.channels} channels; got {shape}. Give such images, or, in training, "
            "set --data.image-size and --data.channels to what they are."
        )
    check_labels(config, dataset)
    return dataset


def check_labels(config: Config, dataset: datasets.Dataset) -> None:
    """Raises ConfigError where the data do not have the classes of the network."""
    classes = config.net.classes
    if not classes:
        return
    if dataset.labels is None:
        raise ConfigError(
            f"{dataset.name} must have labels for net.classes = {classes}; got none. "
            "Give labelled data, or, in training, --net.classes 0."
        )
    if dataset.classes and len(dataset.classes) != classes:
        raise ConfigError(
            f"net.classes must be {len(dataset.classes)}, the classes in "
            f"{config.data.source}: {first_of(dataset.classes, 10)}; got {classes}. In "
            f"training, set --net.classes to {len(dataset.classes)}, or name another "
            "folder."
        )
    least, most = int(dataset.labels.min()), int(dataset.labels.max())
    if least < 0 or most >= classes:
        mend = f"In training, set --net.classes to {most + 1}"
        if least < 0:
            mend = "Leave out images without a class, or train with --net.classes 0"
        raise ConfigError(
            f"labels must be in 0..{classes - 1}, for net.classes = {classes}; got "
            f"{least}..{most}. {mend}."
        )
