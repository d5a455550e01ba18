"""How depth costs, and what the design saves: `make bench`. About 12 minutes on 2 cores.

Writes bench_depth_DEVICE.csv (a gradient step of crl.py at several depths, each in a process of its own, so that
its peak memory is its own), bench_envs_DEVICE.csv (data collection), bench_ratios_DEVICE.csv (each design against the
naive one, interleaved in one process). DEVICE is cpu or gpu. Times are medians; compile time is tracing, lowering and
compiling.
"""

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes of one GPU share its memory

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import envs
from algorithms import crl
from envs.base import Env
from shared import networks, run
from shared import replay as buffer

HERE = Path(__file__).parent
DEPTHS = (4, 16, 64, 256, 1024)
ON_GPU = jax.default_backend() == "gpu"
BATCH, WIDTH = 512 if ON_GPU else 256, 256
NUM_ENVS = 512 if ON_GPU else 64
FACTS = f"{run.device_name()}, {run.commit()}, equinox {eqx.__version__}, Python {platform.python_version()}; "
FACTS += f"batch {BATCH}, width {WIDTH}, humanoid sizes"


class Humanoid(Env):
    """The sizes of the paper's humanoid; a gradient step asks for nothing else."""

    observation_size, action_size, goal_indices = 268, 17, (0, 1, 2)
    reset = step = sample_goal = render = None


def gradient_step(depth):
    """A jitted, donated gradient step on a replay of humanoid-sized noise, its state and its key."""
    config = crl.Config(
        depth=depth, batch_size=BATCH, width=WIDTH, num_envs=8, min_replay_size=62, max_replay_size=1000
    )  # fmt: skip
    env = Humanoid()
    actor, critic = crl.make_networks(config, env, jax.random.key(0))
    row = crl.Row(jnp.zeros(268), jnp.zeros(17), jnp.zeros(3))
    replay = buffer.init(row, 1000, config.num_envs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1000, 8, *x.shape), x.dtype), row)
    noise = jax.tree.map(lambda s: jax.random.normal(jax.random.key(1), s.shape), shapes)
    replay = buffer.add(replay, noise, jnp.zeros((1000, 8), bool))
    log_alpha = jnp.zeros(())
    state = crl.TrainState(
        actor, critic, log_alpha, crl.adam(config, 3e-4).init(actor), crl.adam(config, 3e-4).init(critic),
        crl.adam(config, 3e-4).init(log_alpha), replay, None, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
        jax.random.key(2),
    )  # fmt: skip
    return jax.jit(partial(crl.update, config, env), donate_argnums=0), state


def timed(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def one_depth(depth: int, steps: int) -> dict:
    """Compile seconds, step milliseconds and memory of one depth, in this process."""
    step, state = gradient_step(depth)
    parameters = networks.count_parameters((state.actor, state.critic))
    start = time.perf_counter()
    compiled = step.lower(state, jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for i in range(steps + 1):
        seconds, (state, info) = timed(compiled, state, jax.random.key(i))
        times.append(seconds)
    assert all(np.isfinite(x) for x in info.values()), "a loss is not finite"
    return {
        "depth": depth,
        "parameters": parameters,
        "compile_s": round(compile_seconds, 2),
        "step_ms": round(1e3 * float(np.median(times[1:])), 1),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6),
        "peak_mb": round(peak_memory() / 1e6),
    }


def peak_memory() -> int:
    """Bytes: the most this process held, on the GPU where there is one."""
    if ON_GPU:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collection(name: str, steps: int) -> dict:
    """Compile seconds and environment steps per second of crl.py's data collection with depth-4 networks."""
    config = crl.Config(env=name, num_envs=NUM_ENVS, unroll_length=steps, max_replay_size=1000, min_replay_size=steps)
    env = envs.make(name)
    state = jax.jit(partial(crl.init, config, env))(jax.random.key(0))
    start = time.perf_counter()
    compiled = jax.jit(partial(crl.collect, config, env), donate_argnums=0).lower(state).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(6):
        seconds, state = timed(compiled, state)
        times.append(seconds)
    rate = NUM_ENVS * steps / float(np.median(times[1:]))
    return {"env": name, "num_envs": NUM_ENVS, "compile_s": round(compile_seconds, 2), "env_steps_per_s": round(rate)}


def ratio(name, ours, naive, rounds=7):
    """Median time of each, called in turns, and the median of the rounds' ratios. Both are called once before."""
    pairs = [(timed(ours)[0], timed(naive)[0]) for _ in range(rounds + 1)][1:]
    ours_ms, naive_ms = (1e3 * float(np.median(x)) for x in zip(*pairs))
    quotient = float(np.median([n / o for o, n in pairs]))
    return {"what": name, "ours": f"{ours_ms:.3g} ms", "naive": f"{naive_ms:.3g} ms", "naive/ours": f"{quotient:.3g}"}


def unrolled(network, x):
    """A Python loop over the blocks, as the published networks are written."""
    x = network.stem(x)
    for i in range(network.blocks.layers[0].dense.bias.shape[0]):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], network.blocks)(x)
    return network.head(x)


def compile_ratio(depth):
    """Compile seconds of a gradient of one network: scanned against unrolled."""

    def seconds(forward):
        network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0))
        x = jnp.zeros((BATCH, 271))
        loss = lambda network: jnp.sum(jax.vmap(partial(forward, network))(x) ** 2)
        start = time.perf_counter()
        jax.jit(jax.grad(loss)).lower(network).compile()
        return time.perf_counter() - start

    ours, naive = seconds(lambda network, x: network(x)), seconds(unrolled)
    name = f"compile one network's gradient, depth {depth}: scan / layers unrolled in Python"
    return {"what": name, "ours": f"{ours:.3g} s", "naive": f"{naive:.3g} s", "naive/ours": f"{naive / ours:.3g}"}


