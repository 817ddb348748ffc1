"""Converts configurations to those of diffusers, and back.

A network there is a UNet2DModel and a scheduler, each with a JSON file. The scheduler
says what is diffused and how it is drawn; it counts times from 0 as our networks do.
"""

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np

from diffusion_jax import schedule
from diffusion_jax.errors import ConfigError, needs
from diffusion_jax.interop import autoencoder_config, unet_config
from diffusion_jax.lab.schema import checks, few, latents
from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import (
    FEWEST_STEPS,
    MOST_STEPS,
    UNKNOWN,
    Config,
    Data,
    Diffusion,
    Net,
    ScheduleName,
)
from diffusion_jax.lab.schema.facts import Must
from diffusion_jax.lab.schema.few import Few
from diffusion_jax.lab.schema.json_fields import is_finite, is_whole
from diffusion_jax.lab.schema.sampling import Sample
from diffusion_jax.lab.wiring import autoencoders, build

SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    # Of consistency models; x0 is c_out f + c_skip x, and c_skip nearly 0.
    "LCMScheduler": "consistency",
}
_BETAS: dict[str, ScheduleName] = {
    "linear": "linear",
    "scaled_linear": "quad",
    "squaredcos_cap_v2": "cosine",
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    # The same to rounding as the next, told apart for numerical reasons.
    "fixed_small_log": "small",
    "fixed_small": "small",
    "fixed_large": "large",
    "learned_range": "range",
}
# The threshold of diffusers has an upper end, and ours has none: this cuts nothing.
_NO_END = float(np.finfo(np.float32).max)
# With which c_skip is 0 in float32 at every time.
_NO_SKIP = 1e6
_LACKING = {
    "progressive": "which DDIMScheduler draws in few.last steps, and it cannot say so",
    "mean_flow": "for which it has no scheduler",
}

_RANGE = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def _one_of(names: Collection[str]) -> Must:
    return Must(" or ".join(names), lambda v: isinstance(v, str) and v in names)


def _only(known: bool | None) -> Must:
    return Must(repr(known), lambda value: value is known)


_TRUTH = Must("true or false", lambda value: isinstance(value, bool))
_NUMBER = Must("a finite number", is_finite)
_FIELDS: dict[str, tuple[Any, Must]] = {
    "_class_name": ("DDPMScheduler", _one_of(SCHEDULERS)),
    "num_train_timesteps": (
        1000,
        Must(
            f"a whole number from {FEWEST_STEPS} to {MOST_STEPS}",
            lambda value: is_whole(value) and FEWEST_STEPS <= value <= MOST_STEPS,
        ),
    ),
    "beta_start": (1e-4, _NUMBER),
    "beta_end": (0.02, _NUMBER),
    "beta_schedule": ("linear", _one_of(_BETAS)),
    "trained_betas": (
        None,
        Must(
            "null or a list of finite numbers",
            lambda value: (
                value is None
                or (isinstance(value, list | tuple) and all(map(is_finite, value)))
            ),
        ),
    ),
    "variance_type": ("fixed_small", _one_of(_VARIANCES)),
    "clip_sample": (True, _TRUTH),
    "clip_sample_range": (1.0, Must("1.0", lambda v: is_finite(v) and v == 1)),
    "prediction_type": ("epsilon", _one_of(_PREDICTIONS)),
    "thresholding": (False, _TRUTH),
    "rescale_betas_zero_snr": (False, _only(False)),
    "set_alpha_to_one": (True, _only(True)),
    # Only of chains that leave out steps, for which there are our own grids.
    "timestep_spacing": ("leading", _one_of(("leading", "trailing", "linspace"))),
    "steps_offset": (0, Must("a whole number", is_whole)),
    # Only with thresholding.
    "dynamic_thresholding_ratio": (0.995, _NUMBER),
    "sample_max_value": (1.0, Must("a number", lambda v: is_finite(v) or v == np.inf)),
    # Only of LCMScheduler: of c_skip = 1 / (1 + (2 t scaling)^2), and of its times.
    "timestep_scaling": (10.0, Must("at least 10", lambda v: is_finite(v) and v >= 10)),
    "original_inference_steps": (50, Must("a whole number", is_whole)),
    # Of the first releases: chosen steps, which no network has.
    "timestep_values": (None, _only(None)),
    "tensor_format": ("pt", Must("anything", lambda _: True)),
}
"""What a field means where a scheduler says nothing of it, and what it must be."""
_DEFAULTS = {name: default for name, (default, _) in _FIELDS.items()}
_DEFAULTS_OF_LCM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
# Schedules that are known by their betas alone.
_BY_BETAS: tuple[ScheduleName, ...] = (
    *("linear", "quad", "const", "warmup10", "warmup50", "cosine", "sigmoid"),
)


