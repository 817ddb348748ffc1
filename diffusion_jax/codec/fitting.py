"""Finds the profile of a network from images: times, variances, symbols, alphabet.

Of x_t at some fifty times it measures V_t, the mean square of x0 - x0_hat(x_t) for each
dimension. All else follows:

  rate of a jump t -> s         1/2 sum_d log2(1 + c0^2 V_t[d] / small)
  information about x0 by t     sum of 1/2 mmse dSNR / ln 2
  pixels seen from x_t          -log2 P(x0 | x_t), where the square of the error is as
                                large as that of its dimension and of its texture

The first is the mean of KL(q(x_s | x_t, x0) || p(x_s | x_t)) where p has the best
variance for each dimension, small + c0^2 V_t[d] (see `prediction`). The times of a
chain have equal shares of the second. Where it ends, and how many steps it has, is
searched among all that come into question, by the size of a file.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_jax.codec import bins
from diffusion_jax.codec.bins import TOTAL, Pixels
from diffusion_jax.codec.certified import ONE
from diffusion_jax.codec.profile import MOST_BITS, TEXTURES, Chain, Profile
from diffusion_jax.errors import DataError
from diffusion_jax.schedule import Schedule, tables

IMAGES = 1024
STEPS = (5, 8, 12, 18, 25, 36, 52)
"""Lengths of chains that are tried."""
ENDS = 12
"""Times at which a chain may end that are tried."""
NEAR = 0.025
"""Files may be so much larger than the smallest, if the chain is better otherwise."""
SCANNED = 48
_NOISE = (0.02, 0.5)
"""sigma / alpha of the first and last time at which a chain may end."""
_SMALLEST = 2.0**-20
_TURNS = 6
_PRIOR = 1e-4
"""Bits a dimension that a chain may leave out where it begins."""
_FINER = 4
"""How much finer than a deviation the values of an archive are."""
_SYMBOL, _SPARE = 10, 2
"""Bits of information in one symbol at most, and bits that it has beyond them."""


class Scan(NamedTuple):
    """What was measured at the times that were looked at."""

    times: np.ndarray
    """int64 [S], rising."""
    errors: np.ndarray
    """float64 [S, D]: V_t."""
    each: np.ndarray
    """float64 [S, N]: sum of the squares of an image's errors."""
    pixels: np.ndarray
    """float64 [S, N]: bits to code all pixels of an image, seen from x_t."""
    sd: np.ndarray
    """float64 [S, D]: deviation of pixels, see `Chain.pixel_sd`."""
    texture: np.ndarray
    """float64 [S, TEXTURES]: factors of it."""


