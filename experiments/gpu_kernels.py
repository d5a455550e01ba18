"""How many kernels a gradient step of crl.py launches on an H200: compiled for one, without having it.

    pip install --no-deps --target DIR jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12
    python experiments/gpu_kernels.py DIR        the versions are that of jax; about 6 minutes; writes gpu_kernels.csv

The counts are of XLA's program with default tiles. They are no times: nothing here has run on a GPU.
"""

import os
import sys
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
if len(sys.argv) != 2:
    raise SystemExit(__doc__)
sys.path.insert(0, sys.argv[1])

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bench_update
import measure

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
"""What XLA asks of a GPU that it compiles for."""


def count(depth: int, name: str, sharding) -> dict:
    step, state = bench_update.variant(name, depth=depth, width=256, batch_size=512)
    shapes = jax.eval_shape(lambda *x: x, state, jax.random.key(0))
    seconds, program = measure.compiled(jax.jit(step, donate_argnums=0, in_shardings=sharding), *shapes)
    return {
        "depth": depth,
        "variant": name,
        "kernels": bench_update.kernels(program.as_text()),
        "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6),
        "compile_s": round(seconds, 1),
    }


def main():
    jax.devices()  # finds the plugin
    topology = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=H200)
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), "x"), PartitionSpec())
    how = f"python experiments/gpu_kernels.py DIR; compiled for an H200 on {measure.facts('batch 512, width 256')}"
    rows = [partial(count, 64, name, sharding) for name in bench_update.VARIANTS]
    measure.measured("gpu_kernels", f"{how}, humanoid sizes", rows)


if __name__ == "__main__":
    main()
