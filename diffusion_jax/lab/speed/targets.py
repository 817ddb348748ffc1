"""Names devices to compile for, which need not be there."""

import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.errors import ConfigError

HOST = 8
"""GPUs of a host."""


class Speed(NamedTuple):
    """What one device does, as measured; for the model of a step's time."""

    convolutions: float
    """Operations a second of a convolution, once it runs."""
    memory: float
    """Bytes a second, read and written, of every other kernel once it runs."""
    start: float
    """Seconds of a kernel that moves nothing."""
    convolution_start: float
    """The same of a convolution: its tiles that are not full, its parts that are added
    up, its workspace."""


# Read off the kernels of one step on an H200, all in all and by kind, and rounded so
# that six steps and evaluations come out: tests/golden/compiled_h100.json has them. One
# rate serves elementwise kernels, reductions and products, once each has its start.
H200_SPEED = Speed(
    convolutions=740e12, memory=3.1e12, start=2e-6, convolution_start=10e-6
)
# What XLA must know of a GPU to compile for it, as one answered. The bandwidth of its
# memory decides what is fused.
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": GPU.format(
        bandwidth=3352320000000,
        cache=52428800,
        memory=84929347584,
        name="NVIDIA H100 80GB HBM3",
    ),
    "h200": GPU.format(
        bandwidth=4814400000000,
        cache=62914560,
        memory=150754820096,
        name="NVIDIA H200",
    ),
}


class Target(NamedTuple):
    """What to compile for."""

    devices: list[Any]
    speed: Speed | None


def aim(name: str) -> Target:
    """Returns the devices of a target, to lower and compile for.

    Args:
      name: "here"; "h100:8" or "h200:8" for so many GPUs, eight a host; or a slice of
        TPUs, such as "v5e:4x4".

    Raises:
      ConfigError: an unknown target, or one whose compiler is not installed.
    """
    if name == "here":
        return Target(jax.devices(), None)
    gpus = re.fullmatch(r"(h[12]00)(?::(\d+))?", name)
    tpus = re.fullmatch(r"v\d+\w*:\d+(x\d+)+", name)
    count = int(gpus[2] or 1) if gpus else 1
    if (gpus is None and tpus is None) or (count > HOST and count % HOST) or not count:
        raise ConfigError(
            "target must be here, h100:8, h200:8 or, of TPUs, v5e:4x4, with GPUs eight "
            f"a host; got {name!r}. The number is that of the devices."
        )
    # The compilers come as plugins, which would look for their devices.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if tpus:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
            return Target(found.devices, None)
        hosts, each = max(1, count // HOST), min(count, HOST)
        assert gpus is not None
        found = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[gpus[1]], topology=f"1x{hosts}x{each}"
        )
        return Target(found.devices, H200_SPEED)
    except (RuntimeError, NotImplementedError) as error:
        extra = "cuda12" if gpus else "tpu"
        raise ConfigError(
            f"the compiler for {name} must be installed, and know it; got "
            f"{str(error).splitlines()[0]}. Say: pip install 'jax[{extra}]'."
        ) from error
