"""One gradient step of crl.py, profiled on this device: the third part of `make bench`.

    python experiments/bench_update.py        about 3 minutes on 2 cores; writes bench_update_DEVICE.csv

Ways to compute the same step, in turns in one process, each but for bfloat16 checked to give the same gradients; the
bare matrix products of the step; and how many kernels the compiled program runs in a step, from its optimised HLO:
fusions, matrix products, copies and so on, those in a loop as often as it turns.
"""

import re
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

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


def separate(nets, inputs):
    """As in crl.py: a loop over the depth for each network."""
    return [jax.vmap(net)(x) for net, x in zip(nets, inputs)]


class Apart(eqx.Module):
    """A block whose four layers are not stacked on an axis."""

    layers: tuple

    def __call__(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y


def apart(nets):
    split = lambda block: Apart(tuple(jax.tree.map(lambda leaf, i=i: leaf[:, i], block.layers) for i in range(4)))
    return tuple(eqx.tree_at(lambda net: net.blocks, net, split(net.blocks)) for net in nets)


class Towers(NamedTuple):
    """Networks whose trunks are one: leaves of `blocks` are (blocks, networks, 4, ...)."""

    stems: tuple
    blocks: networks.Block
    heads: tuple


def stack(nets) -> Towers:
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *[net.blocks for net in nets])
    return Towers(tuple(net.stem for net in nets), blocks, tuple(net.head for net in nets))


def stacked(towers, inputs):
    """One loop over the depth for all."""

    def step(x, block):
        return jax.vmap(lambda block, x: jax.vmap(block)(x))(block, x), None

    x = jnp.stack([jax.vmap(stem)(x) for stem, x in zip(towers.stems, inputs)])
    step = jax.checkpoint(step, policy=networks.REMAT_POLICIES["dots"], prevent_cse=False)
    x, _ = jax.lax.scan(step, x, towers.blocks)
    return [jax.vmap(head)(x) for head, x in zip(towers.heads, x)]


def only(towers: Towers, i: int) -> Towers:
    blocks = jax.tree.map(lambda leaf: leaf[:, i : i + 1], towers.blocks)
    return Towers(towers.stems[i : i + 1], blocks, towers.heads[i : i + 1])


def hoisted(nets, inputs):
    """A loop for each, but the gradients of the weight matrices are one batched product after it."""
    return [jax.vmap(net.head)(hoisted_trunk(net.blocks, jax.vmap(net.stem)(x))) for net, x in zip(nets, inputs)]


def activate(norm, z):
    return swish(jax.vmap(norm)(z))


def layers_of(block):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], block.layers) for i in range(4)]


def forward_block(x, block):
    y, products = x, []
    for layer in layers_of(block):
        products.append(y @ layer.dense.weight.T + layer.dense.bias)
        y = activate(layer.norm, products[-1])
    return x + y, (x, products)


@jax.custom_vjp
def hoisted_trunk(blocks, x):
    return jax.lax.scan(forward_block, x, blocks)[0]


def hoisted_forward(blocks, x):
    x, kept = jax.lax.scan(forward_block, x, blocks)
    return x, (blocks, kept)


def hoisted_backward(saved, gradient):
    def backward_block(gradient, row):
        block, (x, products) = row
        layers, d, norms, to_products, inputs = layers_of(block), gradient, [], [], []
        for i in reversed(range(4)):
            norm, d = jax.vjp(activate, layers[i].norm, products[i])[1](d)
            norms.append(norm)
            to_products.append(d)
            inputs.append(activate(layers[i - 1].norm, products[i - 1]) if i else x)
            d = d @ layers[i].dense.weight
        in_order = lambda rows: jax.tree.map(lambda *leaves: jnp.stack(leaves), *reversed(rows))
        return gradient + d, (in_order(norms), in_order(to_products), in_order(inputs))

    gradient, (norms, to_products, inputs) = jax.lax.scan(backward_block, gradient, saved, reverse=True)
    new = jnp.einsum("klbo,klbi->kloi", to_products, inputs), to_products.sum(axis=2), norms
    where = lambda blocks: (blocks.layers.dense.weight, blocks.layers.dense.bias, blocks.layers.norm)
    return eqx.tree_at(where, saved[0], new), gradient


hoisted_trunk.defvjp(hoisted_forward, hoisted_backward)


class Way(NamedTuple):
    """How the parameters of a tuple of networks are kept, how all are applied, and how one of them is picked."""

    keep: callable
    apply: callable
    only: callable


