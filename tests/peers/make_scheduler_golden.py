"""Makes tests/golden/diffusers_schedulers.npz: where diffusers' schedulers walk.

    python tests/peers/make_scheduler_golden.py

Made with torch 2.13.0+cpu, diffusers 0.42.1, numpy 2.4.6 and jax 0.10.2, from which
only the noise comes. There are no weights: the network is a formula, `network`, which
knows alpha and sigma of its time, so that the paths stay bounded.

Times are ours, 0 is data: diffusers' timestep is one less, its previous timestep -1 and
its last sigma of 0 are t = 0. Example b has the key fold_in(key(0), b); fold 0 of that
draws its start, fold i + 1 the noise of step i.

The file holds of each case x before every step and at the end, [steps + 1, B, H, W, C].
diffusers keeps alpha_bar in float32, which moves paths by up to 2e-4 where t is small.
Here it is in float64, so that all that is left to differ is the rules.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "diffusers_schedulers.npz"
BATCH, SHAPE = 2, (4, 4, 3)
T = 1000
NONE = types.MappingProxyType({})
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


class Case(NamedTuple):
    """One path of a class of diffusers, by our times, [steps + 1]."""

    scheduler: str
    grid: np.ndarray
    options: Mapping = NONE
    schedule: str = "linear"
    step: Mapping = NONE
    """Options of step()."""
    dtype: str = "float64"
    """In which the noise is drawn: another type is other noise."""


def uniform(steps):
    return np.arange(steps, -1, -1) * T // steps


def quadratic(steps):
    return np.rint(T * (np.arange(steps, -1, -1) / steps) ** 2).astype(int)


def ending_at_one(steps):
    """diffusers' "linspace": what its UniPC can walk to a time above 0."""
    return np.append(np.linspace(0, T - 1, steps + 1).round()[:0:-1].astype(int), 0) + 1


TAIL = np.arange(50, -1, -1)
# Uneven, with 1 as its last time above 0.
UNEVEN = np.array([1000, 990, 900, 700, 450, 200, 90, 30, 5, 1, 0])
# Each step above 0 has times in between.
APART = UNEVEN[UNEVEN != 1]
# Of the cosine schedule, in steps short enough for one that is not exponential.
LATER = np.array([970, 920, 840, 740, 630, 500, 370, 240, 120, 40, 0])
FREE = {"clip_sample": False}
LAST = {"timestep_spacing": "trailing"}
SMALL, LARGE = ({"variance_type": f"fixed_{name}"} for name in ("small", "large"))
# Else diffusers' sample_max_value of 1 would make it a clip to [-1, 1].
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9}
THRESHOLD |= {"sample_max_value": 100.0}
# Only the step to sigma = 0 is of the first order.
HIGH = {"lower_order_final": False, "euler_at_final": False}
SECOND = {**HIGH, "solver_order": 2}
SDE = {**SECOND, "algorithm_type": "sde-dpmsolver++"}
# Not "midpoint": in its second step ours integrates the line through two outputs.
THIRD = {**HIGH, "solver_order": 3, "solver_type": "heun"}
TO_ONE = {"solver_order": 3, "lower_order_final": False}
TO_ONE |= {"final_sigmas_type": "sigma_min"}

DDPM, DDIM = "DDPMScheduler", "DDIMScheduler"
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, HEUN = "UniPCMultistepScheduler", "HeunDiscreteScheduler"

