"""Files that may be cut: their rate, their error, and how noise is chosen."""

import codec_toys
import numpy as np
import pytest
from scipy import special, stats

from diffusion_jax.codec import fitting, progressive, steps
from diffusion_jax.codec.sizes import sizes

TIMES = [12, 30, 50, 75, 100, 130, 160, 194]


def test_rates_are_shannons_on_gaussian_data_whatever_the_times():
    """KL_i = I(x_i; x0 | x_{i+1}): rates to t add up to 1/2 log2(1 + S^2 SNR(t))."""
    scale = np.array([0.3, 0.05, 0.2, 0.1])
    for times in (TIMES, [12, 194], [12, 13, 150, 194]):
        profile, _ = codec_toys.gaussian(scale, times, (2, 2, 1))
        rates = fitting.rates_of(profile.archive)
        snr = codec_toys.SNR[np.asarray(times)][:, None]
        wanted = 0.5 * np.log2((1 + scale**2 * snr[:-1]) / (1 + scale**2 * snr[1:]))
        np.testing.assert_allclose(rates, wanted, rtol=1e-6)


def test_sizes_are_those_of_the_profile_on_its_data():
    shape = (4, 4, 1)
    profile, denoise = codec_toys.gaussian(0.25, TIMES, shape)
    rng = np.random.default_rng(0)
    images = codec_toys.gaussian_images(rng, 2000, 0.25, shape)
    found = sizes(profile, denoise, images, seed=1)
    wanted = fitting.rates_of(profile.archive).sum(axis=1)
    np.testing.assert_allclose(found.rates.mean(axis=1), wanted, rtol=0.03)
    assert 0 <= found.prior.mean() < 0.01
    # Gaussian pixels of so much noise in bins of 1 / 127.5, in bits.
    noise = profile.archive.pixel_sd[0]
    pixels = 16 * np.log2(noise * 127.5 * np.sqrt(2 * np.pi * np.e))
    assert found.pixels.mean() == pytest.approx(pixels, rel=0.02)
    assert found.total.mean() == pytest.approx(
        (found.prior + found.rates.sum(axis=0) + found.pixels).mean()
    )


def useful(bits, size):
    """Bits of Shannon's curve that the nearest of 2^bits random directions is worth.

    The cosine of its angle to the image has the distribution function (1 - q)^K, where
    1 - cos^2 of one is a beta variable; 1 - E[cos^2] of the error is left.
    """
    cosine = np.linspace(0, 1, 20_001)
    tail = 0.5 * special.betainc((size - 1) / 2, 0.5, 1 - cosine**2)
    beyond = -np.expm1(2.0**bits * np.log1p(-tail))
    return -size / 2 * np.log2(1 - np.trapezoid(2 * cosine * beyond, cosine))


def test_the_largest_weight_is_as_near_to_shannons_curve_as_its_rows_allow():
    """14 bits are worth 11.5, as the best of 2^14 rows is no nearer."""
    shape, bits, count = (16, 16, 1), 14, 48
    profile, denoise = codec_toys.gaussian(0.25, [62, 74, 97, 194], shape, symbol=bits)
    chain = profile.progressive
    np.testing.assert_allclose(fitting.rates_of(chain).sum(axis=1), 12, atol=0.5)
    chain = chain._replace(chunk=np.zeros_like(chain.chunk))
    profile = profile._replace(progressive=chain)
    images = codec_toys.gaussian_images(np.random.default_rng(1), count, 0.25, shape)
    data = progressive.encode(profile, denoise, images)
    assert useful(bits, 256) == pytest.approx(11.50, abs=0.01)
    for done in (1, 2, 3):
        found = progressive.decode(profile, denoise, data, bits=count * done * bits)
        error = np.square((found.images - images.astype(float)) / 127.5).mean()
        shannon = 128 * np.log2(np.square(images / 127.5 - 1).mean() / error)
        assert shannon == pytest.approx(done * useful(bits, 256), rel=0.02)


