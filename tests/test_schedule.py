"""Schedules against float64 tables in DDPM's own terms, at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from oracles import SCHEDULES, NumpyDDPM, T, betas_of

from diffusion_jax import continuous, gaussian, schedule

TIMES = np.arange(T + 1)
BOUND = {"float32": 1e-6, "float64": 1e-10}


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_at_every_step(name, precision):
    level, truth = SCHEDULES[name]()(TIMES), NumpyDDPM.named(name)
    # jsd ends in pure noise: alpha is 0 and log-SNR -inf, ours are as good as.
    finite = TIMES[truth.alphas_bar > 0][1:]
    assert len(finite) == (T - 1 if name == "jsd" else T)
    bound = BOUND[precision]
    np.testing.assert_allclose(level.alpha, truth.alphas, rtol=bound, atol=1e-16)
    np.testing.assert_allclose(level.sigma, truth.sigmas, rtol=bound)
    log_alpha_bar = np.log(truth.alphas_bar[finite])
    np.testing.assert_allclose(level.log_alpha[finite], 0.5 * log_alpha_bar, rtol=bound)
    # The log-SNR passes through zero, where only its absolute error means anything.
    logsnr = log_alpha_bar - np.log(truth.noise[finite])
    np.testing.assert_allclose(level.logsnr[finite], logsnr, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", SCHEDULES)
def test_data_have_no_noise(name):
    level = SCHEDULES[name]()(0)
    assert (level.alpha, level.sigma, level.logsnr) == (1, 0, np.inf)


def test_constants_of_the_paper(x64):
    level = schedule.linear()(TIMES)
    alpha_bar = np.square(level.alpha)
    assert abs(alpha_bar[1] - 0.9999) < 1e-12
    assert abs(alpha_bar[T] - 4.0358e-5) < 5e-10
    assert abs(level.logsnr[1] - 9.210) < 5e-4
    assert abs(level.logsnr[T] + 10.118) < 5e-4
    assert abs(level.sigma[T] / level.alpha[T] - 157.407) < 5e-4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 10, 25, 1000])
def test_betas_are_the_authors(name, num_steps, x64):
    level = SCHEDULES[name](num_steps)(np.arange(num_steps + 1))
    kept = np.square(level.alpha[1:] / level.alpha[:-1])
    # The authors' warm-up over fewer than two steps is a matter of rounding.
    if name.startswith("warmup") and num_steps < 25:
        pytest.skip("no rise to speak of")
    expected = betas_of("linear" if name == "from_betas" else name, num_steps)
    np.testing.assert_allclose(1 - kept, expected, rtol=1e-9, atol=1e-12)


def test_options_of_the_schedules(x64):
    def betas(made):
        alpha = made(np.arange(5)).alpha
        return 1 - np.square(alpha[1:] / alpha[:-1])

    ends = {"beta_start": 0.1, "beta_end": 0.4}
    close = {"rtol": 1e-12}
    expected = [0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(betas(schedule.linear(4, **ends)), expected, **close)
    np.testing.assert_allclose(
        np.diff(np.sqrt(betas(schedule.quad(4, **ends))), 2), 0, atol=1e-12
    )
    np.testing.assert_allclose(betas(schedule.const(4, beta=0.3)), 0.3, **close)
    np.testing.assert_allclose(
        betas(schedule.warmup(4, fraction=0.5, **ends)), [0.1, 0.4, 0.4, 0.4], **close
    )
    np.testing.assert_allclose(
        betas(schedule.cosine(4, max_beta=0.5))[-1], 0.5, **close
    )
    np.testing.assert_allclose(
        schedule.cosine(4, offset=0.5, max_beta=0.9999999)(2).alpha,
        np.cos(np.pi / 3) / np.cos(np.pi / 6),
        **close,
    )


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("ends", [(-3, 3), (0, 3), (-2, 1)])
def test_sigmoid_is_that_of_the_paper(ends, tau, x64):
    """alpha_bar(u) = (s(end / tau) - s(v / tau)) / (s(end / tau) - s(start / tau)),
    summed from the rises of the sigmoid: its tails differ by less than rounding."""
    start, end = ends
    v = start + (end - start) * np.arange(21) / 20
    # s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)).
    s = scipy.special.expit
    rises = s(v[1:] / tau) * s(-v[:-1] / tau) * -np.expm1((v[:-1] - v[1:]) / tau)
    left = np.cumsum(rises[::-1])[::-1] / rises.sum()
    noise = np.cumsum(rises) / rises.sum()
    made = schedule.sigmoid(20, start=start, end=end, tau=tau, max_beta=1.0)
    level = made(np.arange(1, 21))
    np.testing.assert_allclose(level.alpha[:-1] ** 2, left[1:], rtol=1e-10)
    np.testing.assert_allclose(level.sigma**2, noise, rtol=1e-10)
    assert level.alpha[-1] < 1e-16
    capped = schedule.sigmoid(20, start=start, end=end, tau=tau, max_beta=0.5)(20)
    assert capped.alpha > level.alpha[-1]


def test_strong_noise_keeps_its_betas(precision):
    """alpha_bar falls below e^-80 long before T; the steps there are still steps."""
    lvl, t = schedule.const(beta=0.2), np.arange(1, T + 1)
    large = gaussian.reverse_variance("large", lvl(t), lvl(t - 1))
    bound = {"float32": 1e-2, "float64": 1e-9}[precision]
    np.testing.assert_allclose(large, 0.2, rtol=bound)
    np.testing.assert_allclose(lvl(t).sigma[100:], 1, rtol=1e-6)


def test_shape_follows_time():
    lin = schedule.linear()
    assert lin(500).alpha.shape == ()
    assert lin(np.array([1, 2])).logsnr.shape == (2,)
    assert lin(np.ones([2, 3], int)).sigma.shape == (2, 3)
    level = lin(np.array([1, 2])).like(np.zeros([2, 4, 4, 3]))
    assert level.alpha.shape == level.logsnr.shape == (2, 1, 1, 1)
    assert lin(5).like(np.zeros([2, 4, 4, 3])).alpha.shape == ()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_any_integer_is_a_time(dtype):
    lin = schedule.linear()
    np.testing.assert_array_equal(lin(jnp.array([100], dtype)).alpha, lin([100]).alpha)


@pytest.mark.parametrize("t", [-1, 1001, np.array([5, 2000]), np.array([-3, 5])])
def test_time_outside_is_refused(t, refuses):
    with refuses(str(np.min(t))):
        schedule.linear()(t)


def test_time_outside_is_nan_under_jit():
    level = jax.jit(schedule.linear())(np.array([-1, -1001, 0, 1000, 1001]))
    for field in (*level, level.alpha, level.sigma):
        np.testing.assert_array_equal(np.isnan(field), [1, 1, 0, 0, 1])


@pytest.mark.parametrize("t", [500, np.array([5, 500]), jnp.array([5, 500])])
def test_known_time_inside_jit(t):
    """A time closed over is still a constant while the function around is traced."""
    lin = schedule.linear()
    inside = jax.jit(lambda x: x * lin(t).alpha)(1.0)
    np.testing.assert_allclose(inside, lin(t).alpha, rtol=1e-6)


@pytest.mark.parametrize("call", [lambda f, t: f(t), lambda f, t: jax.jit(f)(t)])
def test_float_time_of_a_discrete_schedule_is_refused(call, refuses):
    with refuses("dtype float32"):
        call(schedule.linear(), jnp.array(0.5))


@pytest.mark.parametrize(
    ("betas", "got"),
    [
        ([], "shape (0,)"),
        (0.1, "shape ()"),
        ([[0.1]], "shape (1, 1)"),
        ([0.0, 0.1], "from 0 to 0.1"),
        ([-0.1, 0.1], "from -0.1"),
        ([1.0, 0.1], "to 1"),
        ([0.1, 1.5], "to 1.5"),
        ([0.1, np.nan], "nan"),
    ],
)
def test_bad_betas_are_refused(betas, got, refuses):
    with refuses(got):
        schedule.from_betas(betas)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: schedule.linear(0), "0"),
        (lambda: schedule.cosine(10.0), "10.0"),
        (lambda: schedule.jsd(-1), "-1"),
        (lambda: schedule.const("many"), "'many'"),
        (lambda: schedule.quad(None), "None"),
        (lambda: schedule.warmup(1.5), "1.5"),
        (lambda: schedule.warmup(fraction=0.0), "0.0"),
        (lambda: schedule.warmup(fraction=1.5), "1.5"),
        (lambda: schedule.sigmoid(0), "0"),
        (lambda: schedule.sigmoid(start=3.0), "3.0"),
        (lambda: schedule.sigmoid(tau=0.0), "tau 0.0"),
        (lambda: schedule.sigmoid(end=np.nan), "nan"),
        (lambda: continuous.vp(beta_min=3.0, beta_max=2.0), "3.0"),
        (lambda: schedule.num_steps(continuous.vp()), "_vp"),
        (lambda: schedule.linear(10, beta_end=2.0), "to 2"),
    ],
)
def test_bad_options_are_refused(make, got, refuses):
    with refuses(got):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_number_of_steps(name):
    assert schedule.num_steps(SCHEDULES[name](30)) == 30
    inside = jax.jit(lambda made, x: x * schedule.num_steps(made))
    assert inside(SCHEDULES[name](30), 1.0) == 30


def test_other_betas_do_not_retrace():
    traces = []

    @jax.jit
    def noise(made, t):
        traces.append(1)
        return made(t).sigma

    for name, make in SCHEDULES.items():
        truth = NumpyDDPM.named(name)
        np.testing.assert_allclose(noise(make(), TIMES), truth.sigmas, rtol=1e-6)
    assert len(traces) == 1


def test_vp_is_the_integral_of_its_sde(precision):
    """dx = -beta/2 x dt + sqrt(beta) dw has log alpha = -1/2 integral of beta."""
    low, high = 0.2, 15.0
    t = np.linspace(0, 1, 101)
    integral = [
        scipy.integrate.quad(lambda u: low + u * (high - low), 0, end)[0] for end in t
    ]
    level = continuous.vp(beta_min=low, beta_max=high)(t)
    log_alpha = -0.5 * np.array(integral)
    # t itself is rounded: log alpha has its relative error, alpha |log alpha| times it.
    bound = BOUND[precision]
    np.testing.assert_allclose(level.log_alpha, log_alpha, rtol=bound, atol=1e-15)
    np.testing.assert_allclose(level.alpha, np.exp(log_alpha), rtol=8 * bound)
    # The variance that it adds: Var' = beta (1 - Var), so Var = 1 - alpha^2.
    variance = -np.expm1(2 * log_alpha)
    np.testing.assert_allclose(np.square(level.sigma), variance, rtol=2 * bound)
    assert (level.alpha[0], level.sigma[0], level.logsnr[0]) == (1, 0, np.inf)


def test_vp_is_the_limit_of_linear(x64):
    """beta_i = beta(t) / T: the error falls in proportion to 1 / T."""
    errors = []
    for num_steps in (1000, 2000, 4000):
        ends = {"beta_start": 0.1 / num_steps, "beta_end": 20 / num_steps}
        chain = schedule.linear(num_steps, **ends)(np.arange(0, num_steps + 1, 100))
        limit = continuous.vp()(np.arange(0, num_steps + 1, 100) / num_steps)
        errors.append(np.max(np.abs(chain.alpha - limit.alpha)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1, atol=0.05)
    assert errors[0] < 0.01


def test_variance_is_preserved_at_any_log_snr(precision):
    logsnr = np.array([-80.0, -13.0, -1.0, 0.0, 2.0, 30.0, np.inf])
    level = schedule.preserving(jnp.asarray(logsnr))
    bound = BOUND[precision] * 10
    np.testing.assert_allclose(level.alpha**2, scipy.special.expit(logsnr), rtol=bound)
    np.testing.assert_allclose(level.sigma**2, scipy.special.expit(-logsnr), rtol=bound)
