"""Measures the same work by PyTorch and diffusers, for `experiments.bench --peer`.

A training step is scaling, flip, noising, forward and backward, clipping, Adam and the
moving average, of diffusers' UNet2DModel in the shape of the configuration; a chain is
as many evaluations of that network, without what a rule does between them. On a GPU it
is compiled, by CUDA graphs where they are faster, has channels last, and computes in
the type of the configuration.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files import diffusers_config
from diffusion_jax.lab.network_files.diffusers_config import peers
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.speed.measuring import Effort, timed

MODES = ("reduce-overhead", "default")
"""Of torch.compile on a GPU: the faster one counts."""


def check(config: Config) -> None:
    """Raises ConfigError where there is no peer, or none that does the same work."""
    peers()
    diffusers_config.to_diffusers(config)
    d = config.diffusion
    others = [d.loss != "eps", d.prediction != "eps", d.weighting != "simple"]
    if any(others) or config.net.classes or d.variance == "range":
        raise ConfigError(
            "the peer must do the same work, the simple loss of eps without labels; "
            f"got loss {d.loss}, prediction {d.prediction}, weighting {d.weighting}, "
            f"variance {d.variance} and {config.net.classes} classes. Leave out --peer."
        )


def compare(config: Config, row: dict[str, Any], effort: Effort) -> dict[str, Any]:
    """Returns what PyTorch takes for the work of a row, and how it was run.

    The row is as of `measuring.row`; the network must be one of diffusers'.

    Raises:
      ConfigError: PyTorch or diffusers is missing, or diffusers has no such network.
    """
    torch, _ = peers()
    make = {"train": _train, "sample": _sample}[row["what"]]
    # Of a chain one evaluation is timed, like a step.
    times = row.get("evaluations_per_sample", 1.0)
    modes = MODES if torch.cuda.is_available() else ("eager",)
    found = {
        mode: times * timed(make(config, row["batch"], mode), effort).median
        for mode in modes
    }
    seconds, mode = min((each, mode) for mode, each in found.items())
    ms = 1000 * seconds
    return {
        "how": f"torch {torch.__version__}, {mode}",
        "ms": ms,
        "per_second": row["per_second"] * row["ms"] / ms,
        "ratio": ms / row["ms"],
    }


def _network(config: Config) -> tuple[Any, Any]:
    torch, diffusers = peers()
    unet, _ = diffusers_config.to_diffusers(config)
    fields = {key: value for key, value in unet.items() if not key.startswith("_")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = diffusers.UNet2DModel(**fields).to(device)
    return net.to(memory_format=torch.channels_last), device


def _compiled(function: Any, mode: str) -> Any:
    torch, _ = peers()
    if mode == "eager":
        return function
    return torch.compile(function, mode=None if mode == "default" else mode)


def _train(config: Config, size: int, mode: str) -> Callable[[], Any]:
    torch, _ = peers()
    net, device = _network(config)
    net.train()
    params = list(net.parameters())
    average = [p.detach().clone() for p in params]
    o = config.optimizer
    adam = torch.optim.Adam(params, lr=o.learning_rate, fused=device.type == "cuda")
    d = config.data
    shape = (size, d.channels, *d.shape[:2])
    images = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    betas = diffusers_config.betas_of(config)
    alpha_bar = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32, device=device)
    half, waits = config.net.dtype == "bfloat16", _waits(device)

    def loss_of(x: Any) -> Any:
        x = x.float() / 127.5 - 1
        if d.flip:
            chosen = torch.rand(size, 1, 1, 1, device=device) < 0.5
            x = torch.where(chosen, x.flip(3), x)
        t = torch.randint(0, len(betas), (size,), device=device)
        eps = torch.randn_like(x)
        level = alpha_bar[t].view(-1, 1, 1, 1)
        x_t = level.sqrt() * x + (1 - level).sqrt() * eps
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = net(x_t, t, return_dict=False)[0]
        return torch.nn.functional.mse_loss(out.float()[:, : d.channels], eps)

    loss = _compiled(loss_of, mode)

    def step() -> Any:
        adam.zero_grad(set_to_none=True)
        loss(images).backward()
        torch.nn.utils.clip_grad_norm_(params, o.clip_norm, foreach=True)
        adam.step()
        torch._foreach_lerp_(average, params, 1 - o.ema_decay[0])
        return waits

    return step


def _sample(config: Config, size: int, mode: str) -> Callable[[], Any]:
    torch, _ = peers()
    net, device = _network(config)
    half, waits = config.net.dtype == "bfloat16", _waits(device)
    net = net.eval().to(torch.bfloat16 if half else torch.float32)
    d = config.data
    shape = (size, d.channels, *d.shape[:2])
    x = torch.randn(shape, device=device, dtype=net.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.full((size,), config.diffusion.num_steps // 2, device=device)
    call = _compiled(lambda x, t: net(x, t, return_dict=False)[0], mode)

    def once() -> Any:
        with torch.no_grad():
            call(x, t)
        return waits

    return once


def _waits(device: Any) -> Any:
    """Returns what JAX waits for as for its own arrays: for all work of a device."""
    torch, _ = peers()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return SimpleNamespace(block_until_ready=wait)
