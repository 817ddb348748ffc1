"""Symbols to bits and back: stacks, the range coder, intervals."""

import codec_toys
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.codec import archive, container, ranges, rans
from diffusion_jax.codec.bins import TOTAL, Grid, Pixels


def random_grid(rng, width, *, leak):
    sd = np.exp(rng.uniform(-4, 1, width))
    return Grid(rng.normal(size=width), sd, 2.0 ** -rng.integers(0, 7), leak)


@given(st.integers(0, 2**32), st.sampled_from([1, 4, 16]), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_what_was_pushed_and_popped_is_undone_in_reverse(seed, lanes, count):
    rng = np.random.default_rng(seed)
    stack = rans.start(lanes, seed)
    stack.words = rng.integers(0, 2**32, 25 * count * lanes, dtype=np.uint32)
    stack.size = stack.least = len(stack.words)
    first, before = stack.heads.copy(), weight(stack)
    done, bits = [], 0.0
    for _ in range(count):
        width = rng.integers(1, lanes + 1)
        leak = bool(rng.integers(2))
        code = random_grid(rng, width, leak=leak)
        if leak:
            k = rng.integers(-code.most, code.most + 1, width)
            rans.push(stack, *code.interval(k))
        else:
            k = rans.pop(stack, width, code.find)
        done.append((code, k))
        sign = 1 if leak else -1
        bits += sign * (24 - np.log2(code.interval(k)[1])).sum()
    assert abs(weight(stack) - before - bits) < 0.02 * count + 1
    words = stack.words[stack.least : stack.size]
    reader = rans.opened(stack.heads, words, stack.count)
    for code, k in reversed(done):
        if code.leak:
            found = rans.pop(reader, len(k), code.find)
            np.testing.assert_array_equal(found, k)
        else:
            rans.push(reader, *code.interval(k))
    np.testing.assert_array_equal(reader.heads, first)
    assert reader.count == 0


def weight(stack):
    """Bits that a stack holds."""
    return np.log2(stack.heads.astype(float)).sum() + 32 * stack.size


def test_noise_that_is_popped_is_uniform_and_no_copy_of_what_was_pushed():
    rng = np.random.default_rng(0)
    stack = rans.start(64)
    even = lambda at: (at >> 16, at >> 16 << 16, np.full_like(at, 1 << 16))  # noqa: E731
    pushed, popped = [], []
    code = Grid(np.zeros(64), np.full(64, 0.5), 1 / 64, True)
    for _ in range(600):
        k = np.rint(32 * rng.standard_normal(64)).astype(np.int64)
        start, freq = code.interval(k)
        rans.push(stack, start, freq)
        pushed.append((start + 0.5 * freq) / TOTAL)
        popped.append(rans.pop(stack, 64, even))
    noise = np.array(popped)
    counts = np.bincount(noise.ravel(), minlength=256)
    expected = noise.size / 256
    chi = ((counts - expected) ** 2 / expected).sum()
    assert 255 - 4 * np.sqrt(510) < chi < 255 + 4 * np.sqrt(510)
    before, after = np.ravel(pushed), noise.ravel()
    assert abs(np.corrcoef(before, after)[0, 1]) < 0.02
    assert abs(np.corrcoef(after[:-64], after[64:])[0, 1]) < 0.02


def test_damaged_stacks_are_refused(refuses):
    with refuses("a head outside"):
        rans.opened(np.full(2, 5, np.uint64), np.zeros(1, np.uint32), 1)
    reader = rans.opened(np.full(1, 2**31, np.uint64), np.zeros(0, np.uint32), 9)
    with refuses("fewer words"):
        rans.pop(reader, 1, lambda at: (at, at, np.ones_like(at)))
    with refuses("never drawn"):
        rans.push(reader, np.zeros(1, int), np.zeros(1, int))


def test_a_stack_begins_random():
    """Or the first that is popped is the same in all lanes."""
    find = lambda at: (at >> 14, at >> 14 << 14, np.full_like(at, 1 << 14))  # noqa: E731
    stack = rans.start(512, 3)
    first = rans.pop(stack, 512, find)
    assert stack.least < stack.size + 512 == len(stack.words)
    for drawn in (first, rans.pop(stack, 512, find)):
        counts = np.bincount(drawn >> 6, minlength=16)
        assert counts.min() > 10
        assert len(np.unique(drawn)) > 350
    assert not (first == rans.pop(rans.start(512, 4), 512, find)).all()


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 12)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_range_coder_gives_back_all_that_its_bytes_determine(drawn):
    writer, symbols, bits = ranges.Writer(), [], 0.0
    for seed, count in drawn:
        rng = np.random.default_rng(seed)
        inner = rng.integers(1, TOTAL, count - 1) >> rng.integers(0, 20, count - 1)
        edges = [0, *np.unique(inner[inner > 0]).tolist(), TOTAL]
        symbol = int(rng.integers(len(edges) - 1))
        freq = edges[symbol + 1] - edges[symbol]
        writer.write(edges[symbol], freq)
        symbols.append((edges, symbol))
        bits += 24 - np.log2(freq)
    data = writer.finish()
    assert 8 * len(data) <= bits + 9
    more = np.random.default_rng(len(data)).integers(0, 256, 9).astype(np.uint8)
    # Whatever follows, and nothing at all, change nothing.
    for follows in (b"", more.tobytes(), b"\xff" * 9):
        reader = ranges.Reader(data + follows)
        assert [reader.read(edges) for edges, _ in symbols] == [s for _, s in symbols]
    known, bits = -1, np.unpackbits(np.frombuffer(data, np.uint8))
    for cut in range(8 * len(data) + 1):
        reader, count = ranges.Reader(np.packbits(bits[:cut]).tobytes(), cut), 0
        for edges, symbol in symbols:
            found = reader.read(edges)
            if found is None:
                break
            assert found == symbol
            count += 1
        assert count >= known
        known = count
    assert known == len(symbols)


