"""One gradient step of crl.py, profiled on this device: the third part of `make bench`.

    python results/bench_update.py        about 4 minutes on 2 cores; writes bench_update_DEVICE.csv

Ways to compute the same step, in turns in one process, each checked to give the same parameters; the bare matrix
products of the step; and how many kernels the compiled program runs in a step, from its optimised HLO: fusions, matrix
products, sorts and so on, those in a loop as often as it turns.
"""

import re
from collections import Counter
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import swish

import measure
from algorithms import crl
from bench import gradient_step_inputs
from shared import networks
from shared.networks import SquashedGaussian

# ---- ways through several networks of one depth and width ---------------------------------------------------------


def scan_blocks(apply, x, blocks, remat="dots"):
    step = lambda x, block: (apply(block, x), None)
    step = jax.checkpoint(step, policy=networks.REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, blocks)[0]


def separate(nets, inputs):
    """As in crl.py: a loop over the depth for each network."""
    return [jax.vmap(net)(x) for net, x in zip(nets, inputs)]


def stacked(nets, inputs):
    """One loop over the depth for all: their trunks stacked on an axis, their stems and heads apart."""
    x = jnp.stack([jax.vmap(net.stem)(x) for net, x in zip(nets, inputs)])
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *[net.blocks for net in nets])
    x = scan_blocks(jax.vmap(lambda block, x: jax.vmap(block)(x)), x, blocks)
    return [jax.vmap(net.head)(x) for net, x in zip(nets, x)]


def hoisted(nets, inputs):
    """A loop for each, but the gradients of the weight matrices are one batched product after it."""
    return [jax.vmap(net.head)(hoisted_trunk(net.blocks, jax.vmap(net.stem)(x))) for net, x in zip(nets, inputs)]


def activate(norm, z):
    return swish(jax.vmap(norm)(z))


def forward_block(x, block):
    y, products = x, []
    for layer in block.layers:
        products.append(y @ layer.dense.weight.T + layer.dense.bias)
        y = activate(layer.norm, products[-1])
    return x + y, (x, products)


@jax.custom_vjp
def hoisted_trunk(blocks, x):
    return jax.lax.scan(forward_block, x, blocks)[0]


def hoisted_backward(saved, gradient):
    blocks, kept = saved

    def backward_block(gradient, row):
        block, (x, products) = row
        d, norms, to_products, inputs = gradient, [], [], []
        for i in reversed(range(4)):
            layer = block.layers[i]
            norm, d = jax.vjp(activate, layer.norm, products[i])[1](d)
            norms.append(norm)
            to_products.append(d)
            inputs.append(activate(block.layers[i - 1].norm, products[i - 1]) if i else x)
            d = d @ layer.dense.weight
        return gradient + d, (norms[::-1], to_products[::-1], inputs[::-1])

    gradient, (norms, to_products, inputs) = jax.lax.scan(backward_block, gradient, (blocks, kept), reverse=True)
    for i in range(4):
        new = jnp.einsum("lbo,lbi->loi", to_products[i], inputs[i]), to_products[i].sum(1), norms[i]
        where = lambda blocks, i=i: (
            blocks.layers[i].dense.weight, blocks.layers[i].dense.bias, blocks.layers[i].norm
        )  # fmt: skip
        blocks = eqx.tree_at(where, blocks, new)
    return blocks, gradient


def hoisted_forward(blocks, x):
    x, kept = jax.lax.scan(forward_block, x, blocks)
    return x, (blocks, kept)


hoisted_trunk.defvjp(hoisted_forward, hoisted_backward)


# ---- the gradient step --------------------------------------------------------------------------------------------


def update(through, config, env, state, key):
    """crl.update with one gradient of the summed losses; `through` is one of the ways above."""
    batch_key, actor_key = jax.random.split(key)
    batch = crl.sample(config, env, state.replay, batch_key)
    alpha = jnp.exp(state.log_alpha)

    def loss(actor, critic):
        nets = actor, critic.phi, critic.psi
        state_goal = jnp.concatenate([batch.observation, batch.goal], axis=-1)
        state_action = jnp.concatenate([batch.observation, batch.action], axis=-1)
        output, phi, psi = through(nets, (state_goal, state_action, batch.goal))
        logits = crl.pairwise_energy(phi, psi, config.energy)
        penalty = config.logsumexp_penalty * jnp.mean(jax.nn.logsumexp(logits, axis=1) ** 2)
        critic_loss = crl.contrastive_loss(logits, config.loss) + penalty
        action, log_prob = SquashedGaussian.from_output(output).sample_and_log_prob(actor_key)
        fixed, psi = jax.lax.stop_gradient((critic.phi, psi))
        (phi,) = through((fixed,), (jnp.concatenate([batch.observation, action], axis=-1),))
        actor_loss = jnp.mean(alpha * log_prob - crl.energy(phi, psi, config.energy))
        return critic_loss + actor_loss, -jnp.mean(log_prob)

    (actor_gradient, critic_gradient), entropy = jax.grad(loss, (0, 1), has_aux=True)(state.actor, state.critic)
    target_entropy = -config.target_entropy_scale * env.action_size
    alpha_gradient = jax.grad(crl.alpha_loss)(state.log_alpha, entropy, target_entropy)

    def step(learning_rate, gradient, optimizer, parameters):
        updates, optimizer = crl.adam(config, learning_rate).update(gradient, optimizer)
        return optax.apply_updates(parameters, updates), optimizer

    actor, actor_optimizer = step(config.actor_lr, actor_gradient, state.actor_optimizer, state.actor)
    critic, critic_optimizer = step(config.critic_lr, critic_gradient, state.critic_optimizer, state.critic)
    log_alpha, alpha_optimizer = step(config.alpha_lr, alpha_gradient, state.alpha_optimizer, state.log_alpha)
    state = state._replace(
        actor=actor, critic=critic, log_alpha=log_alpha, actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer, alpha_optimizer=alpha_optimizer, updates=state.updates + 1,
    )  # fmt: skip
    return state, {}


