"""The parts of ppo_ad.py on a small scripted environment: acting, episodes, learning, the auxiliary phase, the probe.

Expected values come from slow loops over lists of exact sizes, written from the fact sheet (and given the same random
draws), on the formulas of test_ppo_ad_losses.py.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import NamedTuple

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
    perturbed,
    predict,
    unit,
    unit_rows,
)

from algorithms import ppo_ad
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
    return jax.jit(lambda key: ppo_ad.make_agent(config, env, key))(jax.random.key(0))


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
        weight = np.asarray(layer.weight).reshape(len(layer.weight), -1)
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), norm, rtol=1e-4)
        assert len(np.unique(weight.round(6), axis=0)) == len(weight), "filters are alike"
    for head, gain in ((agent.policy, 0.01), (agent.value, 0.1)):
        weight = np.asarray(head.weight, float)
        np.testing.assert_allclose(weight @ weight.T, gain**2 * np.eye(len(weight)), atol=1e-5 * gain)
        assert weight.shape[1] == 2048
    biases = [agent.policy.bias, agent.value.bias, agent.film.out.bias, agent.predictor.out.bias]
    assert not any(np.asarray(bias).any() for bias in [*biases, encoder.stacks[0].first.bias])
    norms = [layer.layer_norm for layer in (encoder.dense, encoder.latent, agent.film.hidden, agent.predictor.hidden)]
    norms += [stack.group_norm for stack in encoder.stacks]
    norms += [layer.group_norm for layer, _ in layers[1:15]]
    assert all((np.asarray(norm.weight) == 1).all() and not np.asarray(norm.bias).any() for norm in norms)


def test_the_first_policy_is_nearly_uniform(paper_agent):
    """Known answers 1 and 2: the latent state, and entropy ln 17."""
    rng = np.random.default_rng(0)

    @jax.jit
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
        return ppo_ad.envs.State(script, look(script.key, script.clock), jnp.zeros(0), reward, terminated, bits)


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
    ([5, 5, 6, NEVER], 8),  # two at once; one on the last step of a rollout
)
"""Of the first episodes."""


@pytest.fixture(scope="module")
def start():
    """The state before the first step, with two agents."""

    @jax.jit
    def make(key):
        state = ppo_ad.init(ACTING, VECTOR, key)
        agents = [perturbed(state.agent, jax.random.key(i)) for i in (1, 2)]
        envs = state.acting.envs
        unlock, end = (jnp.array(x) for x in zip(*SCRIPTS))
        envs = envs._replace(env=envs.env._replace(physics=envs.env.physics._replace(unlock=unlock, end=end)))
        return state._replace(acting=state.acting._replace(envs=envs), normaliser=NORMALISER), agents

    return make(jax.random.key(0))


ROLLOUTS = 3


@pytest.fixture(scope="module", params=[False, True], ids=["published", "bootstrap"])
def rollouts(request, start):
    """Three rollouts with agents by turns: all steps in one, the agent of each step, and the bootstrapped values."""
    state, agents = start
    config = dataclasses.replace(ACTING, bootstrap_time_limit=request.param)
    collect = jax.jit(partial(ppo_ad.collect, config, VECTOR))
    acting, recorded, used, last = state.acting, [], [], []
    for i in range(ROLLOUTS):
        acting, rollout = collect(agents[i % 2], state.normaliser, acting)
        recorded.append(rollout.steps)
        last.append((rollout.last_value, acting))
        used += [exact(agents[i % 2])] * STEPS
    steps = jax.tree.map(lambda *x: np.concatenate(x), *recorded)
    return request.param, steps, used, last


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


def test_memories_of_the_worked_example(rollouts):
    """Known answer 4: unlocked at t = 2 and t = 6 in an episode of length 10. The second is on the last step of a
    rollout; the weights that collected it make its memory, not those that act next."""
    _, steps, used, _ = rollouts
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


def test_memories_equal_a_loop(rollouts):
    _, steps, used, _ = rollouts
    for e, t, memory in slow_memories(steps, used):
        np.testing.assert_allclose(steps.memory[t, e], memory, atol=1e-4, err_msg=f"{e} {t}")
    assert (np.abs(steps.memory[STEPS:, 3]).max(1) > 0).any()


def test_what_is_unlocked_on_the_last_step_counts_but_is_no_goal(rollouts):
    """Known answer 5."""
    _, steps, _, _ = rollouts
    for e, t in ((1, 9), (2, 4)):
        assert steps.done[t, e] and not steps.unlocked[t, e]
        assert steps.achievements[t, e].sum() == 2 and steps.achievements[t - 1, e].sum() == 1
        assert steps.first[t + 1, e] and not steps.memory[t + 1, e].any()
        assert not steps.achievements[t + 1, e, 0] or steps.unlocked[t + 1, e] or steps.done[t + 1, e]


def test_steps_record_what_happened(rollouts):
    bootstrap, steps, used, last = rollouts
    mean, deviation = SlowNormaliser(NORMALISER).moments()
    surprise = variance = 0
    for e in range(ENVS):
        episode_return = length = 0
        bits = np.zeros(ACHIEVEMENTS, bool)
        for t in range(ROLLOUTS * STEPS):
            log_probs, value = act(used[t], encode(used[t], steps.observation[t, e].astype(float)), steps.memory[t, e])
            action = steps.action[t, e]
            np.testing.assert_allclose(steps.log_prob[t, e], log_probs[action], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(steps.value[t, e], mean + deviation * value, rtol=1e-4, atol=1e-5)
            surprise += log_probs[action] - np.exp(log_probs) @ log_probs
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
    assert variance > 5
    for i, (last_value, acting) in enumerate(last[:-1]):
        t = STEPS * (i + 1)
        for e in range(ENVS):
            before = used[t - 1]
            value = act(before, encode(before, steps.observation[t, e].astype(float)), steps.memory[t, e])[1]
            np.testing.assert_allclose(last_value[e], mean + deviation * value, rtol=1e-4, atol=1e-5)
        assert not np.asarray(acting.unlocked).any()


def test_returns_go_on_at_the_time_limit_only_if_asked(rollouts, start):
    """The value of the state that the time limit cut off, with what its last step unlocked as its memory."""
    bootstrap, steps, used, _ = rollouts
    mean, deviation = SlowNormaliser(NORMALISER).moments()
    keys = start[0].acting.envs.env.physics.key
    raw = lambda t, e, new: new + 0.1 * steps.action[t, e]
    for e, new in ((0, 0), (1, 1)):
        assert steps.done[9, e]
        agent, terminal = used[9], encode(used[9], np.asarray(look(keys[e], 10), float))
        memory = unit(terminal - encode(agent, steps.observation[9, e].astype(float))) if new else steps.memory[9, e]
        value = mean + deviation * act(agent, terminal, memory)[1]
        expected = raw(9, e, new) + (0.9 * value if bootstrap else 0)
        np.testing.assert_allclose(steps.reward[9, e], expected, rtol=1e-4)
        assert abs(value) > 0.05
    for e, t in ((2, 4), (3, 8)):
        assert steps.done[t, e]
        np.testing.assert_allclose(steps.reward[t, e], raw(t, e, e == 2), rtol=1e-5)


# ---- learning ------------------------------------------------------------------------------------------------------


def warm(optimizer, seed):
    """Adam's state after some steps, so that the size of the next gradient matters, and no rounding of a zero does."""
    rng = np.random.default_rng(seed)
    clip, (adam, *rest) = optimizer
    mu = jax.tree.map(lambda x: jnp.array(1e-3 * rng.normal(size=x.shape), jnp.float32), adam.mu)
    nu = jax.tree.map(lambda x: jnp.array(1e-5 * (1 + rng.random(x.shape)), jnp.float32), adam.nu)
    return clip, (adam._replace(count=jnp.array(7, jnp.int32), mu=mu, nu=nu), *rest)


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