def from_diffusers(
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    *,
    name: str,
    where: str,
    of: Config | None = None,
) -> Config:
    """Returns the configuration of a network of diffusers.

    What training needs to know beside is as in an experiment where nothing is given.

    Without a scheduler the defaults of DDPMScheduler are meant, with which the paper's
    schedule comes. `of` is the configuration of the autoencoder whose latents the
    network learns, and `where` the folder, for errors.

    Raises:
      ValueError: it has what we do not support; all of it is named.
    """
    network = unet_config.read_config(unet, where=where)
    net, size = network.net, network.image_size
    if of is None and network.channels not in (1, 3):
        raise ConfigError(
            f"{where} must be of grey or RGB images, in_channels 1 or 3; got "
            f"{network.channels}. Networks of latents alone and others do not fit."
        )
    data = Data(UNKNOWN, image_size=size, channels=network.channels)
    if of is not None:
        by, sides = latents.factor(of), np.broadcast_to(size, 2).tolist()
        if network.channels != of.autoencoder.latent:
            raise ConfigError(
                f"{where} must have as many in_channels as its autoencoder has "
                f"latents, {of.autoencoder.latent}; got {network.channels}. Give the "
                "folder as it was released."
            )
        data = dataclasses.replace(
            of.data, image_size=(by * sides[0], by * sides[1]), latent=of.name
        )
    diffusion, sample = _read_scheduler(scheduler or {}, where)
    jumps = sample.sampler == "consistency"
    split = 2 if diffusion.variance == "range" else 1
    if net.out_channels != split * network.channels:
        raise ConfigError(
            f"{where} must have out_channels {split * network.channels}, for "
            f"in_channels {network.channels} and the variance {diffusion.variance}; "
            f"got {net.out_channels}. Correct variance_type in scheduler_config.json."
        )
    config = Config(
        name=name,
        data=data,
        diffusion=diffusion,
        net=Net(
            classes=net.num_classes,
            # No field says whether a row stands for no label.
            label_dropout=0.0 if net.num_classes else Net.label_dropout,
            **{name: getattr(net, name) for name in build.ALIKE},
        ),
        sample=sample,
        few=Few("consistency" if jumps else "none"),
        autoencoder=Autoencoder() if of is None else of.autoencoder,
    )
    try:
        checks.validate(config)
    except ConfigError as error:
        # Its advice names a flag, which nobody gave.
        must, _, got = str(error).partition("; got ")
        got = got.partition(". Change it with --")[0]
        raise ConfigError(
            f"{where}: {must}; got {got}. Such a network cannot be run here: see "
            "whether its files are as they were released."
        ) from None
    return config


