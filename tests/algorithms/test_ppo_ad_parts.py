"""The parts of ppo_ad.py on a small scripted environment: acting, episodes, learning, the auxiliary phase, the probe.

Expected values come from slow loops over lists of exact sizes, written from the fact sheet (and given the same random
draws), on the formulas of test_ppo_ad_losses.py.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_ppo_ad_losses import (
    CONFIG,
    NORMALISER,
    Blank,
    SlowNormaliser,
    act,
    contrast,
    encode,
    exact,
    jit,
    predict,
    random_agent,
    unit,
    unit_rows,
)
from test_transport import pot

from algorithms import ppo_ad
from envs import AchievementState
from shared.networks import count_parameters

ACHIEVEMENTS, FEATURES = 4, 5
NEVER = 99

# ---- sizes and initial weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64, 3), (63, 63, 3)])
@pytest.mark.parametrize(("distill", "parameters"), [(False, 3_948_306), (True, 9_234_228)])
def test_parameter_counts_are_the_papers(shape, distill, parameters):
    """Known answer 1: 4M and 9M."""
    make = partial(ppo_ad.make_agent, ppo_ad.Config(distill=distill), Blank(shape, actions=17))
    agent = jax.eval_shape(make, jax.random.key(0))
    assert count_parameters(agent) == parameters
    assert count_parameters(agent.encoder) == 3_929_856


@pytest.fixture(scope="module")
def paper_agent():
    config, env = ppo_ad.Config(), Blank((63, 63, 3), actions=17)
    return jit(lambda key: ppo_ad.make_agent(config, env, key))(jax.random.key(0))


def test_initial_filters_have_the_papers_norms(paper_agent):
    """Known answer 2, the table of section 1.2."""
    agent, encoder = paper_agent, paper_agent.encoder
    layers = [(stack.first, 1.0) for stack in encoder.stacks]
    layers += [(conv, 0.63894) for stack in encoder.stacks for pair in stack.blocks for conv in pair]
    layers += [(encoder.dense, 1.4), (encoder.latent, 1.0)]
    layers += [(mlp.hidden, 1.4) for mlp in (agent.film, agent.predictor)]
    layers += [(mlp.out, 1.0) for mlp in (agent.film, agent.predictor)]
    assert len(layers) == 3 + 12 + 2 + 4
    for layer, norm in layers:
        weight = np.asarray(layer.weight)
        weight = np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], -1) if weight.ndim == 4 else weight
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), norm, rtol=1e-4)
        assert np.ptp(weight, axis=0).min() > 0, "filters are alike"
    for head, gain in ((agent.policy, 0.01), (agent.value, 0.1)):
        weight = np.asarray(head.weight, float)
        np.testing.assert_allclose(weight @ weight.T, gain**2 * np.eye(len(weight)), atol=1e-5 * gain)
        assert weight.shape[1] == 2048
    biases = [agent.policy.bias, agent.value.bias, agent.film.out.bias, agent.predictor.out.bias]
    assert not any(np.asarray(bias).any() for bias in [*biases, encoder.stacks[0].first.bias])
    norms = [layer.layer_norm for layer in (encoder.dense, encoder.latent, agent.film.hidden, agent.predictor.hidden)]
    norms += [stack.image_norm for stack in encoder.stacks]
    norms += [layer.image_norm for layer, _ in layers[1:15]]
    assert all((np.asarray(norm.weight) == 1).all() and not np.asarray(norm.bias).any() for norm in norms)


def test_the_first_policy_is_nearly_uniform(paper_agent):
    """Known answers 1 and 2: the latent state, and entropy ln 17."""
    rng = np.random.default_rng(0)

    @jit
    def run(agent, images, memory):
        latent = ppo_ad.encode(agent, images)
        return latent, *ppo_ad.act(agent, latent, memory)

    images = jnp.array(rng.random((4, 63, 63, 3)), jnp.float32)
    latent, log_probs, value = run(paper_agent, images, jnp.array(unit_rows(rng, 4, 1024)))
    assert latent.shape == (4, 1024) and (np.asarray(latent) >= 0).all()
    assert ((np.asarray(latent) > 0).mean(axis=1) > 0.2).all()
    entropy = -np.sum(np.exp(log_probs) * np.asarray(log_probs), axis=1)
    np.testing.assert_allclose(entropy, math.log(17), atol=0.01)
    assert np.ptp(log_probs) > 1e-4
    np.testing.assert_allclose(ppo_ad.Normaliser(*jnp.zeros(3)).denormalise(value), 0.1 * value, rtol=1e-5)


# ---- acting --------------------------------------------------------------------------------------------------------


class Script(NamedTuple):
    clock: jax.Array
    unlock: jax.Array
    """The step at which each achievement is unlocked."""
    end: jax.Array
    """The step at which the environment ends the episode."""
    key: jax.Array


class Scripted(Blank):
    """Random observations, whatever one does; achievements and ends come when the script says so."""

    name = "scripted"

    def reset(self, key):
        unlock = jax.random.randint(key, (ACHIEVEMENTS,), 0, 14)
        end = jax.random.randint(jax.random.fold_in(key, NEVER), (), 3, 16)
        script = Script(jnp.zeros((), jnp.int32), unlock, end, key)
        zero = jnp.zeros(())
        return self.state(script, jnp.zeros(ACHIEVEMENTS, bool), zero, jnp.zeros((), bool))

    def step(self, state, action):
        script = state.physics
        bits = state.achievements | (script.clock == script.unlock)
        reward = jnp.sum(bits & ~state.achievements) + 0.1 * action
        after = script._replace(clock=script.clock + 1)
        return self.state(after, bits, reward.astype(jnp.float32), script.clock == script.end)

    def state(self, script, bits, reward, terminated):
        return AchievementState(script, look(script.key, script.clock), reward, terminated, bits)


def look(key, clock):
    return jax.random.normal(jax.random.fold_in(key, clock), (FEATURES,))


LIMIT, STEPS, ENVS = 10, 7, 4
ACTING = dataclasses.replace(
    CONFIG, env="scripted", num_envs=ENVS, episode_length=LIMIT, unroll_length=STEPS, auxiliary_every=3,
    discount=0.9, gae_lambda=0.7, num_minibatches=4, update_epochs=2, value_weight=0.7, entropy_weight=0.3, clip=0.15,
)  # fmt: skip
VECTOR = Scripted().vectorise(ENVS, LIMIT)
SCRIPTS = (
    ([2, 6, NEVER, NEVER], NEVER),  # the worked example
    ([9, NEVER, NEVER, 3], NEVER),  # something on the last step, at the time limit
    ([0, 4, NEVER, NEVER], 4),  # the same where the environment ends the episode
    ([5, 5, 6, NEVER], 9),  # two at once; one on the last step of a rollout; ended on the step of the time limit
)
"""Of the first episodes."""


def make_state(config, seed, acting=None):
    """A state before the first step, with random weights."""
    agent = random_agent(config, seed, Scripted())
    cold = jax.eval_shape(ppo_ad.make_optimizer(config).init, agent)
    optimizers = {name: warm(cold, seed + i) for i, name in enumerate(("ppo", "prediction", "matching"))}
    shape = config.num_envs, config.auxiliary_every * config.unroll_length
    window = window_of(
        observation=jnp.zeros((*shape, FEATURES)),
        action=jnp.zeros(shape, jnp.int32),
        memory=jnp.zeros((*shape, ppo_ad.memory_size(config))),
        returns=jnp.zeros(shape),
        unlocked=jnp.zeros(shape, bool),
        episode_steps=jnp.zeros(shape, jnp.int32),
    )
    zero, key = jnp.array(0), jax.random.key(seed + 1)
    successes = jnp.zeros(ACHIEVEMENTS, jnp.int32)
    return ppo_ad.TrainState(agent, NORMALISER, optimizers, acting, window, zero, successes, zero, zero, key)


def window_of(**fields):
    """A window with these fields; what the auxiliary phase does not read is 0."""
    shape = fields["action"].shape
    blank = {name: jnp.zeros(shape) for name in ("value", "reward", "episode_return", "advantage")}
    blank |= {"log_probs": jnp.zeros((*shape, 3)), "done": jnp.zeros(shape, bool)}
    return ppo_ad.Step(**blank, achievements=jnp.zeros((*shape, ACHIEVEMENTS), bool), **fields)


def warm(optimizer, seed):
    """Adam's state after some steps, so that the size of the next gradient matters, and no rounding of a zero does."""
    rng = np.random.default_rng(seed)
    clip, (adam, *rest) = optimizer
    mu = jax.tree.map(lambda x: jnp.array(1e-3 * rng.normal(size=x.shape), jnp.float32), adam.mu)
    nu = jax.tree.map(lambda x: jnp.array(1e-5 * (1 + rng.random(x.shape)), jnp.float32), adam.nu)
    return clip, (adam._replace(count=jnp.array(7, jnp.int32), mu=mu, nu=nu), *rest)