def remat_ratio(depth, naive):
    """A gradient of one network, batch 256: the default rematerialisation against another."""

    def gradient(remat):
        options = networks.NetworkOptions(remat=remat)
        network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0), options)
        x = jax.random.normal(jax.random.key(1), (BATCH, 271))
        loss = lambda network: jnp.sum(jax.vmap(network)(x) ** 2)
        return partial(jax.jit(jax.grad(loss)), network)

    return ratio(f"gradient of one network, depth {depth}: remat=dots / {naive}", gradient("dots"), gradient(naive))


def logits_ratio(batch):
    phi, psi = jax.random.normal(jax.random.key(0), (2, batch, 64))

    def naive(phi, psi):
        return -jnp.sqrt(jnp.sum((phi[:, None] - psi) ** 2, axis=-1) + crl.TINY)

    def gradient(logits):
        loss = lambda phi, psi: crl.contrastive_loss(logits(phi, psi), "fwd_infonce")
        return partial(jax.jit(jax.grad(loss, (0, 1))), phi, psi)

    name = f"logits and loss gradient, batch {batch}: matrix product / batch x batch x 64 differences"
    return ratio(name, gradient(partial(crl.pairwise_energy, kind="norm")), gradient(naive))


def replay_ratio(rows=10_000, num_envs=128, size=30, unroll=62):
    """62 steps into a full buffer: written in place / the whole buffer rolled, as published."""
    data = {
        "ring": buffer.init(jnp.zeros(size), rows, num_envs),
        "rolled": jnp.zeros((rows, num_envs, size)),
    }
    new, last = jnp.ones((unroll, num_envs, size)), jnp.zeros((unroll, num_envs), bool)
    ring = jax.jit(buffer.add, donate_argnums=0)
    roll = jax.jit(lambda old, new: jnp.roll(old, -unroll, axis=0).at[-unroll:].set(new), donate_argnums=0)

    def ours():
        data["ring"] = ring(data["ring"], new, last)
        return data["ring"].count

    def naive():
        data["rolled"] = roll(data["rolled"], new)
        return data["rolled"]

    return ratio(f"insert {unroll} steps, replay {rows} x {num_envs} x {size}: ring / roll", ours, naive)


def relabel_ratio(rows=2000, num_envs=32, size=30, window=1000, batch=256, batches=31):
    """The tuples of one published window draw: closed form / a categorical over window x window weights."""
    replay = buffer.init(jnp.zeros(size), rows, num_envs)
    data = jax.random.normal(jax.random.key(0), (rows, num_envs, size))
    replay = buffer.add(replay, data, jax.random.bernoulli(jax.random.key(1), 0.002, (rows, num_envs)))

    @jax.jit
    def ours(key):
        def one(key):
            pairs = buffer.sample_future_in_window(replay, key, batch, 0.99, window)
            return buffer.gather(replay, pairs.row, pairs.env), buffer.gather(replay, pairs.future, pairs.env)

        return jax.lax.map(one, jax.random.split(key, batches))

    @jax.jit
    def naive(key):
        start_key, future_key = jax.random.split(key)

        def one(env, start, key):
            rows = jax.lax.dynamic_slice(replay.data[:, env], (start, 0), (window, size))
            episode = jax.lax.dynamic_slice(replay.episode[:, env], (start,), (window,))
            ahead = jnp.arange(window) - jnp.arange(window)[:, None]
            weights = jnp.where((ahead > 0) & (episode == episode[:, None]), 0.99**ahead, 0) + 1e-5 * jnp.eye(window)
            return rows[:-1], rows[jax.random.categorical(key, jnp.log(weights))][:-1]

        starts = jax.random.randint(start_key, (num_envs,), 0, rows - window)
        return jax.vmap(one)(jnp.arange(num_envs), starts, jax.random.split(future_key, num_envs))

    name = f"{batches * batch} relabelled pairs: closed form / windows of {window} and a categorical"
    key = jax.random.key(2)
    return ratio(name, partial(ours, key), partial(naive, key), rounds=3)


def write(name, rows):
    with (HERE / f"{name}_{jax.default_backend()}.csv").open("w", newline="") as file:
        file.write(f"# python results/bench_crl.py; {FACTS}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    width = {k: max(len(str(row[k])) for row in [{k: k}, *rows]) for k in rows[0]}
    for row in [dict(zip(width, width)), {k: "-" * n for k, n in width.items()}, *rows]:
        print("| " + " | ".join(str(row[k]).ljust(n) for k, n in width.items()) + " |")
    print(flush=True)


def main():
    if len(sys.argv) > 1:  # the child process of one depth
        print(json.dumps(one_depth(int(sys.argv[1]), int(sys.argv[2]))))
        return
    print(FACTS, flush=True)
    rows = []
    for depth in DEPTHS:
        steps = 20 if depth <= 64 else 5 if depth == 256 else 3
        child = [sys.executable, __file__, str(depth), str(steps)]
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write("bench_depth", rows)
    write("bench_envs", [collection(name, 20) for name in ("point_u_maze", "ant", "ant_u_maze", "ant_u4_maze")])
    write(
        "bench_ratios",
        [
            compile_ratio(16),
            compile_ratio(64),
            remat_ratio(16, "none"),
            remat_ratio(16, "full"),
            remat_ratio(64, "none"),
            remat_ratio(64, "full"),
            logits_ratio(256),
            logits_ratio(512),
            replay_ratio(),
            relabel_ratio(),
        ],
    )


if __name__ == "__main__":
    main()
