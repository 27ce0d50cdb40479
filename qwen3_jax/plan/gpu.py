"""Describe GPUs that are not present to the CUDA compiler. Needs the `cuda` extra, or of its wheels only the plugin and
its PJRT library (180 MB), and no GPU.

The text below follows XLA's GpuTargetConfigProto, with NVIDIA's published numbers for the H100 SXM5.
"""

import os
from typing import Any

from jax.experimental import topologies

from qwen3_jax.plan.chips import ChipError, Topology

TARGETS = {
    "H100": """
gpu_device_info {
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
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def devices(found: Topology) -> list[Any]:
    """Return the described devices of one NVLink domain.

    Raises:
        ChipError: no description of this GPU, or no CUDA compiler on this host.
    """
    if found.chip.name not in TARGETS:
        raise ChipError(f"cannot compile for {found}: have a description of {', '.join(TARGETS)} only; use --fleet")
    # The plugin would look for CUDA's run-time libraries, which compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    count = found.devices
    try:
        described = topologies.get_topology_desc(
            found.chip.name, platform="cuda", topology=f"1x1x{count}", target_config=TARGETS[found.chip.name]
        )
    except Exception as error:  # jax raises RuntimeError, NotImplementedError or a C++ status by version
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChipError(f"cannot compile for {found}: {first}; needs pip install 'qwen3-jax[cuda]'") from None
    return list(described.devices)