def total(trees):
    """Sum of gradients, in float64."""
    return jax.tree.map(lambda *x: sum(x), *map(exact, trees))


def mean(trees):
    trees = list(trees)
    return jax.tree.map(lambda x: x / len(trees), total(trees))


def assert_same_change(start, got, expected, tolerance=1e-3):
    """Of every leaf, what has been added to it; relative to the largest change."""
    for (path, a), b, c in zip(jax.tree.leaves_with_path(exact(start)), *map(jax.tree.leaves, (exact(got), expected))):
        assert np.abs(c - a).max() > 0
        scale = np.abs(c - a).max()
        np.testing.assert_allclose(b - a, c - a, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def learned(rollouts, start):
    """Two updates, on the first two rollouts: states before and after, and metrics."""
    (state, agents), (_, steps, _, last) = start, rollouts
    config = dataclasses.replace(ACTING, total_env_steps=2 * ENVS * STEPS - ENVS)
    learn = jax.jit(partial(ppo_ad.learn, config))
    states, infos = [state._replace(agent=agents[0], ppo_optimizer=warm(state.ppo_optimizer, 0))], []
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: jnp.array(x[i * STEPS : (i + 1) * STEPS]), steps)
        after, info = learn(states[-1], last[i][1], ppo_ad.Rollout(part, last[i][0]))
        states.append(after)
        infos.append(info)
    return config, states, infos