CASES = {
    "ddpm small: 50": Case(DDPM, uniform(50), FREE | SMALL),
    "ddpm small: tail": Case(DDPM, TAIL, FREE | SMALL),
    "ddpm small: tail, clip": Case(DDPM, TAIL, SMALL | {"clip_sample": True}),
    "ddpm small: float32": Case(DDPM, uniform(10), FREE | SMALL, dtype="float32"),
    "ddpm small: threshold": Case(DDPM, uniform(10), SMALL | THRESHOLD),
    "ddpm small: cosine": Case(DDPM, uniform(20), FREE | SMALL, "cosine"),
    "ddpm large: tail": Case(DDPM, TAIL, FREE | LARGE),
    "ddpm large: uneven": Case(DDPM, UNEVEN, FREE | LARGE),
    "ddpm learned: uneven": Case(DDPM, UNEVEN, FREE | {"variance_type": "learned"}),
    "ddim 0: 20": Case(DDIM, uniform(20), FREE | LAST),
    "ddim 0: quadratic": Case(DDIM, quadratic(20), FREE),
    "ddim 0: cosine": Case(DDIM, uniform(20), FREE | LAST, "cosine"),
    # By default eps stays that of the x0 before the clip.
    "ddim 0: clip": Case(
        DDIM, uniform(10), LAST, step={"use_clipped_model_output": True}
    ),
    "ddim 0.5: 20": Case(DDIM, uniform(20), FREE | LAST, step={"eta": 0.5}),
    "ddim 1: 20": Case(DDIM, uniform(20), FREE | LAST, step={"eta": 1.0}),
    "dpm 1: 10": Case(MULTISTEP, uniform(10), HIGH | {"solver_order": 1}),
    "dpm 2M: 10": Case(MULTISTEP, uniform(10), SECOND),
    "dpm 2M: 20": Case(MULTISTEP, uniform(20), SECOND),
    "dpm 2M: uneven": Case(MULTISTEP, UNEVEN, SECOND),
    "dpm 2M: cosine": Case(MULTISTEP, uniform(10), SECOND, "cosine"),
    "dpm 3M: 5": Case(MULTISTEP, uniform(5), THIRD),
    "dpm SDE: 10": Case(MULTISTEP, uniform(10), SDE),
    "dpm SDE: 20": Case(MULTISTEP, uniform(20), SDE),
    "dpm SDE: float32": Case(MULTISTEP, uniform(10), SDE, dtype="float32"),
    "dpm 2S: 10": Case(SINGLESTEP, uniform(10), {"lower_order_final": True}),
    "dpm 2S: uneven": Case(SINGLESTEP, APART, {"lower_order_final": True}),
    "unipc 1: 10": Case(UNIPC, uniform(10), LAST | {"solver_order": 1}),
    "unipc 2: 10": Case(UNIPC, uniform(10), LAST | {"solver_order": 2}),
    "unipc 2: 20": Case(UNIPC, uniform(20), LAST | {"solver_order": 2}),
    "unipc 2: cosine": Case(UNIPC, uniform(10), LAST | {"solver_order": 2}, "cosine"),
    "unipc 3: 10": Case(UNIPC, ending_at_one(10), TO_ONE),
    "unipc 3: 20": Case(UNIPC, ending_at_one(20), TO_ONE),
    "heun: 10": Case(HEUN, uniform(10)),
    "heun: 20": Case(HEUN, uniform(20)),
    "heun: uneven": Case(HEUN, UNEVEN),
    "heun: cosine": Case(HEUN, LATER, NONE, "cosine"),
}


@functools.cache
def levels(schedule):
    """alpha and sigma for t = 0..T, [2, T + 1], in float64."""
    betas = np.linspace(1e-4, 0.02, T)
    if schedule == "cosine":
        alpha_bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    alpha_bar = np.concatenate([[1], np.cumprod(1 - betas)])
    return np.sqrt([alpha_bar, 1 - alpha_bar])


def network(kind, x, share, alpha, sigma):
    """What is predicted from x [B, H, W, C] at time share * T: bounded paths.

    The best guess for normal data of deviation 0.7, and a bend that mixes pixels and
    channels.
    """
    mixed = 1.9 * x + 1.1 * np.roll(x, 1, axis=2) - 0.7 * np.roll(x, 1, axis=3)
    bend = 0.6 * np.tanh(mixed + 0.4 * np.cos(3 * share))
    shrunk = x / (0.49 * alpha**2 + sigma**2)
    if kind == "eps":
        return sigma * shrunk - alpha * bend
    return 0.49 * alpha * shrunk + sigma * bend


def learned_log_variance(x, share):
    """Of the reverse steps: variances between 0.003 and 0.03."""
    return -4.6 + 1.1 * np.tanh(np.roll(x, 1, axis=1) + share)


@functools.cache
def noise(steps, dtype):
    """The start of a case, then the noise of each step, [steps + 1, B, H, W, C]."""
    with jax.enable_x64(dtype == "float64"):
        fold = jax.vmap(jax.random.fold_in, (0, None))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(0), np.arange(BATCH)
        )
        draw = jax.vmap(lambda key: jax.random.normal(key, SHAPE, dtype))
        each = jax.jit(lambda i: draw(fold(keys, i)))
        return np.stack([np.asarray(each(i)) for i in range(steps + 1)])


