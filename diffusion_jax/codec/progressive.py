"""Files that may be cut after any bit, and are lossless if whole.

From the noise x_n, the same for all, the chain goes down to x_0. Each step has a few
symbols: the number of the row of a table of noise that moves its dimensions best
towards where x_i would be if x0 were known, q(x_i | x_{i+1}, x0):

  log w_k = sum_d A_d z_kd^2 + B_d z_kd,  A = (1 - s^2/small)/2, B = s (mu_q - mu)/small

the logarithm of q / p at row k. Two rules choose a row (who reads need not know):

  max   the largest w. The best reconstruction for the bits.
  mrc   k drawn in proportion to w: minimal random coding (Havasi et al. 2019),
        which Sec. 4.3 of Ho et al. 2020 assumes. x_i is a sample of q.

What is left, the pixels seen from x_0, follows in a range coder; those of which the
network is least sure come first. Every image has as many symbols, so x_0 is far from
those that hold more than others: how far stands in front of all pixels. All is one
string of bits: step by step, of all images each, so that whatever is cut off, is cut
off all alike.
"""

from typing import Literal

import numpy as np

from diffusion_jax.codec import container, noise, ranges, steps
from diffusion_jax.codec.bins import TOTAL, Pixels
from diffusion_jax.codec.certified import NONE, ONE, Denoise64, joined
from diffusion_jax.codec.container import Decoded
from diffusion_jax.codec.profile import Chain, Profile
from diffusion_jax.codec.steps import UNIT, Tick, View
from diffusion_jax.errors import raise_unknown

Rule = Literal["max", "mrc"]
Show = Literal["mean", "sample", "flow"]
RULES, SHOWS = ("max", "mrc"), ("mean", "sample", "flow")
SCALES = np.ldexp([1.0, 1.5], np.arange(-2, 6)[:, None]).ravel()
"""Of an image's errors, as multiples of those of the profile."""
_AGAIN = 8
"""How much likelier a scale becomes each time that an image has it."""
_SLAB = 2**22
"""Numbers of a table of noise that are looked at together."""


def encode(
    profile: Profile,
    denoise: Denoise64,
    images: np.ndarray,
    *,
    rule: Rule = "max",
    batch_size: int = 64,
    tick: Tick = steps.silent,
) -> bytes:
    """Returns the file of some images.

    Args:
      profile: of the network.
      denoise: the network, in float64.
      images: uint8 [N, H, W, C].
      rule: how a row of noise is chosen.
      batch_size: images that the network is given at a time.
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: images of another shape or type, or none.
      ValueError: an unknown rule, or a network that is not in float64.
    """
    if rule not in RULES:
        raise_unknown("rule", rule, RULES)
    chain, parts = profile.progressive, steps.split(profile, images)
    view = View(profile, chain, denoise, batch_size, found=[], tick=tick)
    count, size = parts.symbols.shape
    rng = np.random.default_rng(profile.seed)
    bits = np.zeros((count, planes(chain)[-1]), np.uint8)
    clean = np.zeros((count, size), np.int16)
    levels = profile.levels
    for first in range(0, count, batch_size):
        these = np.arange(first, min(first + batch_size, count))
        x0 = levels[parts.symbols[these]]
        x, column = _begin(profile, len(these)), 0
        for i in reversed(range(chain.steps)):
            mu = steps.mean(chain, i, x, view.clean(x, i + 1, these))
            mu_q = chain.c0[i] * x0 + chain.ct[i] * x
            z = np.zeros_like(mu)
            for j in range(chain.chunks[i]):
                columns = np.flatnonzero(chain.chunk[i] == j)
                k = choose(profile, i, j, columns, (mu_q - mu)[:, columns], rule, rng)
                z[:, columns] = noise_of(profile, i, j, k, len(columns))
                width = int(chain.bits[i])
                shifts = np.arange(width - 1, -1, -1)
                bits[these, column : column + width] = k[:, None] >> shifts & 1
                column += width
            x = _moved(chain, i, mu, z)
        clean[these] = view.clean(x, 0, these)
    tail = _write_pixels(profile, parts.symbols, clean)
    flat = [each.ravel() for each in np.split(bits, planes(chain)[1:-1], axis=1)]
    flat.append(np.unpackbits(np.frombuffer(tail, np.uint8)))
    payload = np.packbits(np.concatenate(flat)).tobytes()
    listed = joined(view.found or [NONE])
    return container.packed("progressive", profile, images, parts, listed, payload)