def slow_returns(steps, last_value, rollout):
    """Advantages and returns of a rollout, as lists over time and environments."""
    at, advantage = rollout * STEPS, np.zeros((STEPS, ENVS))
    value = np.concatenate([steps.value[at : at + STEPS], last_value[None]]).astype(float)
    for e in range(ENVS):
        later = 0
        for t in reversed(range(STEPS)):
            on = 0 if steps.done[at + t, e] else 1
            delta = steps.reward[at + t, e] + 0.9 * on * value[t + 1, e] - value[t, e]
            later = advantage[t, e] = delta + 0.9 * 0.7 * on * later
    return advantage, advantage + value[:-1]


def test_an_update_equals_a_slow_one(rollouts, learned):
    """Every gradient step of PPO, with the advantages standardised once (n - 1), minibatches, clipping and Adam."""
    _, steps, _, last = rollouts
    config, (before, after, _), (info, _) = learned
    part = jax.tree.map(lambda x: x[:STEPS], steps)
    advantage, returns = slow_returns(steps, last[0][0], 0)
    flat = advantage.ravel()
    standard = (flat - flat.mean()) / (math.sqrt(((flat - flat.mean()) ** 2).sum() / (flat.size - 1)) + 1e-8)

    @jax.jit
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
    assert after.ppo_optimizer[1][0].count == 7 + 8
    np.testing.assert_allclose(jax.tree.leaves(exact(after.ppo_optimizer[1][0].nu))[0], jax.tree.leaves(adam.nu)[0], rtol=1e-3)


def test_rollouts_join_the_window_in_order(rollouts, learned):
    _, steps, _, last = rollouts
    _, (_, *states), _ = learned
    for count, state in enumerate(states, 1):
        window = jax.tree.map(np.asarray, state.window)
        for name in ("observation", "action", "memory", "first", "unlocked"):
            for e, t in itertools.product(range(ENVS), range(STEPS * count)):
                np.testing.assert_array_equal(getattr(window, name)[e, t], getattr(steps, name)[t, e], err_msg=name)
        for i in range(count):
            returns = slow_returns(steps, last[i][0], i)[1]
            np.testing.assert_allclose(window.returns[:, i * STEPS : (i + 1) * STEPS], returns.T, rtol=1e-4, atol=1e-5)
        assert not window.observation[:, STEPS * count :].any()
        assert state.rollouts == count
    full = ppo_ad.extend(ACTING, states[-1].window, jnp.array(3), jax.tree.map(lambda x: x[:STEPS], steps), returns)
    np.testing.assert_array_equal(full.returns[:, :STEPS], returns.T.astype(np.float32))
    np.testing.assert_array_equal(full.observation[:, STEPS : 2 * STEPS], steps.observation[STEPS : 2 * STEPS].swapaxes(0, 1))