def notes(
    unet: Mapping[str, Any], scheduler: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Returns notes on what was assumed of a network that diffusers alone describes.

    `from_diffusers` has read the two; the second is None where there is none.

    >>> notes({}, {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"})
    ()
    """
    said = []
    if scheduler is None:
        said.append(
            "there is no scheduler_config.json: taken for the paper's diffusion, "
            "T = 1000, linear, eps, and the small variance"
        )
    rows = unet.get("num_class_embeds")
    if rows is not None:
        said.append(
            f"num_class_embeds {rows} rows: all are taken for classes; if the last "
            f"stands for no label, label {rows - 1} draws without one, and "
            "classifier-free guidance needs our own record, which says that it does"
        )
    given = {**_DEFAULTS, **(scheduler or {})}
    spacing = given["timestep_spacing"]
    if given.get("_class_name") == "DDIMScheduler" and spacing != "trailing":
        what = "leave out the noisiest" if spacing == "leading" else "are others"
        said.append(
            f"timestep_spacing {spacing}: the times of its DDIMScheduler {what}; those "
            "drawn at here are the ones of trailing"
        )
    return tuple(said)


def to_diffusers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configurations of the UNet2DModel and of its scheduler.

    That is the LCMScheduler for a consistency model, else the DDPMScheduler.

    Raises:
      ConfigError: the network or its diffusion is nothing that diffusers has.
    """
    d, how = config.diffusion, config.sample
    lacking = []
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    variances = {ours: theirs for theirs, ours in _VARIANCES.items()}
    variance = how.variance or d.variance
    if build.is_continuous(config):
        lacking.append(f"the schedule {d.schedule}, which must be of whole steps")
    if d.prediction not in predictions:
        lacking.append(f"prediction {d.prediction}, which must be eps, x0 or v")
    if variance not in variances or (variance == "range") != (d.variance == "range"):
        lacking.append(f"variance {variance}, which must be small, large or range")
    jumps = config.few.method in few.OWN["consistency"]
    if config.few.method != "none" and not jumps:
        lacking.append(f"few.method {config.few.method}, {_LACKING[config.few.method]}")
    if d.schedule == "jsd":
        lacking.append("the schedule jsd, which ends without any signal")
    if lacking:
        raise ConfigError(
            "a network for diffusers must have what its schedulers have; got "
            f"{'; '.join(lacking)}. Keep it as .safetensors of our own."
        )
    unet = unet_config.write_config(
        build.make_network(config),
        latents.seen(config)[-1],
        image_size=latents.seen(config)[:2],
    )
    threshold = dict(zip(_RANGE, (True, how.threshold, _NO_END), strict=True))
    own: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "variance_type": variances[variance],
    }
    if jumps:
        steps = min(d.num_steps, _DEFAULTS["original_inference_steps"])
        own = {
            "_class_name": "LCMScheduler",
            "original_inference_steps": steps,
            "timestep_scaling": _NO_SKIP,
        }
    scheduler = {
        **own,
        "_diffusers_version": unet_config.VERSION,
        "num_train_timesteps": d.num_steps,
        **_write_betas(config),
        "clip_sample": how.clip,
        "clip_sample_range": 1.0,
        "prediction_type": predictions[d.prediction],
        **({"thresholding": False} if how.threshold is None else threshold),
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    return unet, scheduler


def of_autoencoder(config: Config) -> dict[str, Any]:
    """Returns the configuration of the AutoencoderKL of a run, or of its latents.

    Raises:
      ValueError: diffusers has no such autoencoder.
    """
    net = autoencoders.make_network(config)
    return autoencoder_config.write_config(net, image_size=min(config.data.shape[:2]))


def _read_scheduler(given: Mapping[str, Any], where: str) -> tuple[Diffusion, Sample]:
    """Returns what a scheduler says of the diffusion and of sampling."""
    named = {k: v for k, v in given.items() if not k.startswith("_")}
    kind = given.get("_class_name", "DDPMScheduler")
    usual = _DEFAULTS_OF_LCM if kind == "LCMScheduler" else {}
    values = {**_DEFAULTS, **usual, **named, "_class_name": kind}
    if values["trained_betas"] is not None and isinstance(values["beta_schedule"], str):
        values["beta_schedule"] = "linear"  # nothing is read of it then
    musts = {name: must for name, (_, must) in _FIELDS.items()}
    unfit = [name for name, must in musts.items() if not must.holds(values[name])]
    wrong = [f"{k} {reprlib.repr(v)}" for k, v in named.items() if k not in _DEFAULTS]
    if "_class_name" in unfit:
        wrong = []  # it has other fields, of course
    wrong += [f"{k} {reprlib.repr(values[k])}, not {musts[k].words}" for k in unfit]
    diffusion, within = Diffusion(), dict[str, Any]()
    # Tables have num_train_timesteps entries, which are bounded only if it fits.
    if not {"num_train_timesteps", "trained_betas", "beta_schedule"} & set(unfit):
        diffusion = _read_betas(values, wrong)
    if not {*_RANGE} & set(unfit):
        within = _read_range(values, wrong)
    if wrong:
        raise ConfigError(
            f"the scheduler of {where} must have only what we support; got "
            f"{'; '.join(wrong)}. Such a network cannot be drawn here as it was meant."
        )
    prediction = cast(Any, _PREDICTIONS[values["prediction_type"]])
    variance = cast(Any, _VARIANCES[values["variance_type"]])
    diffusion = dataclasses.replace(
        diffusion,
        prediction=prediction,
        loss="hybrid" if variance == "range" else prediction,
        variance=variance,
    )
    return diffusion, Sample(sampler=cast(Any, SCHEDULERS[kind]), **within)


def _read_range(values: Mapping[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Returns how x0 is kept in its range, fields of Sample; says what is wrong.

    Dynamic thresholding there divides by s, a percentile of |x0| clipped to [1, end].
    """
    threshold, ratio, end = (values[name] for name in _RANGE)
    if not threshold:
        return {"clip": values["clip_sample"]}
    if end == 1:
        return {"clip": True}  # s is 1 then
    if end < _NO_END:
        wrong.append(
            f"sample_max_value {reprlib.repr(end)} with thresholding, not 1.0, which "
            f"is a clip, or {_NO_END}, which is no end"
        )
    return {"clip": values["clip_sample"], "threshold": float(ratio)}


def _read_betas(values: Mapping[str, Any], wrong: list[str]) -> Diffusion:
    """Returns the schedule alone; says what is wrong with it."""
    steps = values["num_train_timesteps"]
    given = values["trained_betas"]
    if given is None:
        name = _BETAS[values["beta_schedule"]]
        ends = {end: values[end] for end in ("beta_start", "beta_end")}
        return Diffusion(name, steps, **({} if name == "cosine" else ends))
    if len(given) != steps:
        wrong.append(f"trained_betas of shape ({len(given)},), not ({steps},)")
        return Diffusion()
    betas = np.asarray(given, np.float64)
    # Rounded, since a scheduler keeps no more of them than float32 does.
    low, high = (float(f"{end:.6g}") for end in (betas.min(), betas.max()))
    if not 0 < low <= high < 1:
        wrong.append(f"trained_betas from {low:g} to {high:g}, not above 0 and below 1")
        return Diffusion()
    for name in _BY_BETAS:
        one = Diffusion(name, steps, beta_start=low, beta_end=high)
        if np.allclose(betas_of(Config(diffusion=one)), betas, rtol=1e-5, atol=0):
            return one
    names = ", ".join(_BY_BETAS)
    wrong.append(f"trained_betas, {steps} of them, that are none of {names}")
    return Diffusion()


def _write_betas(config: Config) -> dict[str, Any]:
    """Returns the fields that say which betas there are."""
    d = config.diffusion
    names = {ours: theirs for theirs, ours in _BETAS.items()}
    named = d.schedule in names and not d.logsnr_shift
    return {
        "beta_start": d.beta_start,
        "beta_end": d.beta_end,
        "beta_schedule": names[d.schedule] if named else "linear",
        "trained_betas": None if named else betas_of(config).tolist(),
    }


def betas_of(config: Config) -> np.ndarray:
    """Returns the variance of each step of a discrete schedule, [T], float64."""
    log_alpha, _ = schedule.tables(build.make_schedule(config))
    return -np.expm1(2 * np.diff(np.asarray(log_alpha, np.float64)))


def peers() -> tuple[Any, Any]:
    """Returns torch and diffusers, where they are installed."""
    for package in ("torch", "diffusers"):
        needs(package, "compare with diffusers", "peers")
    import diffusers
    import torch

    return torch, diffusers
