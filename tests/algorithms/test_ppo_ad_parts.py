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
import ot
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
    optimizers = [warm(cold, seed + i) for i in range(3)]
    scores = ppo_ad.Scores(jnp.array(0), jnp.zeros(ACHIEVEMENTS, jnp.int32))
    shape = config.num_envs, config.auxiliary_every * config.unroll_length
    window = ppo_ad.Window(
        observation=jnp.zeros((*shape, FEATURES)),
        action=jnp.zeros(shape, jnp.int32),
        memory=jnp.zeros((*shape, ppo_ad.memory_size(config))),
        returns=jnp.zeros(shape),
        first=jnp.zeros(shape, bool),
        unlocked=jnp.zeros(shape, bool),
    )
    zero, key = jnp.array(0), jax.random.key(seed + 1)
    return ppo_ad.TrainState(agent, NORMALISER, *optimizers, acting, window, scores, zero, zero, key)


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
    acting = jit(partial(ppo_ad.start_acting, ACTING, VECTOR))(jax.random.key(0))
    state = make_state(ACTING, 0, acting)
    state = state._replace(agent=decided(state.agent))
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
    last_values: list
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
            acting, rollout = collect(agents[i % 2], start.normaliser, actings[-1])
            actings.append(acting)
            rollouts.append(rollout)
        steps = jax.tree.map(lambda *x: np.concatenate(x), *(rollout.steps for rollout in rollouts))
        used = [exact(agents[t // STEPS % 2]) for t in range(ROLLOUTS * STEPS)]
        both.append(Recorded(bootstrap, steps, used, [rollout.last_value for rollout in rollouts], actings[1:]))
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
        assert steps.first[t + 1, e] and not steps.memory[t + 1, e].any()
        assert not steps.achievements[t + 1, e, 0] or steps.unlocked[t + 1, e] or steps.done[t + 1, e]


def test_steps_record_what_happened(recorded):
    bootstrap, steps, used, last_values, actings = recorded
    mean, deviation = SlowNormaliser(NORMALISER).moments()
    surprise = surprise_if_uniform = variance = 0
    for e in range(ENVS):
        episode_return = length = 0
        bits = np.zeros(ACHIEVEMENTS, bool)
        for t in range(ROLLOUTS * STEPS):
            log_probs, value = act(used[t], encode(used[t], steps.observation[t, e].astype(float)), steps.memory[t, e])
            action = steps.action[t, e]
            np.testing.assert_allclose(steps.log_prob[t, e], log_probs[action], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(steps.value[t, e], mean + deviation * value, rtol=1e-4, atol=1e-5)
            surprise += log_probs[action] - np.exp(log_probs) @ log_probs
            surprise_if_uniform += log_probs.mean() - np.exp(log_probs) @ log_probs
            variance += np.exp(log_probs) @ log_probs**2 - (np.exp(log_probs) @ log_probs) ** 2
            new, length = steps.achievements[t, e] & ~bits, length + 1
            bits = steps.achievements[t, e]
            episode_return += new.sum() + 0.1 * action
            assert steps.unlocked[t, e] == (new.any() and not steps.done[t, e])
            np.testing.assert_allclose(steps.episode_return[t, e], episode_return, rtol=1e-5)
            assert steps.episode_steps[t, e] == length
            assert steps.first[t, e] == (t > 0 and steps.done[t - 1, e])
            if steps.done[t, e]:
                episode_return, length, bits = 0, 0, np.zeros_like(bits)
            elif not bootstrap:
                np.testing.assert_allclose(steps.reward[t, e], new.sum() + 0.1 * action, rtol=1e-5)
    assert abs(surprise) < 4 * math.sqrt(variance), "actions are not drawn from the policy"
    assert surprise_if_uniform < surprise - 8 * math.sqrt(variance)
    for i, (last_value, acting) in enumerate(zip(last_values[:-1], actings)):
        t = STEPS * (i + 1)
        for e in range(ENVS):
            before = used[t - 1]
            value = act(before, encode(before, steps.observation[t, e].astype(float)), steps.memory[t, e])[1]
            np.testing.assert_allclose(last_value[e], mean + deviation * value, rtol=1e-4, atol=1e-5)
        assert not np.asarray(acting.unlocked).any()


def test_returns_go_on_at_the_time_limit_only_if_asked(recorded, start):
    """The value of the state that the time limit cut off, with what its last step unlocked as its memory."""
    bootstrap, steps, used, *_ = recorded
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
        after, info = learn(states[-1], recorded.acting[i], ppo_ad.Rollout(part, recorded.last_values[i]))
        states.append(after)
        infos.append(info)
    return recorded, config, states, infos


def slow_returns(recorded, rollout):
    """Advantages and returns of a rollout, as lists over time and environments."""
    steps, at, advantage = recorded.steps, rollout * STEPS, np.zeros((STEPS, ENVS))
    value = np.concatenate([steps.value[at : at + STEPS], recorded.last_values[rollout][None]]).astype(float)
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
    advantage, returns = slow_returns(recorded, 0)
    flat = advantage.ravel()
    standard = (flat - flat.mean()) / (math.sqrt(((flat - flat.mean()) ** 2).sum() / (flat.size - 1)) + 1e-8)

    @jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(agent, row, advantage, target):
        log_probs, value = act(agent, encode(agent, row.observation, jnp), row.memory, jnp)
        ratio = jnp.exp(log_probs[row.action] - row.log_prob)
        policy_loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.85, 1.15) * advantage)
        value_loss, entropy = (value - target) ** 2, -jnp.exp(log_probs) @ log_probs
        return policy_loss + 0.7 * value_loss - 0.3 * entropy, (policy_loss, value_loss, entropy)

    agent, normaliser = exact(before.agent), SlowNormaliser(before.normaliser)
    adam, parts = SlowAdam(config, before.ppo_optimizer), []
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
    check_adam(after.ppo_optimizer, adam, 7 + 8)


def test_rollouts_join_the_window_in_order(learned):
    recorded, _, (_, *states), _ = learned
    steps = recorded.steps
    for count, state in enumerate(states, 1):
        window = jax.tree.map(np.asarray, state.window)
        for name in ("observation", "action", "memory", "first", "unlocked"):
            for e, t in itertools.product(range(ENVS), range(STEPS * count)):
                np.testing.assert_array_equal(getattr(window, name)[e, t], getattr(steps, name)[t, e], err_msg=name)
        for i in range(count):
            returns = slow_returns(recorded, i)[1]
            np.testing.assert_allclose(window.returns[:, i * STEPS : (i + 1) * STEPS], returns.T, rtol=1e-4, atol=1e-5)
        assert not window.observation[:, STEPS * count :].any()
        assert (state.env_steps, state.ppo_steps) == (count * ENVS * STEPS, count * 8)
    third = jnp.array(3 * ENVS * STEPS)
    full = ppo_ad.extend(ACTING, states[-1].window, third, jax.tree.map(lambda x: x[:STEPS], steps), returns)
    np.testing.assert_array_equal(full.returns[:, :STEPS], returns.T.astype(np.float32))
    second = slice(STEPS, 2 * STEPS)
    np.testing.assert_array_equal(full.observation[:, second], steps.observation[second].swapaxes(0, 1))


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
        assert info["train/episodes"] == state.scores.episodes == len(far)
        successes = sum(steps.achievements[x].astype(int) for x in far)
        np.testing.assert_array_equal(state.scores.successes, successes)
        score = math.prod(1 + 100 * s / len(far) for s in successes) ** (1 / ACHIEVEMENTS) - 1
        np.testing.assert_allclose(info["train/score"], score, rtol=1e-4)
        means = [np.mean([values[x] for x in now]) for values in (steps.episode_return, steps.episode_steps)]
        np.testing.assert_allclose([info["train/return"], info["train/episode_length"]], means, rtol=1e-5)


def test_the_step_budget_cuts_the_scores():
    """Everything ends at every step: of 3 rollouts of 2 x 5 steps, those up to step 24 of 30 count."""
    config = dataclasses.replace(ACTING, num_envs=2, unroll_length=5, total_env_steps=24)
    every = lambda *shape: np.ones((5, 2, *shape), bool)
    bits = every(ACHIEVEMENTS) & (np.arange(ACHIEVEMENTS) != 2)
    blank = dict.fromkeys(ppo_ad.Step._fields, np.zeros((5, 2), np.float32))
    steps = ppo_ad.Step(**(blank | {"done": every(), "achievements": bits}))
    state = ppo_ad.TrainState(**dict.fromkeys(ppo_ad.TrainState._fields))
    state = state._replace(scores=ppo_ad.Scores(jnp.array(0), jnp.zeros(ACHIEVEMENTS, jnp.int32)))
    for rollout, expected in enumerate((10, 20, 24)):
        state = state._replace(env_steps=jnp.array(10 * rollout))
        scores, info = ppo_ad.score_episodes(config, state, steps)
        assert scores.episodes == expected
        np.testing.assert_array_equal(scores.successes, [expected, expected, 0, expected])
        np.testing.assert_allclose(info["train/score"], 101 ** (3 / 4) - 1, rtol=1e-4)
        state = state._replace(scores=scores)
    none = ppo_ad.score_episodes(config, state._replace(env_steps=jnp.array(30)), steps)[1]
    assert np.isnan(none["train/return"]) and none["train/episodes"] == 24


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


def check_episodes(first, unlocked, find):
    time, expected = first.shape[1], slow_episodes(first, unlocked)
    found = jax.tree.map(np.asarray, find(jnp.array(first), jnp.array(unlocked)))
    assert found.count == len(expected)
    for i, (e, start, end, goals) in enumerate(expected):
        assert (found.start[i], found.length[i]) == (e * time + start, end - start)
        assert found.num_goals[i] == len(goals)
        np.testing.assert_array_equal(found.goals[i, : len(goals)], e * time + np.array(goals))
    return expected


@pytest.mark.parametrize("shape", [(3, 24), (1, 40), (5, 3), (2, 4)])
def test_episodes_equal_a_loop(shape):
    """Windows of all densities; nothing is unlocked on the last step of an episode, nor too much in one."""
    rng, seen = np.random.default_rng(0), []
    find = jit(lambda first, unlocked: ppo_ad.find_episodes(first, unlocked, 6))
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
            seen += check_episodes(first, unlocked, find)
    lengths = {end - start for _, start, end, _ in seen}
    assert 2 in lengths and (shape[1] < 24 or len(lengths) > 5)
    assert any(start == 0 for _, start, _, _ in seen) and any(end == shape[1] - 1 for _, _, end, _ in seen)


def test_most_episodes_a_window_can_hold():
    """All of length 2, each with something unlocked."""
    first, unlocked = np.tile([True, False], (2, 6)), np.tile([True, False], (2, 6))
    find = jit(partial(ppo_ad.find_episodes, achievements=3))
    assert len(check_episodes(first, unlocked, find)) == 10
    first = np.pad(first, ((0, 0), (0, 1)), constant_values=True)
    unlocked = np.pad(unlocked, ((0, 0), (0, 1)))
    assert len(check_episodes(first, unlocked, find)) == 12


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_shuffle_is_a_permutation(count):
    keys = jax.random.split(jax.random.key(0), 20)
    orders = np.asarray(jax.vmap(lambda key: ppo_ad.shuffle(key, jnp.array(count), 5))(keys))
    np.testing.assert_array_equal(np.sort(orders[:, :count]), np.tile(np.arange(count), (20, 1)))
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(5), (20, 1)))