@pytest.mark.parametrize("rule", progressive.RULES)
def test_a_chosen_row_is_a_draw_of_the_posterior(rule):
    """Of q by mrc, within Kolmogorov-Smirnov; not by max, which is no draw."""
    profile, _ = codec_toys.gaussian(0.5, [60, 190], (1, 1, 1), symbol=9)
    chain, rng = profile.progressive, np.random.default_rng(0)
    s, small = chain.sd[0, 0], chain.small[0]
    apart = 1.5 * np.sqrt(small)
    drawn = []
    for seed in range(600):
        own = profile._replace(seed=seed)
        k = progressive.choose(own, 0, 0, np.array([0]), np.array([[apart]]), rule, rng)
        assert 0 <= k[0] < 512
        row = progressive.noise_of(own, 0, 0, k, 1)
        drawn.append((s * row[0, 0] - apart) / np.sqrt(small))
    sure = stats.kstest(drawn, "norm").pvalue
    assert (sure < 1e-6) if rule == "max" else (sure > 0.01)


@pytest.mark.parametrize("rule", progressive.RULES)
def test_a_cut_after_any_bit_is_read_and_the_error_falls(rule):
    shape = (4, 4, 1)
    profile, denoise = codec_toys.five([50, 90, 140, 196], shape)
    images = codec_toys.five_images(np.random.default_rng(0), 3, shape)
    data = progressive.encode(profile, denoise, images, rule=rule)
    errors, exact = [], []
    whole = progressive.decode(profile, denoise, data)
    assert whole.whole
    np.testing.assert_array_equal(whole.images, images)
    bits = 8 * (len(data) - 20)
    for cut in range(bits + 1):
        found = progressive.decode(profile, denoise, data, bits=cut, batch_size=4)
        errors.append(np.square(found.images - images.astype(float)).mean())
        exact.append(found.exact)
        assert set(found.depth) <= {found.depth.min(), found.depth.min() + 1}
    # It may rise where a symbol moves an image away from what it was, for a while.
    best = np.minimum.accumulate(errors)
    assert np.max(np.sqrt(errors) - np.sqrt(best)) < 25
    assert errors[0] > 4000
    assert errors[-1] == 0
    assert (np.diff(exact) >= 0).all()
    assert errors[bits // 2] < errors[0] / 2
    for end in range(18, len(data)):
        found = progressive.decode(profile, denoise, data[:end])
        assert not found.whole


def test_an_image_far_from_its_x_0_says_how_far():
    """Errors of three times the deviation cost log2 3 bits a pixel, not 5 and more."""
    rng, size = np.random.default_rng(0), 4096
    profile, _ = codec_toys.gaussian(0.2, [60, 190], (64, 64, 1))
    code = steps.pixels(profile, profile.progressive, np.zeros((2, size), np.int64))
    x0 = rng.standard_normal((2, size)) * code.sd * [[1], [3]]
    symbols = np.searchsorted(profile.middles, x0)
    found = [progressive._scale(code, symbols, image) for image in range(2)]
    np.testing.assert_array_equal(progressive.SCALES[found], [1, 3])


@pytest.mark.parametrize("show", progressive.SHOWS)
def test_what_is_missing_is_shown_as_asked(show):
    shape = (8, 8, 1)
    profile, denoise = codec_toys.five([50, 80, 110, 140, 196], shape)
    images = codec_toys.five_images(np.random.default_rng(0), 4, shape)
    data = progressive.encode(profile, denoise, images)
    bits = 4 * int(progressive.planes(profile.progressive)[2])
    read = [
        progressive.decode(profile, denoise, data, bits=bits, show=show, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert (read[0].depth == 2).all()
    np.testing.assert_array_equal(read[0].images, read[1].images)
    assert (read[0].images == read[2].images).all() == (show != "sample")
    # A mean is grey where it is not sure; the others choose a value.
    far = np.abs(read[0].images[..., None] - codec_toys.VALUES.astype(int)).min(-1)
    assert (far.mean() > 15) == (show == "mean")