def middles(case):
    """The whole time nearest to half way, in log-SNR, of each step that is above 0."""
    alpha, sigma = levels(case.schedule)
    half = np.log(alpha[1:] / sigma[1:])
    pairs = itertools.pairwise(case.grid[case.grid > 0])
    return [1 + np.abs(half - half[[t - 1, s - 1]].mean()).argmin() for t, s in pairs]


def walk(case):
    """X before every step and at the end, [steps + 1, B, H, W, C], by diffusers."""
    import torch

    times, recorded = case.grid, np.arange(len(case.grid))
    if case.scheduler == SINGLESTEP:
        # Its step of the second order is two entries of its grid.
        pairs = zip(times[:-2], middles(case), strict=True)
        times = np.array([*itertools.chain(*pairs), *times[-2:]])
        recorded = np.append(np.arange(0, len(times) - 1, 2), len(times) - 1)
    peer = scheduler(case, times)
    alpha, sigma = levels(case.schedule)

    def ask(x, t):
        x = x.double().numpy().transpose(0, 2, 3, 1)
        output = network("eps", x, t / T, alpha[t], sigma[t])
        if case.options.get("variance_type") == "learned":
            # diffusers takes the variance itself.
            variance = np.exp(learned_log_variance(x, t / T))
            output = np.concatenate([output, variance], axis=-1)
        return channels_first(output)

    step = heun_step if case.scheduler == HEUN else one_step
    drawn = noise(len(times) - 1, case.dtype).astype(np.float64)
    path = [channels_first(drawn[0])]
    with torch.no_grad():
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            with noise_of(peer, channels_first(drawn[i + 1])):
                path.append(step(peer, case, ask, path[-1], i, t, s))
    path = torch.stack(path)[recorded].double().numpy()
    return path.transpose(0, 1, 3, 4, 2)


def scheduler(case, times):
    """That of a case, with alpha_bar in float64, ready to walk these times."""
    import diffusers
    import torch

    peer = getattr(diffusers, case.scheduler)(
        num_train_timesteps=T,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[case.schedule],
        **case.options,
    )
    alpha, sigma = levels(case.schedule)
    peer.alphas_cumprod = torch.from_numpy(alpha[1:] ** 2)
    if case.scheduler in (DDIM, UNIPC):  # They find the times by timestep_spacing.
        peer.set_timesteps(len(times) - 1)
    else:
        peer.set_timesteps(timesteps=[int(t) - 1 for t in times[:-1]])
    if hasattr(peer, "sigmas"):  # Those of the times, rounded to float32.
        table = torch.from_numpy(np.append(0.0, sigma[1:] / alpha[1:]))
        off = (peer.sigmas[:, None].double() - table).abs() / (1e-9 + table)
        peer.sigmas = table[off.argmin(1)]
    return peer


def one_step(peer, case, ask, x, i, t, s):
    """X at s: step i."""
    import torch

    at = peer.timesteps[i]
    if case.scheduler == DDIM and np.ptp(np.diff(case.grid)):
        # It only knows steps of equal length: these are set one by one.
        peer.register_to_config(num_train_timesteps=int(t - s))
        peer.num_inference_steps, at = 1, torch.tensor(t - 1)
    assert at == t - 1, (at, t)
    return peer.step(ask(x, t), at, x, **case.step).prev_sample


def heun_step(peer, case, ask, x, i, t, s):
    """X at s by two calls, one if s = 0. This scheduler lives in x / alpha."""
    alpha, _ = levels(case.schedule)
    x = x / alpha[t]
    for call, u in enumerate((t, s) if s > 0 else (t,)):
        at = peer.timesteps[2 * i + call]
        assert at == u - 1, (at, u)
        x = peer.step(ask(alpha[u] * x, u), at, x).prev_sample
    return alpha[s] * x


@contextlib.contextmanager
def noise_of(peer, drawn):
    """What diffusers draws in this block is `drawn`."""
    module = importlib.import_module(type(peer).__module__)
    kept = getattr(module, "randn_tensor", None)  # of UniPC there is none
    module.randn_tensor = lambda *_, dtype, **__: drawn.to(dtype)
    yield
    module.randn_tensor = kept


def channels_first(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def write(path, made):
    """Writes a file of arrays, with the versions it was made with."""
    names = ("diffusers", "torch", "numpy", "jax")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    np.savez_compressed(path, versions=np.array(versions), **made)
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    write(GOLDEN, {name: walk(case).astype("f4") for name, case in CASES.items()})