def test_shuffle_is_uniform():
    keys = jax.random.split(jax.random.key(1), 12_000)
    orders = np.asarray(jit(jax.vmap(lambda key: ppo_ad.shuffle(key, jnp.array(4), 7)))(keys))[:, :4]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_padded_sizes_double_up_to_the_largest():
    assert ppo_ad.sizes(5) == [5] and ppo_ad.sizes(128) == [128]
    assert ppo_ad.sizes(129) == [128, 129] and ppo_ad.sizes(512) == [128, 256, 512]


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
    arrays = [jnp.array(x, jnp.float32) for x in (observation, memory, returns)]
    window = ppo_ad.Window(arrays[0], jnp.array(action, jnp.int32), *arrays[1:], jnp.array(first), jnp.array(unlocked))
    return make_state(config, seed)._replace(window=window)


shuffle = jit(ppo_ad.shuffle, static_argnums=2)


def differentiated(loss):
    """((loss, more), gradient by the agent)"""
    return jit(jax.value_and_grad(loss, has_aux=True))


@differentiated
def prediction_term(agent, positive, negative, anchor):
    psi = lambda o, a, m: predict(agent, encode(agent, o, jnp), a, m, jnp)
    p, n = psi(*positive), psi(*negative)
    return contrast(anchor, p, n, jnp), anchor @ p > anchor @ n