PICK = lambda nets, i: nets[i : i + 1]
APART, STACKED = Way(apart, separate, PICK), Way(stack, stacked, only)
HOISTED = Way(tuple, hoisted, PICK)


# ---- the gradient step --------------------------------------------------------------------------------------------


def prepare(way: Way, config, state: crl.TrainState) -> crl.TrainState:
    """A state whose `agent.actor` holds the parameters of actor, phi and psi as this way keeps them, with one Adam."""
    actor, critic, log_alpha = state.agent
    agent = crl.Agent(way.keep((actor, critic.phi, critic.psi)), None, log_alpha)
    return state._replace(agent=agent, optimizer=crl.make_optimizer(config).init(agent))


def update(way: Way, config, env, state, key):
    """crl.update as one gradient of the summed losses, the networks applied in this way."""
    batch_key, actor_key = jax.random.split(key)
    agent = state.agent
    batch = crl.sample(config, env, state.replay, batch_key)
    join = lambda *parts: jnp.concatenate(parts, axis=-1)

    def loss(parameters):
        inputs = join(batch.observation, batch.goal), join(batch.observation, batch.action), batch.goal
        output, phi, psi = way.apply(parameters, inputs)
        critic = SimpleNamespace(encode_state_action=lambda *_: phi, encode_goal=lambda _: psi)
        critic_loss, (psi, critic_info) = crl.critic_loss(critic, batch, config)
        fixed, psi = jax.lax.stop_gradient((way.only(parameters, 1), psi))
        critic = SimpleNamespace(encode_state_action=lambda *parts: way.apply(fixed, (join(*parts),))[0])
        with mock.patch.object(crl, "policy", lambda *_: SquashedGaussian.from_output(output)):
            fixed_agent = agent._replace(critic=critic)
            actor_loss, actor_info = crl.actor_loss(None, fixed_agent, psi, batch, actor_key, config)
        return critic_loss + actor_loss, actor_info | critic_info

    gradient, info = jax.grad(loss, has_aux=True)(agent.actor)
    target_entropy = -config.target_entropy_scale * env.action_size
    alpha_gradient = jax.grad(crl.alpha_loss)(agent.log_alpha, info["train/entropy"], target_entropy)
    gradient = crl.Agent(gradient, None, alpha_gradient)
    updates, optimizer = crl.make_optimizer(config).update(gradient, state.optimizer)
    agent = optax.apply_updates(agent, updates)
    return state._replace(agent=agent, optimizer=optimizer, gradient_steps=state.gradient_steps + 1), info


def nine_passes(config, env, state, key):
    """crl.update as it was, where the actor's loss encodes the goals once more."""
    actor_loss = crl.actor_loss

    def encode_again(actor, agent, psi, batch, *rest):
        # behind a barrier, or XLA might find that it was computed already
        psi = agent.critic.encode_goal(jax.lax.optimization_barrier(batch.goal))
        return actor_loss(actor, agent, psi, batch, *rest)

    with mock.patch.object(crl, "actor_loss", encode_again):
        return crl.update(config, env, state, key)


def products_alone(config, env, state, key):
    """The matrix products of the blocks in a step, and nothing else: eleven for each layer."""

    def trunk(weights, x):
        def step(x, weights):
            for weight in weights:
                x = x @ weight.T
            return x, None

        return jax.lax.scan(step, x, weights)[0]

    def loss(weights, inputs):
        fixed = jax.lax.stop_gradient(weights[1])
        outputs = [trunk(w, x) for w, x in zip((*weights, fixed), inputs)]
        return sum(jnp.sum(y**2) for y in outputs)

    actor, (phi, psi), _ = state.agent
    weights = [net.blocks.layers.dense.weight for net in (actor, phi, psi)]
    inputs = jax.random.normal(key, (4, config.batch_size, config.width))
    return state, jax.grad(loss, (0, 1))(weights, list(inputs))


AS_IT_IS, PRODUCTS = "crl.py as it is", "its matrix products alone"
VARIANTS = {
    AS_IT_IS: (crl.update, {}),
    "psi(g) encoded twice: nine passes over the depth": (nine_passes, {}),
    "a block's layers apart: 16 arrays a block, not 4": (APART, {}),
    "trunks of actor, phi and psi stacked: four passes": (STACKED, {}),
    "weights' gradients out of the loop": (HOISTED, {}),
    "--scan_unroll 4": (crl.update, {"scan_unroll": 4}),
    "--remat none": (crl.update, {"remat": "none"}),
    "--remat full": (crl.update, {"remat": "full"}),
    "--dtype bfloat16": (crl.update, {"dtype": "bfloat16"}),
    PRODUCTS: (products_alone, {}),
}
"""Name -> a gradient step or the way through its networks, and settings."""
OTHER_NUMBERS = "--dtype bfloat16", PRODUCTS
"""Variants that do not compute the same gradients."""