def test_scores_count_the_episodes_that_end_within_the_budget(rollouts, learned):
    """The budget excludes the last step of the second rollout."""
    _, steps, _, _ = rollouts
    config, (_, *states), infos = learned
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
        np.testing.assert_allclose(info["train/return"], np.mean([steps.episode_return[x] for x in now]), rtol=1e-5)
        np.testing.assert_allclose(info["train/episode_length"], np.mean([steps.episode_steps[x] for x in now]), rtol=1e-5)


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
        scores, info = ppo_ad.score_episodes(config, state._replace(rollouts=jnp.array(rollout)), steps)
        assert scores.episodes == expected
        np.testing.assert_array_equal(scores.successes, [expected, expected, 0, expected])
        np.testing.assert_allclose(info["train/score"], 101 ** (3 / 4) - 1, rtol=1e-4)
        state = state._replace(scores=scores)
    none = ppo_ad.score_episodes(config, state._replace(rollouts=jnp.array(3)), steps)[1]
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
    find = jax.jit(lambda first, unlocked: ppo_ad.find_episodes(first, unlocked, 6))
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
    assert len(check_episodes(first, unlocked, partial(ppo_ad.find_episodes, achievements=3))) == 10
    first = np.pad(first, ((0, 0), (0, 1)), constant_values=True)
    unlocked = np.pad(unlocked, ((0, 0), (0, 1)))
    assert len(check_episodes(first, unlocked, partial(ppo_ad.find_episodes, achievements=3))) == 12


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_shuffle_is_a_permutation(count):
    orders = np.asarray(jax.vmap(lambda key: ppo_ad.shuffle(key, jnp.array(count), 5))(jax.random.split(jax.random.key(0), 20)))
    np.testing.assert_array_equal(np.sort(orders[:, :count]), np.tile(np.arange(count), (20, 1)))
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(5), (20, 1)))


def test_shuffle_is_uniform():
    keys = jax.random.split(jax.random.key(1), 12_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: ppo_ad.shuffle(key, jnp.array(4), 7)))(keys))[:, :4]
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


def phase_state(config, seed=0):
    """The state before an auxiliary phase, with a window made by hand."""
    rng = np.random.default_rng(seed)
    first, unlocked = np.zeros(WINDOW, bool), np.zeros(WINDOW, bool)
    for e in range(2):
        first[e, list(CUTS[e])] = True
        unlocked[e, list(UNLOCKS[e])] = True
    size = ppo_ad.memory_size(config)
    memory = unit_rows(rng, *WINDOW, size) * (rng.random((*WINDOW, 1)) < 0.7) if size else np.zeros((*WINDOW, 0))
    observation = rng.normal(size=(*WINDOW, FEATURES))
    returns, action = rng.normal(1, 1, WINDOW), rng.integers(0, 3, WINDOW)
    window = [jnp.array(x, jnp.float32) for x in (observation, memory, returns)]
    window = ppo_ad.Window(window[0], jnp.array(action, jnp.int32), *window[1:], jnp.array(first), jnp.array(unlocked))
    vector = Scripted().vectorise(2, 30)

    @jax.jit
    def make(key):
        state = ppo_ad.init(config, vector, key)
        return state._replace(agent=perturbed(state.agent, jax.random.key(seed + 1)), normaliser=NORMALISER)

    state = make(jax.random.key(seed))
    prediction, matching = (warm(x, i) for i, x in enumerate((state.prediction_optimizer, state.matching_optimizer)))
    return state._replace(window=window, prediction_optimizer=prediction, matching_optimizer=matching)


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
        self.metrics = {name: [] for name in self.adam}

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def prediction_term(agent, positive, negative, anchor):
            psi = lambda o, a, m: predict(agent, encode(agent, o, jnp), a, m, jnp)
            p, n = psi(*positive), psi(*negative)
            return contrast(anchor, p, n, jnp), anchor @ p > anchor @ n

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def matching_term(agent, before, after, positive, negative):
            anchor = unit(encode(agent, after, jnp) - encode(agent, before, jnp), jnp)
            return contrast(anchor, positive, negative, jnp), anchor @ positive > anchor @ negative

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def regulariser(agent, observation, memory, old, target):
            log_probs, value = act(agent, encode(agent, observation, jnp), memory, jnp)
            if config.variant == "code":
                divergence, error = jnp.exp(log_probs) @ (log_probs - old), (value - target) ** 2
            else:
                divergence, error = jnp.exp(old) @ (old - log_probs), (value - target) ** 2 / 2
            return divergence + error, (divergence, error)

        self.prediction_term, self.matching_term, self.regulariser = prediction_term, matching_term, regulariser

    def run(self, key):
        for epoch_key in jax.random.split(key, self.config.auxiliary_epochs):
            matching_key, prediction_key = jax.random.split(epoch_key)
            for visit, visit_key in ((self.match, matching_key), (self.predict, prediction_key)):
                order_key, visit_key = jax.random.split(visit_key)
                order = ppo_ad.shuffle(order_key, jnp.array(len(self.episodes)), self.most)[: len(self.episodes)]
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
            chunks, partner = [range(length)], ppo_ad.shuffle(key, jnp.array(length), self.padded(length, batch))
        else:
            longest = self.config.episode_length
            order, partner = (ppo_ad.shuffle(k, jnp.array(length), longest) for k in jax.random.split(key))
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
                terms.append(self.prediction_term(self.agent, row(t), row(other), later[0] if later else none))
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
                    terms.append(self.matching_term(self.agent, *pair, theirs[v], negative))
                    rows.append((e, start + steps[number]))
                number += 1
        if terms:
            self.learn("matching", terms, rows)

    def plan(self, cost):
        """POT's; converged where the algorithm's converges."""
        (m, n), converging = cost.shape, self.config.transport == "sinkhorn"
        arguments = dict(m=min(m, n), numItermax=3000 if converging else self.config.transport_iterations)
        return ot.partial.entropic_partial_wasserstein(np.ones(m), np.ones(n), cost, 0.05, **arguments)