def decode(
    profile: Profile,
    denoise: Denoise64,
    data: bytes,
    *,
    show: Show = "mean",
    bits: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    tick: Tick = steps.silent,
) -> Decoded:
    """Returns the images of a file, or what a part of it says of them.

    Args:
      profile: that the file was made with.
      denoise: its network, in float64.
      data: the file, of which the end may be missing.
      show: what stands for bits that are missing: the mean that the network sees, a
        sample, or where the probability flow leads.
      bits: of the payload to look at; all that there are when not given.
      seed: of samples.
      batch_size: images that the network is given at a time; any will do.
      tick: called with the number of images after each evaluation.

    Raises:
      DataError: no such file, another profile's, cut in its header, or damaged.
      ValueError: an unknown `show`, or a network that is not in float64.
    """
    if show not in SHOWS:
        raise_unknown("show", show, SHOWS)
    file = container.opened(data, profile)
    size = int(np.prod(profile.shape))
    if file.layout != "progressive":
        return container.other("progressive", file, profile)
    chain = profile.progressive
    steps_end = file.number * int(planes(chain)[-1])
    if 8 * file.length < steps_end:
        raise container.damaged(f"{file.length:,} bytes for all symbols of its images")
    there = 8 * len(file.payload)
    used = there if bits is None else min(bits, there)
    view = View(profile, chain, denoise, batch_size, file.listed, tick=tick)
    clean = np.zeros((file.number, size), np.int16)
    depth = np.zeros(file.number, np.int64)
    rng = np.random.default_rng(seed)
    stream = np.unpackbits(np.frombuffer(file.payload, np.uint8))[:used]
    for first in range(0, file.number, batch_size):
        these = np.arange(first, min(first + batch_size, file.number))
        x, depth[these] = _walk(view, stream, these, file.number)
        clean[these] = _shown(view, x, depth[these], these, show, rng)
    flat = np.rint(clean * (127.5 / ONE) + 127.5).astype(np.uint8)
    exact = 0
    if used >= steps_end:
        scaled = file.version > 1
        exact = _read_pixels(profile, stream[steps_end:], clean, flat, scaled)
    flat.reshape(-1)[file.place] = file.value
    images = flat.reshape(-1, *profile.shape)
    if file.whole and used == there:
        return container.checked(images, file)
    return Decoded(images, False, depth, exact)


def planes(chain: Chain) -> np.ndarray:
    """Returns the bits of an image after 0, 1, ..., n steps, int64 [n + 1]."""
    return np.append(0, np.cumsum((chain.chunks * chain.bits)[::-1]))