def kernels(hlo: str) -> int:
    """Kernels that one run of an optimised HLO module launches, those in a loop counted at each of its turns.

    ValueError where that is not known: a loop of unknown length, a conditional.
    """
    free = r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|.*-done"
    bodies, entry = {}, ""
    for header, body in re.findall(r"^((?:ENTRY )?%?\S+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S):
        name = header.removeprefix("ENTRY ").lstrip("%")
        bodies[name] = body
        entry = name if header.startswith("ENTRY") else entry

    def count(name: str) -> Counter:
        total = Counter()
        for line in bodies[name].splitlines():
            operation = re.match(r"\s*(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line)
            if not operation or re.fullmatch(free, operation[1]):
                continue
            if operation[1] == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if not trips:
                    raise ValueError(f"a loop of unknown length: {line[:80]}")
                for kind, number in count(re.search(r"body=%?([\w.-]+)", line)[1]).items():
                    total[kind] += number * int(trips[1])
            elif operation[1] == "call":
                total += count(re.search(r"to_apply=%?([\w.-]+)", line)[1])
            elif operation[1] == "conditional":
                raise ValueError(f"a conditional: {line[:80]}")
            else:
                total[operation[1]] += 1
        return total

    return count(entry).total()


def variant(name: str, **sizes):
    """A jitted gradient step of a variant, and its first state."""
    function, options = VARIANTS[name]
    config, env, state = gradient_step_inputs(**sizes, **options)
    if isinstance(function, Way):
        state = prepare(function, config, state)
        function = partial(update, function)
    return partial(function, config, env), state


def gradients(name: str, state: crl.TrainState):
    """Adam's first moments of actor, phi and psi after a first step: a tenth of the gradients."""
    moments = lambda part: optax.tree_utils.tree_get(state.optimizer.inner_states[part], "mu")
    actor, critic = moments("actor").actor, moments("critic").critic
    return actor if isinstance(VARIANTS[name][0], Way) else (actor, critic.phi, critic.psi)


def check(name: str, state: crl.TrainState, reference: crl.TrainState) -> None:
    """AssertionError if a variant's first step had other gradients than crl.py's."""
    way = VARIANTS[name][0]
    expected = gradients(AS_IT_IS, reference)
    expected = way.keep(expected) if isinstance(way, Way) else expected
    for x, y in zip(*map(jax.tree.leaves, (gradients(name, state), expected)), strict=True):
        off = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
        assert off < 2e-3, f"{name}: a gradient is off by {off:.1%}"


def profile(setting: str, rounds: int, **sizes) -> list[dict]:
    """A row a variant; time against that of crl.py as it is."""
    programs, states, rows = {}, {}, []
    for name in VARIANTS:
        step, state = variant(name, **sizes)
        seconds, programs[name] = measure.compiled(jax.jit(step, donate_argnums=0), state, jax.random.key(0))
        states[name], _ = programs[name](state, jax.random.key(0))
        if name not in OTHER_NUMBERS:
            check(name, states[name], states[AS_IT_IS])
        rows.append({"setting": setting, "variant": name, "compile_s": round(seconds, 1)})

    def once(name):
        states[name], seen = programs[name](states[name], jax.random.key(1))
        return states[name].gradient_steps, seen

    seconds = measure.interleaved({name: partial(once, name) for name in VARIANTS}, rounds)
    for row in rows:
        name = row["variant"]
        row["step_ms"] = round(1e3 * float(np.median(seconds[name])), 1)
        row["ratio"] = round(float(np.median(seconds[name] / seconds[AS_IT_IS])), 2)
        row["kernels"] = kernels(programs[name].as_text())
        row["temporary_mb"] = round(programs[name].memory_analysis().temp_size_in_bytes / 1e6)
        print(row, flush=True)
    return rows


def main():
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    rows, how = [], f"python experiments/bench_update.py; {measure.facts('humanoid sizes')}"
    print(how, flush=True)
    for depth, width, rounds in ((4, 64, 21), (16, 256, 11), (64, 256, 7)):
        rows += profile(f"depth {depth}, width {width}, batch 256", rounds, depth=depth, width=width, batch_size=256)
        measure.write(f"bench_update_{jax.default_backend()}", how, rows)


if __name__ == "__main__":
    main()
