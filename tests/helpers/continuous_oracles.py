"""Closed-form truths in continuous time, in NumPy float64 and in the SDEs' own terms.

`SDES` are the three of Song et al. 2021 as their paper has them, `LEVELS` these and the
continuous schedules of other papers.
"""

from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax import continuous, schedule

LOW, HIGH = 0.1, 20.0
SMALL, LARGE = 0.01, 50.0


def _integral(t):
    """Of beta from 0 to t."""
    return LOW * t + 0.5 * (HIGH - LOW) * t**2


def _beta(t):
    return LOW + (HIGH - LOW) * t


def _ve_sigma(t):
    return SMALL * (LARGE / SMALL) ** np.asarray(t, np.float64)


class Sde(NamedTuple):
    """A schedule of the library beside its closed forms."""

    schedule: schedule.Schedule
    alpha: object
    sigma: object
    drift: object
    squared_diffusion: object


SDES = {
    "vp": Sde(
        continuous.vp(),
        lambda t: np.exp(-0.5 * _integral(t)),
        lambda t: np.sqrt(-np.expm1(-_integral(t))),
        lambda t: -0.5 * _beta(t),
        _beta,
    ),
    "sub_vp": Sde(
        continuous.sub_vp(),
        lambda t: np.exp(-0.5 * _integral(t)),
        lambda t: -np.expm1(-_integral(t)),
        lambda t: -0.5 * _beta(t),
        lambda t: _beta(t) * -np.expm1(-2 * _integral(t)),
    ),
    "ve": Sde(
        continuous.ve(),
        np.ones_like,
        _ve_sigma,
        np.zeros_like,
        lambda t: _ve_sigma(t) ** 2 * 2 * np.log(LARGE / SMALL),
    ),
}


# Where the cosine's quarter circle is cut, and what is left of the data by the flow.
FROM, TO = np.arctan(np.exp([-7.5, 7.5]))
LEFT = 1e-4
NATS = 2 * np.log(64 / 256)


def _angle(t):
    return FROM + (TO - FROM) * np.asarray(t, np.float64)


def _line(t):
    return (1 - np.asarray(t, np.float64)) + LEFT * np.asarray(t, np.float64)


def _odds(t):
    """sigma^2 / alpha^2 of vp with its log-SNR moved."""
    return np.expm1(_integral(t)) * np.exp(-NATS)


def _odds_beta(t):
    """Of the forward equation: beta = (d odds / dt) / (1 + odds)."""
    return _beta(t) * np.exp(_integral(t) - NATS) / (1 + _odds(t))


LEVELS = {
    **SDES,
    "cosine": Sde(
        continuous.cosine(),
        lambda t: np.cos(_angle(t)),
        lambda t: np.sin(_angle(t)),
        lambda t: -(TO - FROM) * np.tan(_angle(t)),
        lambda t: 2 * (TO - FROM) * np.tan(_angle(t)),
    ),
    "flow": Sde(
        continuous.flow(),
        _line,
        lambda t: np.asarray(t, np.float64),
        lambda t: -(1 - LEFT) / _line(t),
        lambda t: 2 * t + 2 * t**2 * (1 - LEFT) / _line(t),
    ),
    "shifted": Sde(
        continuous.shifted(continuous.vp(), NATS),
        lambda t: 1 / np.sqrt(1 + _odds(t)),
        lambda t: np.sqrt(_odds(t) / (1 + _odds(t))),
        lambda t: -0.5 * _odds_beta(t),
        _odds_beta,
    ),
}


def numbered(made):
    """Each of some schedules over [0, 1], all of them arguments of one program."""
    ways, back = [], []
    for one in made:
        last = continuous.last_time(one)
        ways.append(lambda t, one=one, last=last: one(last * t))
        back.append(
            lambda logsnr, one=one, last=last: continuous.time_of(one, logsnr) / last
        )

    def level(k, t):
        return jax.lax.switch(k, ways, t)

    def time(k, logsnr):
        return jax.lax.switch(k, back, logsnr)

    return [schedule.Timed(level, (k,), inverse=time) for k in range(len(ways))]
