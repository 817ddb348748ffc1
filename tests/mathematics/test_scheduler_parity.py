"""The sampling rules against diffusers' schedulers: same network, noise and grid.

tests/golden/diffusers_schedulers.npz has the whole path of x by diffusers for each case
of peers/make_scheduler_golden.py. In DPM-Solver++(3M) diffusers takes half of the
second derivative, as the released code of that does, whose order is then 2: there, and
for EDM's noise, which has no peer, the rules are held to the definition in NumPy.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import make_scheduler_golden as golden
import numpy as np
import pytest

from diffusion_jax import continuous, gaussian, samplers, schedule, solvers

KEY, VP = jax.random.key(0), continuous.vp()
# The file has x in float32, and diffusers' multistep solver rounds it to that too.
TOLERANCE = {"rtol": 0, "atol": 2e-6}
SCHEDULES = {"linear": schedule.linear, "cosine": schedule.cosine}
DPM = solvers.dpm_solver_pp
# What a case is named after is the rule.
RULES = {
    **{f"ddpm {v}": partial(samplers.ddpm, variance=v) for v in gaussian.VARIANCES},
    **{f"ddim {eta:g}": partial(samplers.ddim, eta=eta) for eta in (0.0, 0.5, 1.0)},
    **{f"dpm {order}": partial(DPM, order=order) for order in solvers.DPM_SOLVERS},
    **{f"unipc {order}": partial(solvers.unipc, order=order) for order in (1, 2, 3)},
    "heun": solvers.heun,
}
SINGLE = [name for name in golden.CASES if name.endswith("float32")]
DOUBLE = [
    *((name, "eps") for name in golden.CASES if name not in ("dpm 3M: 5", *SINGLE)),
    # Whatever is predicted.
    ("ddpm small: threshold", "v"),
    ("ddim 0: clip", "x0"),
    ("ddim 0.5: 20", "v"),
]
# In single precision noise is other noise: of rules that draw only those two cases.
ROUNDED = {
    **dict.fromkeys(SINGLE, "eps"),
    # The cosine schedule starts from alpha = 5e-5, by which eps would be divided.
    "unipc 2: cosine": "v",
    "heun: 20": "eps",
}


@pytest.fixture(scope="module")
def paths():
    """X before each step and at the end by diffusers, for each case."""
    with np.load(golden.GOLDEN) as file:
        return {name: file[name] for name in golden.CASES}


def network(kind, x, share, alpha, sigma):
    """golden.network once more, in JAX."""
    left, below = jnp.roll(x, 1, axis=-2), jnp.roll(x, 1, axis=-1)
    wave = 0.4 * jnp.cos(3 * share)
    bend = 0.6 * jnp.tanh(1.9 * x + 1.1 * left - 0.7 * below + wave)
    spread = 0.7**2 * alpha**2 + sigma**2
    return {
        "eps": x * sigma / spread - alpha * bend,
        "x0": x * (0.49 * alpha / spread) + sigma * bend,
        "v": x * (alpha * sigma * (1 - 0.7**2) / spread) - bend,
    }[kind]


def denoiser_of(case, kind):
    """The network of a case as the rules see it."""
    learned = case.options.get("variance_type") == "learned"

    def apply_fn(x, t):
        # Fed t - 1. The tables are copied: JAX would remember them by their identity.
        alpha, sigma = (
            jnp.asarray(table.copy())[t + 1][:, None, None, None]
            for table in golden.levels(case.schedule)
        )
        share = (t + 1)[:, None, None, None] / golden.T
        output = network(kind, x, share, alpha, sigma)
        said = 1.1 * jnp.tanh(jnp.roll(x, 1, axis=1) + share) - 4.6
        return jnp.concatenate([output, said], axis=-1) if learned else output

    # A clip is on by default in those two.
    clip = case.scheduler in (golden.DDPM, golden.DDIM)
    return gaussian.denoiser(
        apply_fn,
        SCHEDULES[case.schedule](),
        kind,
        clip=clip and case.options.get("clip_sample", True),
        threshold=case.options.get("dynamic_thresholding_ratio"),
        variance="learned" if learned else "large",
    )


def path_of(rule, grid, start=None):
    """X before each step and at the end, [steps + 1, B, ...], and x0."""
    shape, steps = (golden.BATCH, *golden.SHAPE), range(len(grid) - 1)
    end, seen = samplers.trajectory(KEY, rule, grid, shape, steps, start=start)
    return np.concatenate([seen.x_t, end[None]]), np.asarray(seen.x0)


def walk(name, kind="eps", *, start=None):
    case = golden.CASES[name]
    denoise, made = denoiser_of(case, kind), SCHEDULES[case.schedule]()
    return path_of(RULES[name.partition(":")[0]](denoise, made), case.grid, start)


@pytest.mark.parametrize(("name", "kind"), DOUBLE)
def test_path_is_that_of_diffusers(name, kind, paths, x64):
    np.testing.assert_allclose(walk(name, kind)[0], paths[name], **TOLERANCE)


@pytest.mark.parametrize("name", ROUNDED)
def test_path_is_that_of_diffusers_in_single_precision(name, paths):
    start = None if name in SINGLE else jnp.asarray(paths[name][0])
    actual = walk(name, ROUNDED[name], start=start)[0]
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, paths[name], rtol=0, atol=1e-4)


def test_third_order_integrates_the_parabola_through_three_outputs(x64):
    """The line through two before that, and in the last step but one: by quadrature.

    x_s = sigma_s / sigma_t x_t + alpha_s int e^(l - lambda_s) P(l) dl, from lambda_t to
    lambda_s, where P takes the values that x0 had.
    """
    name = "dpm 3M: 5"
    grid, (path, x0) = golden.CASES[name].grid, walk(name)
    alpha, sigma = golden.levels("linear")
    lam = np.log(alpha[grid[:-1]] / sigma[grid[:-1]])  # half the log-SNR
    nodes, weights = np.polynomial.legendre.leggauss(20)
    for i in range(len(grid) - 2):
        most = 2 if i == len(grid) - 3 else 3
        t, s, used = grid[i], grid[i + 1], slice(max(i + 1 - most, 0), i + 1)
        h = lam[i + 1] - lam[i]
        places = lam[i] + h * (nodes + 1) / 2
        size = len(lam[used])
        fit = np.linalg.solve(
            np.vander(lam[used] - lam[i], size), x0[used].reshape(size, -1)
        )
        values = np.vander(places - lam[i], size) @ fit
        integral = h / 2 * (weights * np.exp(places - lam[i + 1])) @ values
        x_s = sigma[s] / sigma[t] * path[i] + alpha[s] * integral.reshape(path[i].shape)
        np.testing.assert_allclose(path[i + 1], x_s, rtol=0, atol=1e-9)
    # The last step is of the first order.
    np.testing.assert_allclose(path[-1], x0[-1], rtol=0, atol=1e-12)


def algorithm_2(x, sigmas, noises, predict, level, *, churn, churn_range, noise):
    """x before each step and at the end, by Algorithm 2 of Karras et al. 2022.

    Sigmas are its t_0, ..., t_N, noises its eps_i, predict its D(x; sigma), and level
    gives the level that there is next to one that is wanted.
    """
    path = [x]
    for z, (t, s) in zip(noises, itertools.pairwise(sigmas), strict=True):
        inside = churn_range[0] <= t <= churn_range[1]
        gamma = min(churn / len(noises), np.sqrt(2) - 1) if inside else 0.0
        raised = level((1 + gamma) * t) if gamma else t
        x = x + np.sqrt(raised**2 - t**2) * noise * z
        slope = (x - predict(x, raised)) / raised
        x_s = x + (s - raised) * slope
        if s > 0:
            end = (x_s - predict(x_s, s)) / s
            x_s = x + (s - raised) * 0.5 * (slope + end)
        x = x_s
        path.append(x)
    return np.stack(path)


RATIOS = np.divide(*golden.levels("linear")[::-1])


def nearest(sigma):
    """The level next to this that a chain has, in log-SNR."""
    return RATIOS[1 + np.abs(np.log(RATIOS[1:] / sigma)).argmin()]


def nearest_share(sigma):
    return np.abs(RATIOS - sigma).argmin() / golden.T


def vp_share(sigma):
    """A root of the quadratic in t that log alpha is."""
    wanted = 0.5 * np.log1p(sigma**2)
    return (np.sqrt(0.05**2 + 19.9 * wanted) - 0.05) / (19.9 / 2)


def vp_network(x, t):
    t = t[:, None, None, None]
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.05
    alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return network("x0", x, t, alpha, sigma)


STEPS = golden.uniform(10)


@pytest.mark.parametrize(
    ("time", "churn"), [("whole", 3.0), ("whole", 40.0), ("real", 0.0), ("real", 40.0)]
)
def test_edm_is_algorithm_2(time, churn, x64):
    """In real time exactly; in whole steps with the nearest level that there is."""
    if time == "whole":
        most, made, grid, sigmas = 50.0, schedule.linear(), STEPS, RATIOS[STEPS]
        denoise = denoiser_of(golden.CASES["heun: 10"], "x0")
        share, level = nearest_share, nearest
    else:  # which goes on beyond t = 1, where sigma / alpha is 152
        most, made, grid, share, level = 200.0, VP, STEPS / golden.T, vp_share, abs
        sigmas = np.sqrt(np.expm1(2 * (grid**2 * 19.9 / 4 + grid * 0.05)))
        denoise = gaussian.denoiser(vp_network, made, "x0")

    def predict(y, sigma):
        alpha = 1 / np.sqrt(1 + sigma**2)
        return golden.network("x0", alpha * y, share(sigma), alpha, alpha * sigma)

    options = {"churn": churn, "churn_range": (0.05, most), "noise": 1.007}
    ours, _ = path_of(solvers.edm(denoise, made, **options), grid)
    start, *noises = golden.noise(10, "float64")
    scales = np.sqrt(1 + sigmas**2)
    start = start * scales[0]
    theirs = algorithm_2(start, sigmas, noises, predict, level, **options)
    theirs /= scales[:, None, None, None, None]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)


def test_churn_beyond_the_end_step_by_step(x64):
    """Outside of a trace times beyond 1 are refused where they are not asked for so."""
    ve, start = continuous.ve(sigma_min=0.002, sigma_max=80.0), jnp.zeros((4000, 1))
    rule = solvers.edm(gaussian.denoiser(lambda x, t: 0 * x, ve, "eps"), ve, churn=10.0)
    times, keys = jnp.array([1.0, 0.97]), jax.random.split(KEY, len(start))
    end = rule.step(keys, start, rule.init(start, times), *times).x
    assert end.std() == pytest.approx(80.0, rel=0.04)  # (1 + gamma)^2 is 2