def fit(
    denoise: Callable[[np.ndarray, float], np.ndarray],
    schedule: Schedule,
    images: np.ndarray,
    *,
    about: dict[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    tick: Callable[[int], object] = lambda count: None,
) -> Profile:
    """Returns the profile of a network.

    Args:
      denoise: from x_t, float64 [B, H, W, C], and a time to x0 as the network sees it,
        always of the same B; computed in float32 will do.
      schedule: discrete, and variance-preserving.
      images: uint8 [N, H, W, C] that it was trained on. Some 1,024 suffice.
      about: words to keep in the profile.
      seed: of the noise of the measurement, and of that in files.
      batch_size: B.
      tick: called with the images that were evaluated, SCANNED times their number.

    Raises:
      DataError: the schedule or the network is not of the kind that is supported, or
        there are no images.
    """
    log_alpha, logsnr = (np.asarray(table, np.float64) for table in tables(schedule))
    if len(images) < 2 or images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(
            "images must be two or more, uint8 [N, H, W, C]; got "
            f"{images.dtype}{list(images.shape)}. Give the images of the training."
        )
    preserving = np.exp(2 * log_alpha[1:]) * (1 + np.exp(-logsnr[1:]))
    if np.abs(preserving - 1).max() > 1e-4:
        raise DataError(
            "the schedule must preserve the variance, alpha^2 + sigma^2 = 1; got "
            "another. Files are made with linear, cosine and the like, not with ve, "
            "sub_vp or flow."
        )
    alphabet = alphabet_of(images)
    times = _scanned(log_alpha, logsnr)
    levels = log_alpha, logsnr
    scan = _scan(denoise, *levels, times, images, alphabet, seed, batch_size, tick)
    tried = _chains(scan, *levels, seed)
    progressive, few = _best(
        [
            (chain, float(chain.chunks @ chain.bits) + _late(scan, logsnr, end))
            for chain, end in tried
        ],
        lambda chain: int(chain.times[0]),
    )
    archive, fewest = _best(
        [
            (chain, float(rates_of(chain).sum() + scan.pixels[end].mean()))
            for chain, end in tried
        ],
        lambda chain: chain.steps,
    )
    found = {
        "predicted_progressive": f"{few:.2f}",
        "predicted_archive": f"{fewest:.2f}",
    }
    height, width, channels = images.shape[1:]
    shape, about = (height, width, channels), (about or {}) | found
    return Profile(shape, alphabet, seed, progressive, archive, about)


def alphabet_of(images: np.ndarray) -> np.ndarray:
    """Returns the values that occur, uint8, rising; all 256 where most of them do.

    >>> print(alphabet_of(np.array([3, 0, 3], np.uint8)))
    [0 3]
    """
    values = np.unique(images)
    return values if len(values) <= 128 else np.arange(256, dtype=np.uint8)


def _scanned(log_alpha: np.ndarray, logsnr: np.ndarray) -> np.ndarray:
    """Returns times evenly spaced in log-SNR, from hardly any noise to nothing else."""
    noise = np.exp(-0.5 * logsnr)
    first = min(max(1, int(np.argmax(noise >= _NOISE[0]))), len(noise) - 1)
    # From x_t that are N(0, 1) within so many bits, whatever x0 is.
    little = log_alpha < 0.5 * np.log(2 * np.log(2) * _PRIOR)
    last = int(np.argmax(little)) if little.any() else len(noise) - 1
    wanted = np.linspace(logsnr[first], logsnr[max(first, last)], SCANNED)
    rising = np.arange(len(logsnr))
    places = np.interp(-wanted, -logsnr[1:], rising[1:])
    return np.unique(np.rint(places).astype(np.int64))


def _scan(
    denoise: Callable[[np.ndarray, float], np.ndarray],
    log_alpha: np.ndarray,
    logsnr: np.ndarray,
    times: np.ndarray,
    images: np.ndarray,
    alphabet: np.ndarray,
    seed: int,
    batch_size: int,
    tick: Callable[[int], object],
) -> Scan:
    levels = alphabet / 127.5 - 1
    middles = 0.5 * (levels[1:] + levels[:-1])
    x0 = images.reshape(len(images), -1) / 127.5 - 1
    # Those outside an alphabet are the business of a file.
    symbols = np.minimum(np.searchsorted(alphabet, images), len(alphabet) - 1)
    symbols = symbols.reshape(x0.shape)
    rng = np.random.default_rng(seed)
    errors, each, pixels, parts = [], [], [], []
    for t in times:
        alpha, sigma = np.exp(log_alpha[t]), np.exp(log_alpha[t] - 0.5 * logsnr[t])
        seen = np.empty_like(x0)
        for first in range(0, len(x0), batch_size):
            clean = x0[first : first + batch_size]
            noisy = alpha * clean + sigma * rng.standard_normal(clean.shape)
            padded = np.pad(noisy, ((0, batch_size - len(clean)), (0, 0)), "edge")
            found = denoise(padded.reshape(-1, *images.shape[1:]), int(t))
            flat = np.clip(np.asarray(found, np.float64), -1, 1).reshape(padded.shape)
            seen[first : first + batch_size] = flat[: len(clean)]
            tick(len(clean))
        if not np.isfinite(seen).all():
            raise DataError(
                f"the network must predict finite values; got others at t = {t}. "
                "Train it again, or take an earlier checkpoint."
            )
        square = np.square(x0 - seen)
        errors.append(np.maximum(square.mean(axis=0), _SMALLEST))
        kind = bins.texture(np.rint(seen * ONE), images.shape[1:])
        parts.append(_deviations(square, kind))
        code = Pixels(seen, parts[-1][0] * parts[-1][1][kind], middles)
        each.append(square.sum(axis=1))
        pixels.append(bits_of(code.interval(symbols)[1]).sum(axis=1))
    sd, textures = zip(*parts, strict=True)
    return Scan(times, *map(np.array, (errors, each, pixels, sd, textures)))


def _deviations(square: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns deviations of dimensions, [D], and factors of textures, [TEXTURES].

    The likeliest of Gaussian errors with these squares and textures, [N, D] both, found
    by turns.
    """
    count = np.bincount(kind.ravel(), minlength=TEXTURES)
    own = square.mean(axis=0) + _SMALLEST
    for _ in range(_TURNS):
        # As if each texture had been seen once more, with an error as usual.
        ratio = np.bincount(kind.ravel(), (square / own).ravel(), TEXTURES)
        factor = (ratio + 1) / (count + 1)
        own = (square / factor[kind]).mean(axis=0) + _SMALLEST
    # So that a factor is 1 where an error is as large as that of its dimension.
    mean = square.mean() / own.mean()
    return np.sqrt(own * mean), np.sqrt(factor / mean)


def bits_of(freq: np.ndarray) -> np.ndarray:
    """Returns the bits that symbols of these frequencies take.

    >>> print(bits_of(np.array([2**24, 2**23])))
    [-0.  1.]
    """
    return -np.log2(freq / TOTAL)


def _chains(
    scan: Scan, log_alpha: np.ndarray, logsnr: np.ndarray, seed: int
) -> list[tuple[Chain, int]]:
    """Returns all chains that come into question, and where in the scan they end."""
    noise = np.exp(-0.5 * logsnr[scan.times])
    possible = np.flatnonzero(noise[:-1] <= _NOISE[1])
    possible = possible if len(possible) else np.arange(1)
    picked = np.linspace(0, len(possible) - 1, ENDS).astype(int)
    return [
        (_chain(scan, log_alpha, logsnr, int(end), steps, seed), int(end))
        for end in possible[np.unique(picked)]
        for steps in STEPS
    ]


def _best(
    sized: list[tuple[Chain, float]], first: Callable[[Chain], int]
) -> tuple[Chain, float]:
    """Returns the best chain of those with about the smallest files, and their bits.

    In the best, `first` is small. A progressive file has its pixels late, where a cut
    is finer; an archive few evaluations.
    """
    least = min(bits for _, bits in sized)
    good = [(chain, bits) for chain, bits in sized if bits <= (1 + NEAR) * least]
    return min(good, key=lambda found: (first(found[0]), found[1]))


def _late(scan: Scan, logsnr: np.ndarray, end: int) -> float:
    """Returns the bits of an image's pixels at the end of a progressive file's steps.

    Every image has as many symbols as others. One that holds more than they do comes
    as far as so much of its own information leads, and is seen from there.
    """
    snr = logsnr[scan.times]
    density = 0.5 * scan.each * np.exp(snr)[:, None]
    pieces = 0.5 * (density[1:] + density[:-1]) * -np.diff(snr)[:, None]
    # Information from x_T on, up to each time: the last is first.
    gone = np.concatenate([np.zeros_like(pieces[:1]), pieces[::-1].cumsum(axis=0)])
    given = gone[len(snr) - 1 - end].mean()
    both = zip(gone.T, scan.pixels[::-1].T, strict=True)
    return float(np.mean([np.interp(given, own, bits) for own, bits in both]))


def rates_of(chain: Chain) -> np.ndarray:
    """Returns the mean information of each step and dimension in bits, [n, D]."""
    return np.asarray(np.log2(chain.sd / np.sqrt(chain.small)[:, None]))


def _chain(
    scan: Scan,
    log_alpha: np.ndarray,
    logsnr: np.ndarray,
    end: int,
    steps: int,
    seed: int,
) -> Chain:
    """Returns the chain of some steps that ends at a time that was looked at."""
    snr = logsnr[scan.times]
    density = 0.5 * scan.errors.sum(axis=1) * np.exp(snr)
    pieces = 0.5 * (density[1:] + density[:-1]) * -np.diff(snr)
    gone = np.concatenate([[0.0], np.cumsum(pieces[end:])])
    shares = np.interp(np.linspace(0, gone[-1], steps + 1), gone, -snr[end:])
    places = np.interp(shares, -logsnr[1:], np.arange(1, len(logsnr)))
    times = np.unique(np.rint(places).astype(np.int64))
    logs = np.log(scan.errors).T
    errors = np.exp([np.interp(-logsnr[times], -snr, each) for each in logs]).T
    chain = chain_of(log_alpha, logsnr, times, errors, seed=seed)
    return chain._replace(pixel_sd=scan.sd[end], texture=scan.texture[end])


def chain_of(
    log_alpha: np.ndarray,
    logsnr: np.ndarray,
    times: np.ndarray,
    errors: np.ndarray,
    *,
    seed: int = 0,
) -> Chain:
    """Returns the chain of some times.

    Args:
      log_alpha: of the schedule, for t = 0..T, float64 [T + 1].
      logsnr: the same.
      times: rising, int64 [n + 1].
      errors: V_t at these times, float64 [n + 1, D].
      seed: of which dimensions are in one symbol.
    """
    la, ls = log_alpha[times], logsnr[times]
    alpha, sigma = np.exp(la), np.exp(la - 0.5 * ls)
    fall = np.diff(ls)
    kept = -np.expm1(fall)
    small = sigma[:-1] ** 2 * kept
    c0 = alpha[:-1] * kept
    sd = np.sqrt(small[:, None] + c0[:, None] ** 2 * errors[1:])
    fine = np.concatenate([sigma[:1], sigma[1:] * np.sqrt(kept)])
    fine[:-1] = np.minimum(fine[:-1], np.sqrt(small))
    chain = Chain(
        times=times,
        alpha=alpha,
        sigma=sigma,
        c0=c0,
        ct=np.exp(la[:-1] - la[1:] + fall),
        small=small,
        sd=sd,
        pixel_sd=np.sqrt(errors[0]),
        texture=np.ones(TEXTURES),
        delta_bits=np.maximum(0, -np.floor(np.log2(fine / _FINER))).astype(np.int64),
        chunk=np.zeros(sd.shape, np.int64),
        bits=np.zeros(len(c0), np.int64),
    )
    rates = rates_of(chain)
    total = rates.sum(axis=1)
    counts = np.clip(np.ceil(total / _SYMBOL), 1, sd.shape[1]).astype(np.int64)
    bits = np.clip(np.rint(total / counts) + _SPARE, 1, MOST_BITS).astype(np.int64)
    rng = np.random.default_rng(seed)
    parts = [_chunks(*each, rng) for each in zip(rates, counts, strict=True)]
    return chain._replace(chunk=np.array(parts), bits=bits)


def _chunks(rates: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns for each dimension its symbol; all have about the same information.

    Dealt from the largest rate down, there and back: 0, 1, 2, 2, 1, 0, 0, ...
    """
    order, chunk = rng.permutation(len(rates)), np.zeros(len(rates), np.int64)
    turn = np.arange(len(rates)) % (2 * count)
    order = order[np.argsort(-rates[order], kind="stable")]
    chunk[order] = np.minimum(turn, 2 * count - 1 - turn)
    return chunk
