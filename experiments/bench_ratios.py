"""The designs of crl.py against others, the naive ones among them: the second part of `make bench`.

    python experiments/bench_ratios.py        about 2 minutes on 2 cores; writes bench_ratios_DEVICE.csv

Both are called in turns in one process; each time is a median, each ratio the median of the rounds' ratios.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import measure
from algorithms import crl
from bench import BATCH, WIDTH
from bench_update import separate, stack, stacked
from shared import networks
from shared import replay as buffer


def row(name: str, unit: str, seconds: dict[str, np.ndarray]) -> dict:
    scale = {"ms": 1e3, "s": 1}[unit]
    ours, other = (f"{scale * np.median(seconds[which]):.3g} {unit}" for which in ("ours", "other"))
    quotient = float(np.median(seconds["other"] / seconds["ours"]))
    return {"ours, against the other": name, "ours": ours, "other": other, "other / ours": f"{quotient:.3g}"}


def ratio(name, ours, other, rounds=7):
    return row(name, "ms", measure.interleaved({"ours": ours, "other": other}, rounds))


def unrolled(network, x):
    """A Python loop over the blocks, as the published networks are written."""
    x = network.stem(x)
    for i in range(len(network.blocks.layers.dense.bias)):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], network.blocks)(x)
    return network.head(x)


def compile_ratio(depth, rounds=3):
    """Compile seconds of a gradient of one network: scanned against unrolled."""
    network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0))

    def seconds(forward):
        loss = lambda network, x: jnp.sum(jax.vmap(partial(forward, network))(x) ** 2)
        jax.clear_caches()
        return measure.compiled(jax.jit(jax.grad(loss)), network, jnp.zeros((BATCH, 271)))[0]

    forwards = {"ours": lambda network, x: network(x), "other": unrolled}
    times = [[seconds(forward) for forward in forwards.values()] for _ in range(rounds)]
    name = f"compile one network's gradient, depth {depth}: scanned, against layers unrolled in Python"
    return row(name, "s", dict(zip(forwards, np.transpose(times))))


def unrolled_ratio(depth):
    """A gradient of one network: scanned, of each block only the products kept, against unrolled as published."""
    network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, 271))

    def gradient(forward):
        loss = lambda network: jnp.sum(jax.vmap(partial(forward, network))(x) ** 2)
        return partial(jax.jit(jax.grad(loss)), network)

    name = f"gradient of one network, depth {depth}: scanned, against unrolled in Python (which keeps everything)"
    return ratio(name, gradient(lambda network, x: network(x)), gradient(unrolled))


def remat_ratio(depth, naive):
    """A gradient of one network: the default rematerialisation against another."""

    def gradient(remat):
        options = networks.NetworkOptions(remat=remat)
        network = networks.ResidualMLP(271, WIDTH, depth, 64, jax.random.key(0), options)
        x = jax.random.normal(jax.random.key(1), (BATCH, 271))
        loss = lambda network: jnp.sum(jax.vmap(network)(x) ** 2)
        return partial(jax.jit(jax.grad(loss)), network)

    return ratio(
        f"gradient of one network, depth {depth}: --remat dots, against {naive}", gradient("dots"), gradient(naive)
    )


def logits_ratio(batch):
    phi, psi = jax.random.normal(jax.random.key(0), (2, batch, 64))

    def naive(phi, psi):
        return -jnp.sqrt(jnp.sum((phi[:, None] - psi) ** 2, axis=-1) + crl.TINY)

    def gradient(logits):
        loss = lambda phi, psi: crl.contrastive_loss(logits(phi, psi), "fwd_infonce")
        return partial(jax.jit(jax.grad(loss, (0, 1))), phi, psi)

    name = f"gradient of the loss by logits, batch {batch}: one matrix product, against all differences"
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

    return ratio(
        f"insert {unroll} steps, replay {rows} x {num_envs} x {size}: in place, against a rolled buffer", ours, naive
    )


def relabel_ratio(rows=2000, num_envs=32, size=30, window=1000, batch=256):
    """The pairs of one published draw of windows: closed form / a categorical over window x window weights."""
    pairs = num_envs * (window - 1)
    batches = pairs // batch  # 124 of them, 224 pairs fewer than the windows have
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

    name = f"{batches * batch} relabelled pairs: closed form, against {num_envs} windows of {window} and a categorical"
    key = jax.random.key(2)
    return ratio(name, partial(ours, key), partial(naive, key), rounds=3)


def encoders_ratio(depth):
    """A gradient of the sizes of phi and psi: a loop over the depth for each / one loop over both trunks stacked."""
    sizes = 285, 3
    pair = [networks.ResidualMLP(size, WIDTH, depth, 64, jax.random.key(size)) for size in sizes]
    inputs = [jax.random.normal(jax.random.key(size), (BATCH, size)) for size in sizes]

    def gradient(through, parameters):
        loss = lambda parameters: sum(jnp.sum(y**2) for y in through(parameters, inputs))
        return partial(jax.jit(jax.grad(loss)), parameters)

    name = f"gradient of two encoders, depth {depth}: separate, against trunks stacked in one loop"
    return ratio(name, gradient(separate, pair), gradient(stacked, stack(pair)))


MEASUREMENTS = [
    partial(compile_ratio, 16),
    partial(compile_ratio, 64),
    partial(unrolled_ratio, 64),
    *(partial(remat_ratio, depth, naive) for depth in (16, 64) for naive in ("none", "full")),
    partial(encoders_ratio, 16),
    partial(encoders_ratio, 64),
    partial(logits_ratio, 256),
    partial(logits_ratio, 512),
    replay_ratio,
    relabel_ratio,
]


def main():
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    how = f"python experiments/bench_ratios.py; {measure.facts(f'batch {BATCH}, width {WIDTH}')}"
    print(how, flush=True)
    measure.measured(f"bench_ratios_{jax.default_backend()}", how, MEASUREMENTS)


if __name__ == "__main__":
    main()