@differentiated
def matching_term(agent, before, after, positive, negative):
    anchor = unit(encode(agent, after, jnp) - encode(agent, before, jnp), jnp)
    return contrast(anchor, positive, negative, jnp), anchor @ positive > anchor @ negative


def regulariser(variant, agent, observation, memory, old, target):
    log_probs, value = act(agent, encode(agent, observation, jnp), memory, jnp)
    if variant == "code":
        divergence, error = jnp.exp(log_probs) @ (log_probs - old), (value - target) ** 2
    else:
        divergence, error = jnp.exp(old) @ (old - log_probs), (value - target) ** 2 / 2
    return divergence + error, (divergence, error)


regularise = {variant: differentiated(partial(regulariser, variant)) for variant in ("code", "paper")}


class SlowPhase:
    """Sections 1.6 to 1.11 of the sheet, on lists of exact sizes, one example at a time.

    Only the random draws are taken from the algorithm: its keys, its shuffles, and the sizes it draws for (`padded`).
    """

    def __init__(self, config, state, padded):
        self.config, self.padded = config, padded
        window = jax.tree.map(np.asarray, state.window)
        self.episodes = slow_episodes(window.first, window.unlocked)
        self.observation, self.action, self.memory, self.returns, *_ = window
        self.agent, self.normaliser = exact(state.agent), SlowNormaliser(state.normaliser)
        self.adam = {
            "prediction": SlowAdam(config, state.prediction_optimizer),
            "matching": SlowAdam(config, state.matching_optimizer),
        }
        frozen, (envs, time) = self.agent, self.action.shape
        self.most = envs * (time // 2)
        old = lambda e, t: act(frozen, encode(frozen, self.observation[e, t]), self.memory[e, t])
        self.old = [[old(e, t) for t in range(time)] for e in range(envs)]
        self.metrics, self.without_negative = {name: [] for name in self.adam}, 0
        self.regulariser = regularise[config.variant]

    def run(self, key):
        for epoch_key in jax.random.split(key, self.config.auxiliary_epochs):
            matching_key, prediction_key = jax.random.split(epoch_key)
            for visit, visit_key in ((self.match, matching_key), (self.predict, prediction_key)):
                order_key, visit_key = jax.random.split(visit_key)
                order = shuffle(order_key, len(self.episodes), self.most)[: len(self.episodes)]
                for i, which in enumerate(np.asarray(order)):
                    visit(which, jax.random.fold_in(visit_key, i))

    def represent(self, e, t):
        """nu of what was unlocked at step t of environment e, with the present weights."""
        return unit(encode(self.agent, self.observation[e, t + 1]) - encode(self.agent, self.observation[e, t]))

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

    def predict(self, which, key):
        e, start, end, goals = self.episodes[which]
        length, batch = end - start, self.config.auxiliary_batch_size
        if length <= batch:
            chunks, partner = [range(length)], shuffle(key, length, self.padded(length, batch))
        else:
            longest = min(self.config.episode_length, self.action.shape[1])
            order, partner = (shuffle(k, length, longest) for k in jax.random.split(key))
            order = np.asarray(order)[:length]
            chunks = [order[i : i + batch] for i in range(0, length, batch)]
        partner = np.asarray(partner)
        for chunk in chunks:
            vectors = [self.represent(e, t) for t in goals]
            none = unit(-encode(self.agent, self.observation[e, end - 1]))
            terms, rows = [], []
            for step in chunk:
                t, other = start + step, start + partner[step]
                later = [vector for goal, vector in zip(goals, vectors) if t < goal + 1]
                row = lambda t: (self.observation[e, t], self.action[e, t], self.memory[e, t])
                terms.append(prediction_term(self.agent, row(t), row(other), later[0] if later else none))
                rows += [(e, t), (e, other)]
            self.learn("prediction", terms, rows)

    def match(self, which, key):
        e, start, end, goals = self.episodes[which]
        others_key, key = jax.random.split(key)
        negative_key, row_key = jax.random.split(key)
        chance = np.asarray(jax.random.uniform(others_key, (self.most,)))
        others = [i for i in range(len(self.episodes)) if i != which]
        targets = [self.episodes[i] for i in sorted(others, key=lambda i: -chance[i])[: self.config.num_targets]]
        at_most = sum(len(target[3]) for target in targets)
        size = self.padded(at_most, min(self.config.num_targets, self.most) * ACHIEVEMENTS)
        noise = np.asarray(jax.random.gumbel(negative_key, (size, ACHIEVEMENTS)))
        steps = np.asarray(jax.random.randint(row_key, (size,), 0, end - start))
        own, terms, rows, number = [self.represent(e, t) for t in goals], [], [], 0
        for target_env, _, _, target_goals in targets:
            theirs = [self.represent(target_env, t) for t in target_goals]
            cost = 1 - np.array(own) @ np.array(theirs).T
            matched = self.plan(cost) > 0.5
            for u, v in np.argwhere(matched):
                free = [k for k in range(len(theirs)) if self.config.variant == "code" or not matched[:, k].any()]
                if free:
                    negative = theirs[max(free, key=lambda k: noise[number, k])]
                    pair = self.observation[e, goals[u]], self.observation[e, goals[u] + 1]
                    terms.append(matching_term(self.agent, *pair, theirs[v], negative))
                    rows.append((e, start + steps[number]))
                else:
                    self.without_negative += 1
                number += 1
        if terms:
            self.learn("matching", terms, rows)

    def plan(self, cost):
        """POT's; converged where the algorithm's converges."""
        (m, n), converging = cost.shape, self.config.transport == "sinkhorn"
        arguments = dict(m=min(m, n), numItermax=1000 if converging else ppo_ad.transport_iterations(self.config))
        return ot.partial.entropic_partial_wasserstein(np.ones(m), np.ones(n), cost, 0.05, **arguments)


def test_prediction_targets_of_the_worked_example(monkeypatch):
    """Known answer 4: unlocked at t = 2 and t = 6 of 10 steps, so goal steps 3 and 7; t 0-2 predict the first, 3-6 the
    second, 7-9 that there is none."""
    first, unlocked = (jnp.zeros((1, 14), bool).at[0, jnp.array(at)].set(True) for at in ((2, 12), (4, 8)))
    episodes = jit(partial(ppo_ad.find_episodes, achievements=5))(first, unlocked)
    assert episodes.count == 1 and (episodes.start[0], episodes.length[0], episodes.num_goals[0]) == (2, 10, 2)
    np.testing.assert_array_equal(episodes.goals[0, :2] - episodes.start[0] + 1, [3, 7])

    observation = np.random.default_rng(0).normal(size=(14, FEATURES)).astype(np.float32)
    blank = jnp.zeros(14)
    rows = ppo_ad.Rows(jnp.array(observation), blank.astype(int), jnp.zeros((14, 0)), blank, jnp.zeros((14, 3)), blank)
    agent = random_agent(CONFIG, 0)
    names = "config learner sums which loss rows positive negative anchor valid"
    monkeypatch.setattr(ppo_ad, "apply", lambda *args, valid: (args[1], dict(zip(names.split(), args))))

    @jit
    def anchors(agent):
        learner, steps = ppo_ad.Learner(agent, NORMALISER, None, None), jnp.arange(10)
        valid = jnp.ones(10, bool)
        past = ppo_ad.Past(rows, episodes)
        return ppo_ad.predict_steps(CONFIG, learner, {}, past, 0, 2 + steps, steps, steps, valid)[1]["anchor"]

    phi = [encode(exact(agent), o.astype(float)) for o in observation[2:12]]
    targets = [unit(phi[3] - phi[2])] * 3 + [unit(phi[7] - phi[6])] * 4 + [unit(-phi[9])] * 3
    np.testing.assert_allclose(anchors(agent), targets, atol=1e-4)


def check_phase(config, distil, state, padded=lambda count, largest: largest):
    """That the phase equals the slow one. Returns the latter, the state and the metrics."""
    after, info = distil(state)
    key, phase_key = jax.random.split(state.key)
    slow = SlowPhase(config, state, padded)
    slow.run(phase_key)
    assert_same_change(state.agent, after.agent, slow.agent)
    np.testing.assert_allclose(after.normaliser, slow.normaliser.values(), rtol=1e-4)
    for name, steps in slow.metrics.items():
        assert info[f"auxiliary/{name}_steps"] == len(steps)
        expected = np.mean(steps, axis=0) if steps else [np.nan] * 4
        for metric, value in zip(("loss", "accuracy", "policy_divergence", "value_error"), expected):
            np.testing.assert_allclose(info[f"auxiliary/{name}_{metric}"], value, rtol=1e-3, atol=1e-5, err_msg=metric)
        check_adam(getattr(after, f"{name}_optimizer"), slow.adam[name], 7 + len(steps))
    np.testing.assert_array_equal(jax.random.key_data(after.key), jax.random.key_data(key))
    changed = ("agent", "normaliser", "prediction_optimizer", "matching_optimizer", "key")
    same(state, after._replace(**{name: getattr(state, name) for name in changed}))
    goals = [len(goals) for *_, goals in slow.episodes]
    assert info["auxiliary/episodes"] == len(goals)
    np.testing.assert_allclose(info["auxiliary/goals"], np.mean(goals), rtol=1e-5)
    return slow, after, info


@pytest.fixture(scope="module")
def distil():
    return jit(partial(ppo_ad.distil, CONFIG))


def test_an_auxiliary_phase_equals_a_slow_one(distil):
    """No padding, no masks, no batches. Long episodes are split into minibatches."""
    slow, *_ = check_phase(CONFIG, distil, phase_state(CONFIG))
    assert [(end - start, len(goals)) for _, start, end, goals in slow.episodes] == [
        (7, 2), (19, 4), (2, 1), (8, 2), (16, 1), (5, 1)
    ]  # fmt: skip
    assert len(slow.metrics["prediction"]) == 2 * (1 + 3 + 1 + 1 + 2 + 1)
    assert len(slow.metrics["matching"]) == 2 * 6


def test_an_auxiliary_phase_of_the_papers_variant_equals_a_slow_one(monkeypatch):
    """Arrays of matches are padded to 6 or 12, and there is no memory."""
    monkeypatch.setattr(ppo_ad, "sizes", lambda largest: [6, largest] if largest == 12 else [largest])
    config = dataclasses.replace(
        CONFIG, variant="paper", transport="sinkhorn", memory=False, num_targets=3, auxiliary_batch_size=20,
        episode_length=20,
    )  # fmt: skip
    padded = lambda count, largest: 6 if count <= 6 and largest == 12 else largest
    slow, *_ = check_phase(config, jit(partial(ppo_ad.distil, config)), phase_state(config), padded)
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
    same(state.matching_optimizer, after.matching_optimizer)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*(jax.random.key_data(z) if is_key else np.asarray(z) for z in (x, y)))


