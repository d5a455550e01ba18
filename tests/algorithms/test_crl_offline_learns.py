"""What the critics of crl_offline.py come to know: on walks around a ring, where the right answers can be added up."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from stubs import Sizes

from algorithms import crl_offline
from shared import offline

OPTIMISED = True
RING = 6
"""States on a circle; an action goes one on, or stays. So the way back is the long one."""
PLACES = np.stack([f(2 * np.pi * np.arange(RING) / RING) for f in (np.cos, np.sin)], axis=1).astype(np.float32)


def walks(number=200, steps=30):
    """States and actions of random walks, (walks, steps + 1), and the same as data."""
    random = np.random.default_rng(0)
    ahead = random.integers(0, 2, (number, steps + 1))
    state = random.integers(0, RING, (number, 1)) + np.cumsum(ahead, axis=1) - ahead
    row = np.arange(ahead.size, dtype=np.int32).reshape(ahead.shape)
    data = offline.Data(
        observation=jnp.array(PLACES[state % RING].reshape(-1, 2)),
        action=jnp.float32(2 * ahead.reshape(-1, 1) - 1),
        rows=jnp.array(row[:, :-1].ravel()),
        final=jnp.array(np.repeat(row[:, -2], steps + 1)),
    )
    return state % RING, ahead, data


def trained(name, data, width):
    config = crl_offline.Config(
        agent=name, width=width, latent_size=16, batch_size=128, learning_rate=1e-3, discount=0.7, chunk=1000
    )
    config = crl_offline.settle(config)
    state = crl_offline.init(config, Sizes(2, 1, 2), data, jax.random.key(0))
    learn = jax.jit(partial(crl_offline.learn, config))
    for _ in range(2):
        state, _ = learn(state)
    return state.agent


def test_the_contrastive_critic_is_the_logarithm_of_how_much_likelier_a_goal_becomes():
    """With B rows, log p(g | s, a) / p(g) - log(B - 1): here by adding up every goal of every row of the data."""
    state, ahead, data = walks()
    agent = trained("crl", data, width=32)
    joint, final = np.zeros((RING, 2, RING)), state.shape[1] - 2
    for i in range(final + 1):
        for j in range(i, final + 1):
            further = 0.3 * 0.7 ** (j - i - 1) if j > i else 0.0
            weight = (0.7 ** (j - i - 1) if j > i else 1.0) if j == final else further
            np.add.at(joint, (state[:, i], ahead[:, i], state[:, j]), weight)
    joint /= joint.sum()
    wanted = np.log(joint / joint.sum(axis=2, keepdims=True) / joint.sum(axis=(0, 1))) - np.log(127)
    observation, action = jnp.array(np.repeat(PLACES, 2, axis=0)), jnp.tile(jnp.array([[-1.0], [1.0]]), (RING, 1))
    found = crl_offline.logits(agent, observation, action, jnp.array(PLACES)).mean(axis=0).reshape(RING, 2, RING)
    assert np.abs(found - wanted).mean() < 0.35
    assert np.corrcoef(np.ravel(found), np.ravel(wanted))[0, 1] > 0.93


def test_the_quasimetric_is_the_number_of_steps_there_and_not_the_number_back():
    """Steps may be up to 1 + sqrt(0.05) long, and the multiplier is still on its way: the unit is more than 1."""
    agent = trained("qrl", walks()[2], width=64)
    z = jax.vmap(agent.psi)(jnp.array(PLACES))
    found = np.asarray(crl_offline.distance(agent, z[:, None].repeat(RING, 1), z[None].repeat(RING, 0)))
    steps = (np.arange(RING) - np.arange(RING)[:, None]) % RING
    unit = found[steps == 1].mean()
    assert 1 < unit < 1.6
    assert np.corrcoef(found.ravel(), steps.ravel())[0, 1] > 0.95
    assert found[steps == 5].mean() > 3.5 * unit