@pytest.mark.parametrize(
    ("options", "buckets"),
    [({}, []), ({"variant": "paper", "transport": "sinkhorn", "memory": False, "num_targets": 3}, [3])],
    ids=["code", "paper"],
)
def test_an_auxiliary_phase_equals_a_slow_one(monkeypatch, options, buckets):
    """No padding, no masks, no batches; the second time, arrays are padded to 3 or to the largest size."""
    if buckets:
        monkeypatch.setattr(ppo_ad, "sizes", lambda largest: [*buckets, largest])
    padded = lambda count, largest: next(size for size in [*buckets, largest] if count <= size)
    config = dataclasses.replace(CONFIG, **options)
    state = phase_state(config)
    after, info = jax.jit(partial(ppo_ad.distil, config))(state)
    key, phase_key = jax.random.split(state.key)
    slow = SlowPhase(config, state, padded)
    slow.run(phase_key)

    assert [(end - start, len(goals)) for _, start, end, goals in slow.episodes] == [
        (7, 2), (19, 4), (2, 1), (8, 2), (16, 1), (5, 1)
    ]  # fmt: skip
    assert len(slow.metrics["prediction"]) == 2 * (1 + 3 + 1 + 1 + 2 + 1)
    assert_same_change(state.agent, after.agent, slow.agent)
    np.testing.assert_allclose(after.normaliser, slow.normaliser.values(), rtol=1e-4)
    for name, steps in slow.metrics.items():
        assert info[f"auxiliary/{name}_steps"] == len(steps)
        expected = np.mean(steps, axis=0)
        for metric, value in zip(("loss", "accuracy", "policy_divergence", "value_error"), expected):
            np.testing.assert_allclose(info[f"auxiliary/{name}_{metric}"], value, rtol=1e-3, atol=1e-5, err_msg=metric)
        _, (adam, *_) = getattr(after, f"{name}_optimizer")
        assert adam.count == slow.adam[name].count == 7 + len(steps)
    assert info["auxiliary/episodes"] == 6
    np.testing.assert_allclose(info["auxiliary/goals"], 11 / 6, rtol=1e-5)
    np.testing.assert_array_equal(jax.random.key_data(after.key), jax.random.key_data(key))