def test_one_episode_has_nothing_to_match_with(distil):
    state = phase_state(CONFIG, cuts=((), (3, 9, 12)), unlocks=((5,), (4, 6, 7, 14)))
    slow, after, _ = check_phase(CONFIG, distil, state)
    assert not slow.metrics["matching"] and len(slow.metrics["prediction"]) == 2
    same(state.matching_optimizer, after.matching_optimizer)


@pytest.mark.parametrize(("cuts", "unlocks"), [(((), ()), ((), ())), (((3,), (1, 4, 5)), ((4, 7), (0, 6, 39)))])
def test_a_window_without_episodes_changes_nothing(distil, cuts, unlocks):
    """None at all, or none that is whole and has an achievement."""
    state = phase_state(CONFIG, cuts, unlocks)
    after, info = distil(state)
    assert info["auxiliary/episodes"] == info["auxiliary/matching_steps"] == info["auxiliary/prediction_steps"] == 0
    same(state._replace(key=after.key), after)
    assert np.isnan(info["auxiliary/prediction_loss"])


# ---- evaluation ----------------------------------------------------------------------------------------------------

PROBING = dataclasses.replace(ACTING, probe=True, num_eval_envs=6)


def follow(step, acting, keys):
    """Steps of all environments, in NumPy."""
    seen = []
    for key in keys:
        acting, row = step(acting, key)
        seen.append(row)
    return jax.tree.map(lambda *x: np.array(x), *seen)


