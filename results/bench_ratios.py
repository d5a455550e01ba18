"""The designs of crl.py against the naive ones, in turns in one process: the second part of `make bench`.

    python results/bench_ratios.py        about 5 minutes on 2 cores; writes bench_ratios_DEVICE.csv

Each time is a median, each ratio the median of the rounds' ratios.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import measure
from algorithms import crl
from bench_update import separate, stacked
from shared import networks
from shared import replay as buffer

ON_GPU = jax.default_backend() == "gpu"
BATCH, WIDTH = 512 if ON_GPU else 256, 256


def row(name: str, ours: str, other: str, quotient: float) -> dict:
    return {"what: ours / the other": name, "ours": ours, "other": other, "other/ours": f"{quotient:.3g}"}


def ratio(name, ours, other, rounds=7):
    seconds = measure.interleaved({"ours": ours, "other": other}, rounds)
    times = (f"{1e3 * np.median(seconds[which]):.3g} ms" for which in ("ours", "other"))
    return row(name, *times, np.median(seconds["other"] / seconds["ours"]))


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
    return row(name, f"{ours:.3g} s", f"{naive:.3g} s", naive / ours)


def unrolled_ratio(depth):
    """A gradient of one network: scanned against unrolled, the latter keeps everything, as published."""
    network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, 271))

    def gradient(forward):
        loss = lambda network: jnp.sum(jax.vmap(partial(forward, network))(x) ** 2)
        return partial(jax.jit(jax.grad(loss)), network)

    name = f"gradient of one network, depth {depth}: scan / layers unrolled in Python"
    return ratio(name, gradient(lambda network, x: network(x)), gradient(unrolled))


def remat_ratio(depth, naive):
    """A gradient of one network: the default rematerialisation against another."""

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


def encoders_ratio(depth):
    """A gradient of the sizes of phi and psi: a loop over the depth for each / one loop over both trunks stacked."""
    sizes = 285, 3
    pair = [networks.ResidualMLP(size, WIDTH, depth, 64, jax.random.key(size)) for size in sizes]
    inputs = [jax.random.normal(jax.random.key(size), (BATCH, size)) for size in sizes]

    def gradient(through):
        loss = lambda pair: sum(jnp.sum(y**2) for y in through(pair, inputs))
        return partial(jax.jit(jax.grad(loss)), pair)

    name = f"gradient of two encoders, depth {depth}: separate / trunks stacked in one loop"
    return ratio(name, gradient(separate), gradient(stacked))


def main():
    print(measure.facts(), flush=True)
    rows = []
    for measurement in (
        partial(compile_ratio, 16),
        partial(compile_ratio, 64),
        partial(unrolled_ratio, 64),
        partial(remat_ratio, 16, "none"),
        partial(remat_ratio, 16, "full"),
        partial(remat_ratio, 64, "none"),
        partial(remat_ratio, 64, "full"),
        partial(encoders_ratio, 16),
        partial(encoders_ratio, 64),
        partial(logits_ratio, 256),
        partial(logits_ratio, 512),
        replay_ratio,
        relabel_ratio,
    ):
        rows.append(measurement())
        print(rows[-1], flush=True)
    how = f"python results/bench_ratios.py; {measure.facts(f'batch {BATCH}, width {WIDTH}')}"
    measure.write(f"bench_ratios_{jax.default_backend()}", how, rows)


if __name__ == "__main__":
    main()