def nine_passes(config, env, state, key):
    """crl.update as it was, where the actor's loss encodes the goals once more."""
    encode_again = crl.actor_loss

    def actor_loss(actor, critic, psi, alpha, batch, key, config):
        # behind a barrier, or XLA might find that it was computed already
        psi = critic.encode_goal(jax.lax.optimization_barrier(batch.goal))
        return encode_again(actor, critic, psi, alpha, batch, key, config)

    crl.actor_loss = actor_loss
    try:
        return crl.update(config, env, state, key)
    finally:
        crl.actor_loss = encode_again


def products_alone(config, env, state, key):
    """The matrix products of the blocks in a step, and nothing else: eleven for each layer."""

    def trunk(blocks, x):
        weights = [layer.dense.weight for layer in blocks.layers]

        def step(x, weights):
            for weight in weights:
                x = x @ weight.T
            return x, None

        return jax.lax.scan(step, x, weights)[0]

    x = jax.random.normal(key, (config.batch_size, config.width))
    nets = state.actor, state.critic.phi, state.critic.psi

    def loss(blocks, x):
        through_fixed = trunk(jax.lax.stop_gradient(state.critic.phi.blocks), x)
        return sum(jnp.sum(trunk(b, x)) for b in blocks) + jnp.sum(through_fixed)

    gradients = jax.grad(loss, (0, 1))([net.blocks for net in nets], x)
    return state, gradients


VARIANTS = {
    "as it is": (crl.update, {}),
    "psi(g) encoded twice, nine passes over the depth": (nine_passes, {}),
    "trunks of actor, phi and psi stacked, four passes": (partial(update, stacked), {}),
    "weights' gradients out of the loop": (partial(update, hoisted), {}),
    "scan_unroll=4": (crl.update, {"scan_unroll": 4}),
    "remat=none": (crl.update, {"remat": "none"}),
    "remat=full": (crl.update, {"remat": "full"}),
    "dtype=bfloat16": (crl.update, {"dtype": "bfloat16"}),
    "its matrix products alone": (products_alone, {}),
}
OTHER_NUMBERS = "dtype=bfloat16", "its matrix products alone"
"""Variants that do not compute the same parameters."""


def kernels(hlo: str) -> int:
    """Kernels that one run of an optimised HLO module launches, those in loops of known length counted each time."""
    free = r"parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|after-all|partition-id"
    bodies, entry = {}, ""
    for header, body in re.findall(r"^((?:ENTRY )?%?\S+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S):
        name = header.removeprefix("ENTRY ").lstrip("%")
        bodies[name] = body
        entry = name if header.startswith("ENTRY") else entry

    def count(name: str) -> Counter:
        total = Counter()
        for line in bodies[name].splitlines():
            operation = re.match(r"\s*(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line)
            if not operation:
                continue
            if operation[1] == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.-]+)", line)[1]
                for kind, number in count(body).items():
                    total[kind] += number * (int(trips[1]) if trips else 1)
            elif operation[1] == "call":
                total += count(re.search(r"to_apply=%?([\w.-]+)", line)[1])
            elif not re.fullmatch(free, operation[1]):
                total[operation[1]] += 1
        return total

    return count(entry).total()


def profile(setting: str, rounds: int, **sizes) -> list[dict]:
    """A row a variant; time against that of crl.py as it is."""
    programs, states, rows = {}, {}, []
    for name, (function, options) in VARIANTS.items():
        config, env, state = gradient_step_inputs(**sizes, **options)
        step = jax.jit(partial(function, config, env), donate_argnums=0)
        seconds, programs[name] = measure.compiled(step, state, jax.random.key(0))
        states[name], _ = programs[name](state, jax.random.key(0))
        if name not in OTHER_NUMBERS:
            for x, y in zip(*(jax.tree.leaves((states[n].actor, states[n].critic)) for n in ("as it is", name))):
                # Adam's first step is the gradient's sign, which rounding decides where it is zero
                assert np.mean(np.abs(x - y) > 1e-5) < 1e-3, f"{name} is another step"
        rows.append({"setting": setting, "variant": name, "compile_s": f"{seconds:.1f}"})

    def run_once(name):
        states[name], seen = programs[name](states[name], jax.random.key(1))
        return states[name].updates, seen

    seconds = measure.interleaved({name: partial(run_once, name) for name in VARIANTS}, rounds)
    for row in rows:
        name = row["variant"]
        row["step_ms"] = f"{1e3 * np.median(seconds[name]):.1f}"
        row["ratio"] = f"{np.median(seconds[name] / seconds['as it is']):.2f}"
        row["kernels"] = kernels(programs[name].as_text())
        row["temporary_mb"] = f"{programs[name].memory_analysis().temp_size_in_bytes / 1e6:.0f}"
        print(row, flush=True)
    return rows


def main():
    print(measure.facts(), flush=True)
    rows = profile("depth 4, width 64, batch 256", 21, depth=4, width=64, batch_size=256)
    rows += profile("depth 16, width 256, batch 256", 11, depth=16, batch_size=256)
    rows += profile("depth 64, width 256, batch 256", 7, depth=64, batch_size=256)
    how = f"python results/bench_update.py; {measure.facts('humanoid sizes')}"
    measure.write(f"bench_update_{jax.default_backend()}", how, rows)


if __name__ == "__main__":
    main()