def slow_probe(agent, steps, updates):
    """Logistic regression on the standardised latents, by full-batch Adam; accuracy and median confidence."""
    data = [[], []]
    time, envs = steps.done.shape
    everything = []
    for e, t in itertools.product(range(envs), range(time)):
        x = encode(agent, steps.observation[t, e].astype(float))
        if e < envs // 2:
            everything.append(x)
        for later in range(t, time):
            before = steps.achievements[later - 1, e] if later and not steps.first[later, e] else np.zeros(ACHIEVEMENTS)
            new = np.flatnonzero(steps.achievements[later, e] & ~before.astype(bool))
            if len(new):
                data[e >= envs // 2].append((x, new[0]))
                break
            if steps.done[later, e]:
                break
    centre, spread = np.mean(everything, axis=0), np.std(everything, axis=0) + 1e-6
    (train_x, train_y), (test_x, test_y) = ((np.array([x for x, _ in d]), np.array([y for _, y in d])) for d in data)
    weights, mu, nu = np.zeros((3, len(centre) + 1, ACHIEVEMENTS))

    def probabilities(x):
        logits = (x - centre) / spread @ weights[:-1] + weights[-1]
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    for i in range(1, updates + 1):
        error = (probabilities(train_x) - np.eye(ACHIEVEMENTS)[train_y]) / len(train_y)
        inputs = np.append((train_x - centre) / spread, np.ones((len(train_y), 1)), axis=1)
        gradient = inputs.T @ error
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
        weights -= 0.01 * (mu / (1 - 0.9**i)) / (np.sqrt(nu / (1 - 0.999**i)) + 1e-8)
    p = probabilities(test_x)
    return np.mean(p.argmax(1) == test_y), np.median(p[np.arange(len(test_y)), test_y]), len(test_y) / (time * envs / 2)


def test_evaluation_and_probe_equal_loops(monkeypatch):
    """The first episode of each environment; and the probe's labels and fit."""
    monkeypatch.setattr(ppo_ad, "PROBE_STEPS", 40)
    monkeypatch.setattr(ppo_ad, "PROBE_UPDATES", 30)
    vector, agent = Scripted().vectorise(6, LIMIT), random_agent(ACTING, 0)
    info = jit(partial(ppo_ad.evaluate, PROBING, vector))(agent, jax.random.key(0))

    begin = jit(partial(ppo_ad.start_acting, PROBING, vector))
    step = jit(partial(ppo_ad.step, PROBING, vector, agent, ppo_ad.Normaliser(*jnp.zeros(3))))
    start_key, step_key, probe_key = jax.random.split(jax.random.key(0), 3)
    keys = [jax.random.fold_in(step_key, t) for t in range(LIMIT)]
    steps = follow(step, begin(start_key), keys)
    ends = steps.done.argmax(axis=0), np.arange(6)
    success = steps.achievements[ends].mean(axis=0)
    np.testing.assert_allclose(info["eval/return"], steps.episode_return[ends].mean(), rtol=1e-5)
    np.testing.assert_allclose(info["eval/episode_length"], ends[0].mean() + 1, rtol=1e-6)
    np.testing.assert_allclose([info[f"eval/success/a{i}"] for i in range(ACHIEVEMENTS)], success, rtol=1e-6)
    score = math.prod(1 + 100 * s for s in success) ** (1 / ACHIEVEMENTS) - 1
    np.testing.assert_allclose(info["eval/score"], score, rtol=1e-4)
    assert len(set(ends[0])) > 2 and (steps.achievements[ends] != steps.achievements[ends[0] - 1, ends[1]]).any()

    start_key, probe_key = jax.random.split(probe_key)
    steps = follow(step, begin(start_key), jax.random.split(probe_key, 40))
    accuracy, confidence, labelled = slow_probe(exact(agent), steps, 30)
    np.testing.assert_allclose(info["eval/probe_accuracy"], accuracy, rtol=1e-5)
    np.testing.assert_allclose(info["eval/probe_confidence"], confidence, rtol=1e-3)
    assert 0.3 < labelled < 0.9