def choose(
    profile: Profile,
    i: int,
    j: int,
    columns: np.ndarray,
    apart: np.ndarray,
    rule: Rule,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns the row of noise that symbol j of step i is for each image, int64 [B].

    Of its dimensions, the columns, mu_q - mu is given, [B, columns].
    """
    chain = profile.progressive
    s, rows = chain.sd[i, columns], 1 << int(chain.bits[i])
    square = (0.5 * (1 - s**2 / chain.small[i])).astype(np.float32)
    line = (s * apart / chain.small[i]).astype(np.float32).T
    best, found = np.full(len(apart), -np.inf), np.zeros(len(apart), np.int64)
    slab = max(1, _SLAB // max(len(columns), len(apart)))
    for first in range(0, rows, slab):
        count = min(slab, rows - first)
        table = noise.rows(profile.seed, i, j, first, count, len(columns))
        z = table.astype(np.float32) * np.float32(UNIT)
        score = (z**2 @ square)[:, None] + z @ line
        if rule == "mrc":
            score = score + rng.gumbel(size=score.shape)
        place = np.argmax(score, axis=0)
        top = np.take_along_axis(score, place[None], 0)[0]
        found = np.where(top > best, first + place, found)
        best = np.maximum(best, top)
    return found


def _begin(profile: Profile, count: int) -> np.ndarray:
    """Returns x_n, the same for all images, [count, D]."""
    size = int(np.prod(profile.shape))
    row = noise.rows(profile.seed, profile.progressive.steps, 0, 0, 1, size)
    return np.repeat(np.multiply(row, UNIT), count, axis=0)


def _moved(chain: Chain, i: int, mu: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Returns x_i, a multiple of 2^-20."""
    x = np.add(mu, np.multiply(z, chain.sd[i]))
    return np.multiply(np.rint(np.multiply(x, 1 / UNIT)), UNIT)


def noise_of(profile: Profile, i: int, j: int, k: np.ndarray, width: int) -> np.ndarray:
    """Returns rows of the table of symbol j of step i, [len(k), width]."""
    each = [noise.rows(profile.seed, i, j, int(row), 1, width)[0] for row in k]
    return np.multiply(np.array(each).reshape(len(k), width), UNIT)


def _walk(
    view: View, stream: np.ndarray, these: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the last x of some of all images that the bits lead to, and its place."""
    profile, chain = view.profile, view.chain
    x, depth = _begin(profile, len(these)), np.full(len(these), chain.steps)
    before = planes(chain)[::-1]
    for i in reversed(range(chain.steps)):
        width, symbols = int(chain.bits[i]), int(chain.chunks[i])
        begin = count * before[i + 1] + these * symbols * width
        arrived = np.clip((len(stream) - begin) // width, 0, symbols)
        # The others wait at the place above.
        go = np.flatnonzero(arrived)
        if not len(go):
            break
        mu = steps.mean(chain, i, x[go], view.clean(x[go], i + 1, these[go]))
        z = np.zeros_like(mu)
        for j in range(symbols):
            # A symbol that did not arrive leaves the mean.
            has = np.flatnonzero(arrived[go] > j)
            where = begin[go[has], None] + j * width + np.arange(width)
            k = stream[where].astype(np.int64) @ (1 << np.arange(width)[::-1])
            columns = np.flatnonzero(chain.chunk[i] == j)
            z[np.ix_(has, columns)] = noise_of(profile, i, j, k, len(columns))
        x[go], depth[go] = _moved(chain, i, mu, z), i
    return x, depth


def _shown(
    view: View,
    x: np.ndarray,
    depth: np.ndarray,
    these: np.ndarray,
    show: Show,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns what stands for the images, in units of 2^-12, int64 [B, D].

    Those whose x_0 is known are what the network sees in it, whatever is shown.
    """
    chain, out = view.chain, np.zeros(x.shape, np.int64)
    x = x.copy()
    for i in reversed(range(1, chain.steps + 1)):
        here = np.flatnonzero(depth >= i)
        if show == "mean":
            here = np.flatnonzero(depth == i)
        if not len(here):
            continue
        clean = view.clean(x[here], i, these[here])
        if show == "mean":
            out[here] = clean
        elif show == "sample":
            z = rng.standard_normal(clean.shape)
            x[here] = steps.mean(chain, i - 1, x[here], clean) + chain.sd[i - 1] * z
        else:
            x0 = clean / ONE
            eps = (x[here] - chain.alpha[i] * x0) / chain.sigma[i]
            x[here] = chain.alpha[i - 1] * x0 + chain.sigma[i - 1] * eps
    last = np.flatnonzero(depth == 0) if show == "mean" else np.arange(len(x))
    if len(last):
        out[last] = view.clean(x[last], 0, these[last])
    return out


def _order(profile: Profile) -> np.ndarray:
    """Returns the dimensions, those of the largest error first."""
    return np.argsort(-profile.progressive.pixel_sd, kind="stable")


def _column(code: Pixels, d: int) -> Pixels:
    """Returns the distribution of dimension d of all images, [N, 1]."""
    return code._replace(mean=code.mean[:, d : d + 1], sd=code.sd[:, d : d + 1])


def _scale(code: Pixels, symbols: np.ndarray, image: int) -> int:
    """Returns which of SCALES codes an image with the fewest bits."""
    tried = Pixels(code.mean[image], code.sd[image] * SCALES[:, None], code.middles)
    every = np.broadcast_to(symbols[image], tried.sd.shape)
    # The largest product of frequencies.
    return int(np.log2(tried.interval(every)[1]).sum(axis=1).argmax())


def _scale_edges(counts: np.ndarray) -> list[int]:
    """Returns the intervals of SCALES where each was met so often before."""
    edges = TOTAL * np.append(0, np.cumsum(counts)) // counts.sum()
    return [int(edge) for edge in edges]


def _write_pixels(profile: Profile, symbols: np.ndarray, clean: np.ndarray) -> bytes:
    writer, counts = ranges.Writer(), np.ones(len(SCALES), np.int64)
    code = steps.pixels(profile, profile.progressive, clean)
    for image in range(len(symbols)):
        k, edges = _scale(code, symbols, image), _scale_edges(counts)
        writer.write(edges[k], edges[k + 1] - edges[k])
        counts[k] += _AGAIN
        code.sd[image] *= SCALES[k]
    for d in _order(profile):
        start, freq = _column(code, d).interval(symbols[:, d : d + 1])
        for one in zip(start[:, 0].tolist(), freq[:, 0].tolist(), strict=True):
            writer.write(*one)
    return writer.finish()


def _read_pixels(
    profile: Profile,
    bits: np.ndarray,
    clean: np.ndarray,
    flat: np.ndarray,
    scaled: bool,
) -> int:
    """Puts those pixels in place that the bits determine; returns how many."""
    reader, exact = ranges.Reader(np.packbits(bits).tobytes(), len(bits)), 0
    code = steps.pixels(profile, profile.progressive, clean)
    counts = np.ones(len(SCALES), np.int64)
    for image in range(len(clean) if scaled else 0):
        k = reader.read(_scale_edges(counts))
        if k is None:
            return exact
        counts[k] += _AGAIN
        code.sd[image] *= SCALES[k]
    every = np.arange(len(profile.alphabet) + 1)[None]
    for d in _order(profile):
        edges = _column(code, d).edge(every)
        for image, row in enumerate(edges.tolist()):
            symbol = reader.read(row)
            if symbol is None:
                return exact
            flat[image, d] = profile.alphabet[symbol]
            exact += 1
    return exact