def decided(agent):
    """With a policy far from uniform, so that one sees whether actions are drawn from it."""
    return eqx.tree_at(lambda agent: agent.policy.weight, agent, 4 * agent.policy.weight)


@pytest.fixture(scope="module")
def start():
    """The state before the first step."""
    state = make_state(ACTING, 0)
    state = state._replace(agent=decided(state.agent))
    acting = jit(partial(ppo_ad.start_acting, ACTING, VECTOR))(state.agent, jax.random.key(0))
    state = state._replace(acting=acting)
    envs = state.acting.envs
    unlock, end = (jnp.array(x) for x in zip(*SCRIPTS))
    envs = envs._replace(env=envs.env._replace(physics=envs.env.physics._replace(unlock=unlock, end=end)))
    return state._replace(acting=state.acting._replace(envs=envs))


ROLLOUTS = 3


class Recorded(NamedTuple):
    """Three rollouts, with two agents by turns."""

    bootstrap: bool
    steps: ppo_ad.Step
    """All in one, in NumPy."""
    agents: list
    """Of each step, in float64."""
    acting: list
    """After each rollout."""


@pytest.fixture(scope="module")
def recordings(start):
    both = []
    for bootstrap in (False, True):
        config = dataclasses.replace(ACTING, bootstrap_time_limit=bootstrap)
        collect, agents = jit(partial(ppo_ad.collect, config, VECTOR)), [start.agent, decided(random_agent(ACTING, 1))]
        actings, rollouts = [start.acting], []
        for i in range(ROLLOUTS):
            acting, steps = collect(start._replace(agent=agents[i % 2], acting=actings[-1]))
            actings.append(acting)
            rollouts.append(steps)
        steps = jax.tree.map(lambda *x: np.concatenate(x), *rollouts)
        used = [exact(agents[t // STEPS % 2]) for t in range(ROLLOUTS * STEPS)]
        both.append(Recorded(bootstrap, steps, used, actings[1:]))
    return both


@pytest.fixture(params=[0, 1], ids=["published", "bootstrap"])
def recorded(recordings, request):
    return recordings[request.param]


def slow_memories(steps, used):
    """Of each environment and step (and after the last step of each rollout), by the rules of section 1.3."""
    for e in range(ENVS):
        memory, bits = np.zeros(CONFIG.latent_size), np.zeros(ACHIEVEMENTS, bool)
        for t in range(ROLLOUTS * STEPS - 1):
            yield e, t, memory
            if steps.done[t, e]:
                memory, bits = np.zeros_like(memory), np.zeros_like(bits)
                continue
            if (steps.achievements[t, e] != bits).any():
                bits, agent = steps.achievements[t, e], used[t]
                memory = unit(encode(agent, steps.observation[t + 1, e]) - encode(agent, steps.observation[t, e]))


def test_memories_of_the_worked_example(recorded):
    """Known answer 4: unlocked at t = 2 and t = 6 in an episode of length 10. The second is on the last step of a
    rollout; the weights that collected it make its memory, not those that act next."""
    _, steps, used, *_ = recorded
    memory, phi = steps.memory[:, 0], lambda agent, t: encode(agent, steps.observation[t, 0].astype(float))
    assert not memory[:3].any()
    first, second = (unit(phi(used[t], t + 1) - phi(used[t], t)) for t in (2, 6))
    np.testing.assert_allclose(memory[3:7], np.tile(first, (4, 1)), atol=1e-4)
    np.testing.assert_allclose(memory[7:10], np.tile(second, (3, 1)), atol=1e-4)
    assert not memory[10].any()
    np.testing.assert_array_equal(np.flatnonzero(steps.done[:, 0])[:1], [9])
    np.testing.assert_array_equal(np.flatnonzero(steps.unlocked[:10, 0]), [2, 6])
    other = unit(phi(used[7], 7) - phi(used[7], 6))
    assert np.abs(other - second).max() > 0.05, "the two agents see it alike, so this test says nothing"


def test_memories_equal_a_loop(recorded):
    _, steps, used, *_ = recorded
    for e, t, memory in slow_memories(steps, used):
        np.testing.assert_allclose(steps.memory[t, e], memory, atol=1e-4, err_msg=f"{e} {t}")
    assert (np.abs(steps.memory[STEPS:, 3]).max(1) > 0).any()


def test_what_is_unlocked_on_the_last_step_counts_but_is_no_goal(recorded):
    """Known answer 5."""
    steps = recorded.steps
    for e, t in ((1, 9), (2, 4)):
        assert steps.done[t, e] and not steps.unlocked[t, e]
        assert steps.achievements[t, e].sum() == 2 and steps.achievements[t - 1, e].sum() == 1
        assert steps.episode_steps[t + 1, e] == 1 and not steps.memory[t + 1, e].any()
        assert not steps.achievements[t + 1, e, 0] or steps.unlocked[t + 1, e] or steps.done[t + 1, e]


def test_steps_record_what_happened(recorded):
    bootstrap, steps, used, actings = recorded
    surprise = surprise_if_uniform = variance = 0
    for e in range(ENVS):
        episode_return = length = 0
        bits = np.zeros(ACHIEVEMENTS, bool)
        for t in range(ROLLOUTS * STEPS):
            log_probs, value = act(used[t], encode(used[t], steps.observation[t, e].astype(float)), steps.memory[t, e])
            action = steps.action[t, e]
            np.testing.assert_allclose(steps.log_probs[t, e], log_probs, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(steps.value[t, e], value, rtol=1e-4, atol=1e-5)
            surprise += log_probs[action] - np.exp(log_probs) @ log_probs
            surprise_if_uniform += log_probs.mean() - np.exp(log_probs) @ log_probs
            variance += np.exp(log_probs) @ log_probs**2 - (np.exp(log_probs) @ log_probs) ** 2
            new, length = steps.achievements[t, e] & ~bits, length + 1
            bits = steps.achievements[t, e]
            episode_return += new.sum() + 0.1 * action
            assert steps.unlocked[t, e] == (new.any() and not steps.done[t, e])
            np.testing.assert_allclose(steps.episode_return[t, e], episode_return, rtol=1e-5)
            assert steps.episode_steps[t, e] == length
            assert steps.advantage[t, e] == steps.returns[t, e] == 0
            if steps.done[t, e]:
                episode_return, length, bits = 0, 0, np.zeros_like(bits)
            elif not bootstrap:
                np.testing.assert_allclose(steps.reward[t, e], new.sum() + 0.1 * action, rtol=1e-5)
    assert abs(surprise) < 4 * math.sqrt(variance), "actions are not drawn from the policy"
    assert surprise_if_uniform < surprise - 8 * math.sqrt(variance)
    for i, acting in enumerate(actings[:-1]):
        t = STEPS * (i + 1)
        np.testing.assert_array_equal(acting.memory, steps.memory[t])
        for e in range(ENVS):
            latent = encode(used[t - 1], steps.observation[t, e].astype(float))
            np.testing.assert_allclose(acting.latent[e], latent, rtol=1e-4, atol=1e-5)


def test_returns_go_on_at_the_time_limit_only_if_asked(recorded, start):
    """The value of the state that the time limit cut off, with what its last step unlocked as its memory."""
    bootstrap, steps, used, _ = recorded
    mean, deviation = SlowNormaliser(NORMALISER).moments()
    keys = start.acting.envs.env.physics.key
    raw = lambda t, e, new: new + 0.1 * steps.action[t, e]
    for e, new in ((0, 0), (1, 1)):
        assert steps.done[9, e]
        agent, terminal = used[9], encode(used[9], np.asarray(look(keys[e], 10), float))
        memory = unit(terminal - encode(agent, steps.observation[9, e].astype(float))) if new else steps.memory[9, e]
        value = mean + deviation * act(agent, terminal, memory)[1]
        expected = raw(9, e, new) + (0.9 * value if bootstrap else 0)
        np.testing.assert_allclose(steps.reward[9, e], expected, rtol=1e-4)
        assert abs(value) > 0.01
    for e, t in ((2, 4), (3, 9)):
        assert steps.done[t, e]
        np.testing.assert_allclose(steps.reward[t, e], raw(t, e, e == 2), rtol=1e-5)


# ---- learning ------------------------------------------------------------------------------------------------------


class SlowAdam:
    """Kingma and Ba's algorithm, after clipping the gradient's norm."""

    def __init__(self, config, optimizer):
        _, (adam, *_) = optimizer
        self.config, self.count, self.mu, self.nu = config, int(adam.count), exact(adam.mu), exact(adam.nu)

    def step(self, agent, gradient):
        norm = math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * min(1, self.config.max_gradient_norm / norm), gradient)
        self.count += 1
        self.mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.mu, gradient)
        self.nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.nu, gradient)
        first, second = 1 - 0.9**self.count, 1 - 0.999**self.count
        rate = self.config.learning_rate
        move = lambda p, m, v: p - rate * (m / first) / (np.sqrt(v / second) + 1e-8)
        return jax.tree.map(move, agent, self.mu, self.nu)


def check_adam(optimizer, slow, count):
    _, (adam, *_) = optimizer
    assert adam.count == slow.count == count
    for got, expected in ((adam.mu, slow.mu), (adam.nu, slow.nu)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def total(trees):
    """Sum of gradients, in float64."""
    return jax.tree.map(lambda *x: sum(x), *map(exact, trees))


def mean(trees):
    trees = list(trees)
    return jax.tree.map(lambda x: x / len(trees), total(trees))


def assert_same_change(start, got, expected, tolerance=1e-4):
    """Of every leaf, what has been added to it; relative to the largest change."""
    for (path, a), b, c in zip(jax.tree.leaves_with_path(exact(start)), *map(jax.tree.leaves, (exact(got), expected))):
        assert np.abs(c - a).max() > 0
        scale = np.abs(c - a).max()
        np.testing.assert_allclose(b - a, c - a, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def learned(recordings, start):
    """Two updates, on the first two rollouts: the config, states before and after, and metrics."""
    recorded = recordings[0]
    config = dataclasses.replace(ACTING, total_env_steps=2 * ENVS * STEPS - ENVS)
    learn, states, infos = jit(partial(ppo_ad.learn, config)), [start], []
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: jnp.array(x[i * STEPS : (i + 1) * STEPS]), recorded.steps)
        after, info = learn(states[-1], recorded.acting[i], part)
        states.append(after)
        infos.append(info)
    return recorded, config, states, infos


def slow_returns(recorded, rollout, state):
    """Advantages and returns of a rollout, as lists over time and environments. The agent of `state` gives the value of
    what comes after it, and its normaliser the unit of values."""
    steps, at, advantage = recorded.steps, rollout * STEPS, np.zeros((STEPS, ENVS))
    acting, agent = recorded.acting[rollout], exact(state.agent)
    last = [act(agent, z, m)[1] for z, m in zip(np.asarray(acting.latent, float), np.asarray(acting.memory, float))]
    mean, deviation = SlowNormaliser(state.normaliser).moments()
    value = mean + deviation * np.concatenate([steps.value[at : at + STEPS], [last]]).astype(float)
    for e in range(ENVS):
        later = 0
        for t in reversed(range(STEPS)):
            on = 0 if steps.done[at + t, e] else 1
            delta = steps.reward[at + t, e] + 0.9 * on * value[t + 1, e] - value[t, e]
            later = advantage[t, e] = delta + 0.9 * 0.7 * on * later
    return advantage, advantage + value[:-1]


def test_an_update_equals_a_slow_one(learned):
    """Every gradient step of PPO, with the advantages standardised once (n - 1), minibatches, clipping and Adam."""
    recorded, config, (before, after, _), (info, _) = learned
    part = jax.tree.map(lambda x: x[:STEPS], recorded.steps)
    advantage, returns = slow_returns(recorded, 0, before)
    flat = advantage.ravel()
    standard = (flat - flat.mean()) / (math.sqrt(((flat - flat.mean()) ** 2).sum() / (flat.size - 1)) + 1e-8)

    @jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(agent, row, advantage, target):
        log_probs, value = act(agent, encode(agent, row.observation, jnp), row.memory, jnp)
        ratio = jnp.exp(log_probs[row.action] - row.log_probs[row.action])
        policy_loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.85, 1.15) * advantage)
        value_loss, entropy = (value - target) ** 2, -jnp.exp(log_probs) @ log_probs
        return policy_loss + 0.7 * value_loss - 0.3 * entropy, (policy_loss, value_loss, entropy)

    agent, normaliser = exact(before.agent), SlowNormaliser(before.normaliser)
    adam, parts = SlowAdam(config, before.optimizers["ppo"]), []
    key, update_key = jax.random.split(before.key)
    for epoch_key in jax.random.split(update_key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, ENVS * STEPS))
        for batch in order.reshape(4, -1):
            normaliser.update(returns.ravel()[batch])
            gradients = []
            for i in batch:
                row = jax.tree.map(lambda x, i=i: x[i // ENVS, i % ENVS], part)
                (value, more), gradient = loss(agent, row, standard[i], normaliser(returns.ravel()[i]))
                gradients.append(gradient)
                parts.append([value, *more])
            agent = adam.step(agent, mean(gradients))
    trained = ("encoder", "policy", "value")
    for name in trained:
        assert_same_change(getattr(before.agent, name), getattr(after.agent, name), getattr(agent, name))
    np.testing.assert_allclose(after.normaliser, normaliser.values(), rtol=1e-4)
    names = ("loss", "policy_loss", "value_loss", "entropy")
    np.testing.assert_allclose([info[f"train/{name}"] for name in names], np.mean(parts, axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(jax.random.key_data(after.key), jax.random.key_data(key))
    check_adam(after.optimizers["ppo"], adam, 7 + 8)


def test_rollouts_join_the_window_in_order(learned):
    recorded, config, (before, *states), _ = learned
    steps = recorded.steps
    for count, state in enumerate(states, 1):
        window = jax.tree.map(np.asarray, state.window)
        for name in set(ppo_ad.Step._fields) - {"advantage", "returns"}:
            for e, t in itertools.product(range(ENVS), range(STEPS * count)):
                np.testing.assert_array_equal(getattr(window, name)[e, t], getattr(steps, name)[t, e], err_msg=name)
        for i in range(count):
            returns = slow_returns(recorded, i, [before, *states][i])[1]
            np.testing.assert_allclose(window.returns[:, i * STEPS : (i + 1) * STEPS], returns.T, rtol=1e-4, atol=1e-5)
        assert not window.observation[:, STEPS * count :].any()
        assert (state.env_steps, state.ppo_steps) == (count * ENVS * STEPS, count * 8)
    first, second = slice(STEPS), slice(STEPS, 2 * STEPS)
    rollout = jax.tree.map(lambda x: jnp.array(x[second]), steps)
    full = states[-1]._replace(env_steps=jnp.array(3 * ENVS * STEPS))
    window = jit(partial(ppo_ad.learn, config))(full, recorded.acting[1], rollout)[0].window
    np.testing.assert_array_equal(window.observation[:, first], steps.observation[second].swapaxes(0, 1))
    np.testing.assert_array_equal(window.observation[:, second], steps.observation[second].swapaxes(0, 1))


def known(metric):
    """Of a metric that is a sum and a count."""
    total, count = metric
    return total / count


def test_scores_count_the_episodes_that_end_within_the_budget(learned):
    """The budget excludes the last step of the second rollout."""
    recorded, config, (_, *states), infos = learned
    steps = recorded.steps
    ended = [
        (t, e) for t in range(2 * STEPS) for e in range(ENVS)
        if steps.done[t, e] and (t + 1) * ENVS <= config.total_env_steps
    ]  # fmt: skip
    for i, (state, info) in enumerate(zip(states, infos), 1):
        far = [x for x in ended if x[0] < i * STEPS]
        now = [x for x in far if x[0] >= (i - 1) * STEPS]
        assert info["train/episodes"] == state.episodes == len(far)
        successes = sum(steps.achievements[x].astype(int) for x in far)
        np.testing.assert_array_equal(state.successes, successes)
        score = math.prod(1 + 100 * s / len(far) for s in successes) ** (1 / ACHIEVEMENTS) - 1
        np.testing.assert_allclose(known(info["train/score"]), score, rtol=1e-4)
        means = [np.mean([values[x] for x in now]) for values in (steps.episode_return, steps.episode_steps)]
        np.testing.assert_allclose([known(info["train/return"]), known(info["train/episode_length"])], means, rtol=1e-5)


def test_the_step_budget_cuts_the_scores():
    """Everything ends at every step: of 3 rollouts of 2 x 5 steps, those up to step 24 of 30 count."""
    config = dataclasses.replace(ACTING, num_envs=2, unroll_length=5, total_env_steps=24)
    every = lambda *shape: np.ones((5, 2, *shape), bool)
    bits = every(ACHIEVEMENTS) & (np.arange(ACHIEVEMENTS) != 2)
    blank = dict.fromkeys(ppo_ad.Step._fields, np.zeros((5, 2), np.float32))
    steps = ppo_ad.Step(**(blank | {"done": every(), "achievements": bits}))
    state = ppo_ad.TrainState(**dict.fromkeys(ppo_ad.TrainState._fields))
    state = state._replace(episodes=jnp.array(0), successes=jnp.zeros(ACHIEVEMENTS, jnp.int32))
    for rollout, expected in enumerate((10, 20, 24)):
        state = state._replace(env_steps=jnp.array(10 * rollout))
        episodes, successes, info = ppo_ad.score_episodes(config, state, steps)
        assert episodes == expected
        np.testing.assert_array_equal(successes, [expected, expected, 0, expected])
        np.testing.assert_allclose(known(info["train/score"]), 101 ** (3 / 4) - 1, rtol=1e-4)
        state = state._replace(episodes=episodes, successes=successes)
    *_, none = ppo_ad.score_episodes(config, state._replace(env_steps=jnp.array(30)), steps)
    assert none["train/return"] == (0, 0) and none["train/episodes"] == 24


# ---- episodes and orders -------------------------------------------------------------------------------------------


def slow_episodes(first, unlocked):
    """(environment, start, end, steps that unlocked something), of whole episodes with any such step."""
    found = []
    for e, row in enumerate(first):
        cuts = [t for t in range(len(row)) if row[t]]
        for start, end in itertools.pairwise(cuts):
            goals = [t for t in range(start, end) if unlocked[e][t]]
            if goals:
                found.append((e, start, end, goals))
    return found


def check_episodes(first, unlocked, achievements):
    time, expected = first.shape[1], slow_episodes(first, unlocked)
    window = window_of(
        observation=None,
        action=np.zeros(first.shape, int),
        memory=None,
        returns=None,
        unlocked=unlocked,
        episode_steps=np.where(first, 1, 2),
    )._replace(achievements=np.zeros((*first.shape, achievements), bool))
    found = ppo_ad.find_episodes(window)
    assert len(found) == len(expected)
    for episode, (e, start, end, goals) in zip(found, expected):
        assert (episode.start, episode.end) == (e * time + start, e * time + end)
        assert episode.count == len(goals)
        np.testing.assert_array_equal(episode.unlocks[: len(goals)], e * time + np.array(goals))
        assert (episode.unlocks[len(goals) :] == e * time + goals[-1]).all() and len(episode.unlocks) == achievements
    return expected


@pytest.mark.parametrize("shape", [(3, 24), (1, 40), (5, 3), (2, 4)])
def test_episodes_equal_a_loop(shape):
    """Windows of all densities; nothing is unlocked on the last step of an episode, nor too much in one."""
    rng, seen = np.random.default_rng(0), []
    for cutting, unlocking in itertools.product((0, 0.03, 0.1, 0.3, 0.6, 1), (0, 0.1, 0.4, 1)):
        for _ in range(3):
            first, unlocked = rng.random(shape) < cutting, rng.random(shape) < unlocking
            unlocked[:, :-1] &= ~first[:, 1:]
            for e in range(shape[0]):
                count = 0
                for t in range(shape[1]):
                    count = 0 if first[e, t] else count
                    unlocked[e, t] &= count < 6
                    count += unlocked[e, t]
            seen += check_episodes(first, unlocked, 6)
    lengths = {end - start for _, start, end, _ in seen}
    assert 2 in lengths and (shape[1] < 24 or len(lengths) > 5)
    assert any(start == 0 for _, start, _, _ in seen) and any(end == shape[1] - 1 for _, _, end, _ in seen)


def test_most_episodes_a_window_can_hold():
    """All of length 2, each with something unlocked."""
    first, unlocked = np.tile([True, False], (2, 6)), np.tile([True, False], (2, 6))
    assert len(check_episodes(first, unlocked, 3)) == 10
    first = np.pad(first, ((0, 0), (0, 1)), constant_values=True)
    unlocked = np.pad(unlocked, ((0, 0), (0, 1)))
    assert len(check_episodes(first, unlocked, 3)) == 12


# ---- minibatches of the auxiliary phase ----------------------------------------------------------------------------

EPISODES = [
    ppo_ad.Episode(3, 14, 2, np.array([5, 9, 9, 9])),
    ppo_ad.Episode(20, 25, 1, np.array([23, 23, 23, 23])),
    ppo_ad.Episode(25, 60, 4, np.array([30, 31, 44, 58])),
]


def pairs_of(batch):
    """Of a minibatch of prediction, the pairs that count, as positions: positive, negative, before, after or None."""
    assert batch.rows.shape == batch.weight.shape == batch.valid.shape == batch.follows.shape == batch.index.shape[1:]
    count = batch.valid.sum()
    assert batch.valid[:count].all()
    positive, negative, before, after = batch.rows[batch.index[:, :count]]
    after = [a if follows else None for a, follows in zip(after, batch.follows)]
    assert np.repeat(batch.rows, batch.weight).tolist() == sorted([*positive, *negative])
    return list(zip(positive, negative, before, after))


@pytest.mark.parametrize(("size", "minibatches"), [(512, 1), (11, 1), (5, 3)])
def test_a_minibatch_of_prediction_has_each_step_and_what_follows_it(size, minibatches):
    config = dataclasses.replace(CONFIG, auxiliary_batch_size=size)
    batches = list(ppo_ad.prediction_batches(config, np.random.default_rng(0), EPISODES, 0))
    assert len(batches) == minibatches and {len(batch.rows) for batch in batches} == {128}
    pairs = [pair for batch in batches for pair in pairs_of(batch)]
    assert sorted(p for p, *_ in pairs) == sorted(n for _, n, *_ in pairs) == list(range(3, 14))
    for positive, _, before, after in pairs:
        assert (before, after) == ((5, 6) if positive <= 5 else (9, 10) if positive <= 9 else (13, None))


def test_negatives_are_uniform_permutations():
    config, rng = dataclasses.replace(CONFIG, auxiliary_batch_size=2), np.random.default_rng(1)
    orders = []
    for _ in range(12_000):
        pairs = [p for batch in ppo_ad.prediction_batches(config, rng, [ppo_ad.Episode(7, 11, 1, np.array([8]))], 0)
                 for p in pairs_of(batch)]  # fmt: skip
        orders.append([negative for _, negative, *_ in sorted(pairs)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_a_minibatch_of_matching_has_the_achievements_of_other_episodes(targets):
    config, rng, met = dataclasses.replace(CONFIG, num_targets=targets), np.random.default_rng(0), []
    drawn_steps = []
    for _ in range(300):
        (batch,) = ppo_ad.matching_batches(config, rng, EPISODES, 0)
        assert batch.rows.shape == batch.their_rows.shape == (128,)
        before, after = batch.rows[batch.own]
        assert batch.counts[0] == 2 and before[:2].tolist() == [5, 9] and after[:2].tolist() == [6, 10]
        before, after = batch.their_rows[batch.theirs]
        others = [{23: 1, 30: 2}[row[0]] for row, count in zip(before, batch.counts[1:]) if count]
        assert len(others) == len(set(others)) == min(targets, 2)
        for row, j in enumerate(others):
            count = batch.counts[1 + row]
            assert count == EPISODES[j].count and before[row, :count].tolist() == EPISODES[j].unlocks[:count].tolist()
            assert (after[row, :count] == before[row, :count] + 1).all()
        assert not batch.counts[1 + len(others) :].any()
        met.append(others[0])
        drawn_steps += batch.rows[batch.drawn][: len(others), :2].ravel().tolist()
        assert batch.noise.shape == (targets, 4, 4) and (batch.noise >= 0).all()
    assert abs(met.count(1) - 150) < 40, "targets are not drawn uniformly"
    assert stats.chisquare(np.bincount(drawn_steps, minlength=14)[3:]).pvalue > 1e-3
    assert not list(ppo_ad.matching_batches(config, rng, EPISODES[:1], 0))


def test_arrays_are_padded_to_the_first_double_that_is_long_enough():
    lengths = lambda size, *counts: [x.shape[-1] for x in ppo_ad.pad(size, *(np.ones((2, n)) for n in counts))]
    assert lengths(128, 1, 128) == [128, 128] and lengths(128, 129, 3) == [256, 256]
    assert lengths(256, 3) == [256] and lengths(128, 513) == [1024]
    (x,) = ppo_ad.pad(4, np.arange(3))
    assert x.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("batch_size", "targets", "lengths"), [(8, 2, (128, 128)), (300, 2, (128, 1024)), (3000, 900, (8192, 8192))]
)
def test_every_size_that_a_minibatch_can_have_is_compiled(batch_size, targets, lengths):
    config = dataclasses.replace(ACTING, auxiliary_batch_size=batch_size, num_targets=targets, episode_length=10_000)
    state = jax.eval_shape(partial(ppo_ad.init, config, VECTOR), jax.random.key(0))
    programs = ppo_ad.compile_phase(config, lambda name, jitted, *shapes: jitted, state)
    for name, largest in zip(("matching", "prediction"), lengths):
        sizes = [size for which, size in programs.keys() - {"remember"} if which == name]
        assert sorted(sizes) == [128 * 2**k for k in range(len(sizes))] and max(sizes) == largest


# ---- the auxiliary phase -------------------------------------------------------------------------------------------

WINDOW = 2, 40
CUTS = ((3, 10, 15, 34, 36), (0, 8, 24, 25, 30))
UNLOCKS = ((1, 4, 6, 16, 20, 21, 31, 34, 37), (0, 6, 15, 28, 33, 39))
"""Episodes of 7, 19, 2, 8, 16 and 5 steps, with 2, 4, 1, 2, 1 and 1 achievements; one of 5 without any, one of 1 step;
partial ones at the edges. A minibatch of prediction has 8 steps at most."""


def phase_state(config, cuts=CUTS, unlocks=UNLOCKS, seed=0):
    """The state before an auxiliary phase, with a window made by hand."""
    rng = np.random.default_rng(seed)
    first, unlocked = np.zeros(WINDOW, bool), np.zeros(WINDOW, bool)
    for e in range(2):
        first[e, list(cuts[e])] = True
        unlocked[e, list(unlocks[e])] = True
    size = ppo_ad.memory_size(config)
    memory = unit_rows(rng, *WINDOW, size) * (rng.random((*WINDOW, 1)) < 0.7) if size else np.zeros((*WINDOW, 0))
    observation = rng.normal(size=(*WINDOW, FEATURES))
    returns, action = rng.normal(1, 1, WINDOW), rng.integers(0, 3, WINDOW)
    window = window_of(
        **{
            name: jnp.array(x, jnp.float32)
            for name, x in zip(("observation", "memory", "returns"), (observation, memory, returns))
        },
        action=jnp.array(action, jnp.int32),
        episode_steps=jnp.where(first, 1, 2),
        unlocked=jnp.array(unlocked),
    )
    return make_state(config, seed)._replace(window=window)


def differentiated(loss):
    """((loss, more), gradient by the agent)"""
    return jit(jax.value_and_grad(loss, has_aux=True))


@differentiated
def prediction_term(agent, positive, negative, anchor):
    psi = lambda o, a, m: predict(agent, encode(agent, o, jnp), a, m, jnp)
    p, n = psi(*positive), psi(*negative)
    return contrast(anchor, p, n, jnp), anchor @ p > anchor @ n


def matching_term(kind, agent, before, after, positive, negative):
    change = encode(agent, after, jnp) - encode(agent, before, jnp)
    anchor = unit(change if kind == "change" else encode(agent, after, jnp), jnp)
    return contrast(anchor, positive, negative, jnp), anchor @ positive > anchor @ negative


matching_terms = {kind: differentiated(partial(matching_term, kind)) for kind in ("change", "after")}


def regulariser(variant, agent, observation, memory, old, target):
    log_probs, value = act(agent, encode(agent, observation, jnp), memory, jnp)
    if variant == "code":
        divergence, error = jnp.exp(log_probs) @ (log_probs - old), (value - target) ** 2
    else:
        divergence, error = jnp.exp(old) @ (old - log_probs), (value - target) ** 2 / 2
    return divergence + error, (divergence, error)


regularise = {variant: differentiated(partial(regulariser, variant)) for variant in ("code", "paper")}


class SlowPhase:
    """Sections 1.6 to 1.11 of the sheet, on lists of exact sizes, one example at a time, with POT's plans.

    Only the random numbers are the algorithm's.
    """

    def __init__(self, config, state):
        self.config = config
        window = jax.tree.map(np.asarray, state.window)
        self.episodes = slow_episodes(window.episode_steps == 1, window.unlocked)
        self.observation, self.action = window.observation, window.action
        self.memory, self.returns = window.memory, window.returns
        self.agent, self.normaliser = exact(state.agent), SlowNormaliser(state.normaliser)
        self.adam = {name: SlowAdam(config, state.optimizers[name]) for name in ("prediction", "matching")}
        frozen, (envs, time) = self.agent, self.action.shape
        old = lambda e, t: act(frozen, encode(frozen, self.observation[e, t]), self.memory[e, t])
        self.old = [[old(e, t) for t in range(time)] for e in range(envs)]
        self.metrics, self.without_negative = {name: [] for name in self.adam}, 0
        self.regulariser = regularise[config.variant]

    def run(self, key):
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        for _ in range(self.config.auxiliary_epochs):
            for visit in (self.match, self.predict):
                for which in self.rng.permutation(len(self.episodes)):
                    visit(which)

    def represent(self, e, t):
        """nu of what was unlocked at step t of environment e, with the present weights."""
        before, after = (encode(self.agent, self.observation[e, when]) for when in (t, t + 1))
        return unit(after - before if self.config.achievement == "change" else after)

    def learn(self, name, terms, rows):
        """One gradient step: `terms` are ((loss, right), gradient); rows are (environment, time)."""
        self.normaliser.update([self.returns[row] for row in rows])
        regularisers = []
        for e, t in rows:
            old, value = self.old[e][t]
            target = self.normaliser(self.returns[e, t]) if self.config.variant == "code" else value
            regularisers.append(self.regulariser(self.agent, self.observation[e, t], self.memory[e, t], old, target))
        gradient = total([mean(g for _, g in terms), mean(g for _, g in regularisers)])
        losses, rights = zip(*(value for value, _ in terms))
        parts = np.mean([parts for (_, parts), _ in regularisers], axis=0)
        self.metrics[name].append([np.mean(losses), np.mean(rights), *parts])
        self.agent = self.adam[name].step(self.agent, gradient)

    def predict(self, which):
        e, start, end, goals = self.episodes[which]
        length, batch = end - start, self.config.auxiliary_batch_size
        order, others = self.rng.permutation(length), self.rng.permutation(length)
        partner = dict(zip(order, others))
        chunks = [order[i : i + batch] for i in range(0, length, batch)]
        for chunk in chunks:
            vectors = [self.represent(e, t) for t in goals]
            last = encode(self.agent, self.observation[e, end - 1])
            none = unit(-last) if self.config.achievement == "change" else 0 * last
            terms, rows = [], []
            for step in chunk:
                t, other = start + step, start + partner[step]
                later = [vector for goal, vector in zip(goals, vectors) if t < goal + 1]
                row = lambda t: (self.observation[e, t], self.action[e, t], self.memory[e, t])
                terms.append(prediction_term(self.agent, row(t), row(other), later[0] if later else none))
                rows += [(e, t), (e, other)]
            self.learn("prediction", terms, rows)

    def match(self, which):
        e, start, end, goals = self.episodes[which]
        others = self.rng.permutation([i for i in range(len(self.episodes)) if i != which])
        targets = [self.episodes[i] for i in others[: self.config.num_targets]]
        if not targets:
            return
        steps = self.rng.integers(start, end, (len(targets), len(goals)))
        noise = self.rng.random((self.config.num_targets, ACHIEVEMENTS, ACHIEVEMENTS), np.float32)
        own, terms, rows = [self.represent(e, t) for t in goals], [], []
        for j, (target_env, _, _, target_goals) in enumerate(targets):
            theirs = [self.represent(target_env, t) for t in target_goals]
            cost = 1 - np.array(own) @ np.array(theirs).T
            matched = pot(cost, 1000) > 0.5
            for u, v in np.argwhere(matched):
                free = [k for k in range(len(theirs)) if self.config.variant == "code" or not matched[:, k].any()]
                if free:
                    negative = theirs[max(free, key=lambda k: noise[j, u, k])]
                    pair = self.observation[e, goals[u]], self.observation[e, goals[u] + 1]
                    term = matching_terms[self.config.achievement]
                    terms.append(term(self.agent, *pair, theirs[v], negative))
                    rows.append((e, steps[j, u]))
                else:
                    self.without_negative += 1
        if terms:
            self.learn("matching", terms, rows)


def test_prediction_targets_of_the_worked_example():
    """Known answer 4: unlocked at t = 2 and t = 6 of 10 steps, so goal steps 3 and 7; t 0-2 predict the first, 3-6 the
    second, 7-9 that there is none."""
    first, unlocked = (np.isin(np.arange(14), at)[None] for at in ((2, 12), (4, 8)))
    (_, start, end, goals) = slow_episodes(first, unlocked)[0]
    assert [goal + 1 - start for goal in goals] == [3, 7]
    (episode,) = [ppo_ad.Episode(start, end, 2, np.array([*goals, *[goals[-1]] * 2]))]
    (batch,) = ppo_ad.prediction_batches(CONFIG_OF_ONE, np.random.default_rng(0), [episode], 0)
    targets = [(before - start, after and after - start) for *_, before, after in sorted(pairs_of(batch))]
    assert targets == [(2, 3)] * 3 + [(6, 7)] * 4 + [(9, None)] * 3


CONFIG_OF_ONE = dataclasses.replace(CONFIG, auxiliary_batch_size=512)


def jitted_phase(config):
    """The auxiliary phase of one seed, whose programs are compiled when they are first needed."""
    programs = {"remember": jit(ppo_ad.remember)}
    for name in ppo_ad.auxiliary_losses(config):
        step = jit(partial(ppo_ad.update, config, ppo_ad.AUXILIARY[name][1]))
        programs |= {(name, 128 * 2**k): step for k in range(5)}
    return partial(ppo_ad.distil, config, programs, lambda line: None)


def check_phase(config, distil, state):
    """That the phase equals the slow one. Returns the latter, the state and the metrics."""
    after, info = distil(state)
    key, phase_key = jax.random.split(state.key)
    slow = SlowPhase(config, state)
    slow.run(phase_key)
    assert_same_change(state.agent, after.agent, slow.agent)
    np.testing.assert_allclose(after.normaliser, slow.normaliser.values(), rtol=1e-4)
    for name, steps in slow.metrics.items():
        assert info[f"auxiliary/{name}_steps"] == len(steps)
        expected = np.mean(steps, axis=0) if steps else [np.nan] * 4
        for metric, value in zip(("loss", "accuracy", "policy_divergence", "value_error"), expected):
            np.testing.assert_allclose(
                known(info[f"auxiliary/{name}_{metric}"]), value, rtol=1e-3, atol=1e-5, err_msg=metric
            )
        check_adam(after.optimizers[name], slow.adam[name], 7 + len(steps))
    np.testing.assert_array_equal(jax.random.key_data(after.key), jax.random.key_data(key))
    changed = ("agent", "normaliser", "optimizers", "key")
    same(state._replace(window=None), after._replace(**{name: getattr(state, name) for name in changed}))
    same(state.optimizers["ppo"], after.optimizers["ppo"])
    goals = [len(goals) for *_, goals in slow.episodes]
    assert info["auxiliary/episodes"] == len(goals)
    np.testing.assert_allclose(known(info["auxiliary/achievements"]), np.mean(goals), rtol=1e-5)
    return slow, after, info


@pytest.fixture(scope="module")
def distil():
    return jitted_phase(CONFIG)


def test_an_auxiliary_phase_equals_a_slow_one(distil):
    """No padding, no masks, no batches. Long episodes are split into minibatches."""
    slow, *_ = check_phase(CONFIG, distil, phase_state(CONFIG))
    assert [(end - start, len(goals)) for _, start, end, goals in slow.episodes] == [
        (7, 2), (19, 4), (2, 1), (8, 2), (16, 1), (5, 1)
    ]  # fmt: skip
    assert len(slow.metrics["prediction"]) == 2 * (1 + 3 + 1 + 1 + 2 + 1)
    assert len(slow.metrics["matching"]) == 2 * 6


def test_an_auxiliary_phase_of_the_papers_variant_with_states_as_achievements_equals_a_slow_one():
    """And there is no memory."""
    config = dataclasses.replace(
        CONFIG, variant="paper", achievement="after", memory=False, num_targets=3, auxiliary_batch_size=20
    )
    slow, *_ = check_phase(config, jitted_phase(config), phase_state(config))
    assert len(slow.metrics["prediction"]) == 2 * 6
    assert slow.without_negative > 0


def test_episodes_without_any_match_change_nothing(distil):
    """One achievement against three that look alike: the plan moves a third to each, in either direction."""
    state = phase_state(CONFIG, cuts=((3, 11, 14), ()), unlocks=((4, 6, 8, 12), ()))
    observation = np.array(state.window.observation)
    for t in (6, 8):
        observation[0, [t, t + 1]] = observation[0, [4, 5]]
    state = state._replace(window=state.window._replace(observation=jnp.array(observation)))
    slow, after, _ = check_phase(CONFIG, distil, state)
    assert not slow.metrics["matching"] and len(slow.metrics["prediction"]) == 2 * 2
    same(state.optimizers["matching"], after.optimizers["matching"])


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*(jax.random.key_data(z) if is_key else np.asarray(z) for z in (x, y)))


def test_one_episode_has_nothing_to_match_with(distil):
    state = phase_state(CONFIG, cuts=((), (3, 9, 12)), unlocks=((5,), (4, 6, 7, 14)))
    slow, after, _ = check_phase(CONFIG, distil, state)
    assert not slow.metrics["matching"] and len(slow.metrics["prediction"]) == 2
    same(state.optimizers["matching"], after.optimizers["matching"])


@pytest.mark.parametrize(("cuts", "unlocks"), [(((), ()), ((), ())), (((3,), (1, 4, 5)), ((4, 7), (0, 6, 39)))])
def test_a_window_without_episodes_changes_nothing(distil, cuts, unlocks):
    """None at all, or none that is whole and has an achievement."""
    state = phase_state(CONFIG, cuts, unlocks)
    after, info = distil(state)
    assert info["auxiliary/episodes"] == info["auxiliary/matching_steps"] == info["auxiliary/prediction_steps"] == 0
    same(state._replace(key=after.key, window=None), after)
    assert info["auxiliary/prediction_loss"] == (0, 0)


# ---- evaluation ----------------------------------------------------------------------------------------------------


def follow(step, acting, keys):
    """Steps of all environments, in NumPy."""
    seen = []
    for key in keys:
        acting, row = step(acting, key)
        seen.append(row)
    return jax.tree.map(lambda *x: np.array(x), *seen)


def test_evaluation_equals_a_loop():
    """The first episode of each environment."""
    vector, agent = Scripted().vectorise(6, LIMIT), random_agent(ACTING, 0)
    info = jit(partial(ppo_ad.evaluate, ACTING, vector))(agent, jax.random.key(0))

    begin = jit(partial(ppo_ad.start_acting, ACTING, vector))
    step = jit(partial(ppo_ad.step, ACTING, vector, agent, ppo_ad.Normaliser(*jnp.zeros(3))))
    start_key, step_key = jax.random.split(jax.random.key(0))
    keys = [jax.random.fold_in(step_key, t) for t in range(LIMIT)]
    steps = follow(step, begin(agent, start_key), keys)
    ends = steps.done.argmax(axis=0), np.arange(6)
    success = steps.achievements[ends].mean(axis=0)
    np.testing.assert_allclose(info["eval/return"], steps.episode_return[ends].mean(), rtol=1e-5)
    np.testing.assert_allclose(info["eval/episode_length"], ends[0].mean() + 1, rtol=1e-6)
    np.testing.assert_allclose([info[f"eval/success/a{i}"] for i in range(ACHIEVEMENTS)], success, rtol=1e-6)
    score = math.prod(1 + 100 * s for s in success) ** (1 / ACHIEVEMENTS) - 1
    np.testing.assert_allclose(info["eval/score"], score, rtol=1e-4)
    assert len(set(ends[0])) > 2 and (steps.achievements[ends] != steps.achievements[ends[0] - 1, ends[1]]).any()
