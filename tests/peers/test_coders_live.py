"""constriction's coders, where that is installed, take as many bits as ours."""

import numpy as np
import pytest

from diffusion_jax.codec import ranges, rans
from diffusion_jax.codec.bins import Grid

stream = pytest.importorskip("constriction").stream


def test_symbols_take_what_coders_of_others_take():
    rng, count = np.random.default_rng(0), 4000
    mean, sd = rng.normal(size=count), np.exp(rng.uniform(-3, 0, count))
    code = Grid(mean, sd, 1 / 16, True)
    k = np.rint(16 * (mean + sd * rng.standard_normal(count))).astype(np.int64)
    start, freq = code.interval(k)
    stack, writer = rans.start(1), ranges.Writer()
    before = np.log2(float(stack.heads[0]))
    for one in zip(start, freq, strict=True):
        rans.push(stack, *np.reshape(one, (2, 1)))
        writer.write(*map(int, one))
    ours = np.log2(float(stack.heads[0])) - before + 32 * stack.size
    theirs = stream.stack.AnsCoder(), stream.queue.RangeEncoder()
    model = stream.model.QuantizedGaussian(-code.most, code.most)
    theirs[0].encode_reverse(k.astype(np.int32), model, 16 * mean, 16 * sd)
    theirs[1].encode(k.astype(np.int32), model, 16 * mean, 16 * sd)
    bits = (24 - np.log2(freq)).sum()
    assert bits > 12_000
    for found, other in zip((ours, 8 * len(writer.finish())), theirs, strict=True):
        assert abs(found - bits) < 16
        assert abs(found - other.num_bits()) < 64