def test_intervals_cover_all_and_are_found_again():
    rng = np.random.default_rng(1)
    middles = np.sort(rng.uniform(-1, 1, 30))
    pixels = Pixels(rng.uniform(-1, 1, (3, 5)), np.full((1, 5), 1 / 40), middles)
    grid = Grid(rng.normal(size=(3, 5)), np.full((1, 5), 1 / 3), 1 / 4, True)
    for code, low, high in ((grid, -32, 33), (pixels, 0, 31)):
        every = np.arange(low, high)[:, None, None]
        start, freq = code.interval(np.broadcast_to(every, (len(every), 3, 5)))
        assert freq.min() >= 1
        assert (freq.sum(axis=0) == TOTAL).all()
        assert (start[1:] == (start + freq)[:-1]).all()
        for at in (start, start + freq - 1):
            for k, row in zip(every.ravel(), at, strict=True):
                found, begin, length = code.find(row)
                assert (found == k).all()
                assert ((begin <= row) & (row < begin + length)).all()


def test_a_grid_that_codes_only_what_it_drew_has_empty_intervals():
    code = Grid(np.zeros((1, 1)), np.full((1, 1), 0.02), 1 / 64, False)
    assert code.interval(np.array([[300]]))[1] == 0
    leaking = code._replace(leak=True)
    assert leaking.interval(np.array([[300]]))[1] == 1


def test_an_archive_takes_what_the_bound_says():
    """Independent pixels of five values, with the exact posterior mean."""
    shape, count = (8, 4, 1), 512
    profile, denoise = codec_toys.five([30, 60, 100, 195], shape)
    images = codec_toys.five_images(np.random.default_rng(0), count, shape)
    each = codec_toys.bound_of_five(profile, denoise, profile.archive)
    bits = each[np.searchsorted(codec_toys.VALUES, images)]
    whole = archive.encode(profile, denoise, images[:128])
    found = archive.decode(profile, denoise, whole).images
    np.testing.assert_array_equal(found, images[:128])
    # Beyond the bound: 16 heads, header and checksum, and what the first image pops.
    assert 0 < 8 * len(whole) - bits[:128].sum() < 16 * 52 + 8 * 24 + 2 * 9 * 32
    with pytest.MonkeyPatch.context() as patch:
        # Both begin alike, and what is popped first is paid once.
        patch.setattr(archive, "_lanes", lambda *a: 16)
        patch.setattr(archive, "_PAID", count)
        data = [archive.encode(profile, denoise, images[:k]) for k in (16, count)]
        held = [
            weight(archive.stack_of(container.opened(one, profile), profile))
            for one in data
        ]
    assert held[1] - held[0] == pytest.approx(bits[16:].sum(), rel=0.005)
