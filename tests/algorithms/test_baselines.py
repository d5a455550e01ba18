"""sac.py, td3.py, gcsl.py and c_learning.py: golden numbers of the fact sheet (baselines_gcrl, section 9), NumPy, what
an update changes, and resumed runs."""

import copy
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import check_repeats_its_end, metrics
from stubs import Fixed, Line, Sizes

import envs
from algorithms import c_learning, crl, gcsl, sac, td3
from shared import pictures, run
from shared import replay as buffer

SCRIPTS = (sac, td3, gcsl, c_learning)


class Plane(Sizes):
    """Two numbers that are the goal, reached within 0.5."""

    success_radius = 0.5

    def __init__(self):
        super().__init__(2, 1, 2)


STATES = np.array([(0, 0), (1, 0), (2, 0.4), (2.3, 0.6), (3, 1), (3.2, 1.1)], np.float32)
"""Of 9.1: five transitions, the last one cut off by the time limit."""


def recorded(states, last):
    """A replay of sac.py with one environment: its rows in order."""
    n = len(last)
    rows = sac.Transition(states[:-1], np.zeros((n, 1)), states[1:], np.full((n, 2), 9), np.zeros(n))
    rows = jax.tree.map(lambda x: jnp.array(x, jnp.float32)[:, None], rows)
    replay = buffer.init(jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), rows), n, 1)
    return buffer.add(replay, rows, jnp.array(last)[:, None])


def by_row(batch, states):
    """Goal and reward of each row that a batch holds, which are the same wherever the row is."""
    found = {}
    for observation, goal, reward in zip(*map(np.asarray, (batch.observation, batch.goal, batch.reward))):
        (row,) = np.flatnonzero((states[:-1] == observation).all(-1))
        found.setdefault(row, set()).add((*goal.astype(float).round(4).tolist(), float(reward)))
    return [found[row] for row in range(len(states) - 1)]


@pytest.mark.parametrize("script", [sac, td3])
def test_hindsight_goals_and_rewards_are_those_of_the_sheet(script, monkeypatch):
    replay = recorded(STATES, [False] * 4 + [True])
    config = script.Config(her="final", her_share=1.0, batch_size=400)
    batch = script.sample(config, Plane(), replay, jax.random.key(0))
    assert by_row(batch, STATES) == [{(3.2, 1.1, reward)} for reward in (0, 0, 0, 1, 1)]
    future = jnp.array([1, 1, 3, 3, 4])  # rows whose next states are s_2, s_2, s_4, s_4, s_5
    pairs = buffer.Pairs(jnp.zeros(5, int), jnp.arange(5), future)
    monkeypatch.setattr(buffer, "sample_future", lambda *_: pairs)
    batch = script.sample(script.Config(her_share=1.0, batch_size=5), Plane(), replay, jax.random.key(0))
    np.testing.assert_array_equal(batch.goal, STATES[[2, 2, 4, 4, 5]])
    np.testing.assert_array_equal(batch.reward, [0, 1, 0, 1, 1])


def test_hindsight_goals_stay_within_their_episode_after_a_fall():
    """The sheet's misaligned case: the first episode ends by a fall after three rows."""
    states = np.array([(0, 0), (1, 0), (2, 0.4), (5, 5), (5.3, 5.2), (5.4, 5.3)], np.float32)
    replay = recorded(states, [False, False, True, False, True])
    # the state after the fall is the terminal one; here the next row's, since the rows are consecutive
    batch = sac.sample(sac.Config(her="final", her_share=1.0, batch_size=400), Plane(), replay, jax.random.key(0))
    assert by_row(batch, states) == [{(5, 5, r)} for r in (0, 0, 1)] + [{(5.4, 5.3, 1.0)}] * 2


@pytest.mark.parametrize("script", [sac, td3])
@pytest.mark.parametrize(("her", "share"), [("none", 0.8), ("future", 0.25), ("geometric", 1.0), ("final", 0.5)])
def test_rows_keep_their_commanded_goal_or_get_one_that_their_episode_reached(script, her, share):
    """Against a loop over a recorded buffer with time limits."""
    config = script.Config(
        num_envs=4, episode_length=9, unroll_length=40, max_replay_size=40, width=8, her=her, her_share=share,
        batch_size=200, total_env_steps=100_000,
    )  # fmt: skip
    env = envs.make("point_u_maze")
    state = jax.jit(lambda key: script.collect(config, env, script.init(config, env, key)))(jax.random.key(0))
    rows = jax.tree.map(np.asarray, state.replay.data)
    batch = jax.tree.map(np.asarray, script.sample(config, env, state.replay, jax.random.key(1)))
    hindsight = 0
    for i in range(200):
        (t, e), *_ = np.argwhere((rows.observation == batch.observation[i]).all(-1))
        end = min(t // 9 * 9 + 8, 39)
        reached = rows.next_observation[t : end + 1, e]
        at_end = (reached[-1:] if her == "final" else reached) == batch.goal[i]
        if i < share * 200 and her != "none":
            assert at_end.all(-1).any()
            hindsight += 1
        else:
            np.testing.assert_array_equal(batch.goal[i], rows.goal[t, e])
        distance = np.linalg.norm(batch.next_observation[i] - batch.goal[i])
        assert batch.reward[i] == (distance < env.success_radius)
    assert hindsight == (0 if her == "none" else 200 * share)
    np.testing.assert_array_equal(rows.next_observation[:8], rows.observation[1:9])  # until the time limit
    assert (rows.next_observation[8] != rows.observation[9]).any(), "the terminal state, not the next episode's first"


# ---- targets and losses --------------------------------------------------------------------------------------------


def test_sac_targets_and_loss_are_those_of_the_sheet(monkeypatch):
    target = jnp.array([(1.0, 2, 3, 4, 5), (1.5, 1.8, 3.2, 3.9, 5.5)])
    q = jnp.array([(1.2, 2, 3, 4.4, 5), (1.1, 1.9, 3.3, 4, 5)])
    monkeypatch.setattr(sac, "q_values", lambda critics, *_: critics)
    monkeypatch.setattr(sac, "policy", lambda *_: Fixed(jnp.array([-0.5, 0.2, 0.1, -1, 0.3])))
    agent = sac.Agent(None, None, jnp.log(0.1))
    batch = sac.Batch(None, None, None, None, jnp.array([0.0, 1, 0, 1, 1]), jnp.zeros(5))
    loss = inspect.unwrap(sac.critic_loss)
    value, info = loss(q, agent, target, batch, None, sac.Config(discount=0.9))
    np.testing.assert_allclose(value, 0.112904, atol=1e-6)
    np.testing.assert_allclose(info["train/reward"], 0.6)
    # a fall at the last row: nothing follows
    fallen = batch._replace(terminated=jnp.array([0.0, 0, 0, 0, 1]))
    np.testing.assert_allclose(loss(q, agent, target, fallen, None, sac.Config(discount=0.9))[0], 1.690531, atol=1e-6)
    # y = q - 10/2 * 2 dloss/dq
    y = q - 10 * jax.grad(lambda q: loss(q, agent, target, batch, None, sac.Config(discount=0.9))[0])(q)
    np.testing.assert_allclose(y, np.tile([0.945, 2.602, 2.691, 4.6, 5.473], (2, 1)), atol=1e-5)


def test_td3_targets_noise_and_loss_are_those_of_the_sheet(monkeypatch):
    epsilon = jnp.array([(1, -4), (0.5, 2), (-3, 0)])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: epsilon[: shape[0]])
    action = jnp.array([(0.95, -0.2), (-0.6, 0.99), (0.1, 0.3)])
    smooth = td3.Noisy(action, 0.2, 0.5).sample(jax.random.key(0))
    np.testing.assert_allclose(smooth, [(1, -0.7), (-0.5, 1), (-0.4, 0.3)], atol=1e-6)

    def q_values(critics, observation, action, goal):
        if critics is not None:
            return critics
        first = observation @ jnp.array([1, 0.5]) + action @ jnp.array([0.3, -0.7])
        second = observation @ jnp.array([0.8, 0.4]) + action @ jnp.array([-0.2, 0.6]) + 0.1
        return jnp.stack([first, second])

    monkeypatch.setattr(td3, "q_values", q_values)
    monkeypatch.setattr(td3, "policy", lambda *_: td3.Noisy(action, 0.4, 0.5))
    observation = jnp.array([(0.5, 1), (2, -1), (0, 0.25)])
    batch = td3.Batch(None, None, observation, None, jnp.array([0.0, 1, 0]), jnp.array([0.0, 0, 1]))
    q, target = jnp.array([(0.2, 1.5, 0.3), (0.4, 1, -0.1)]), td3.Agent(None, None)
    value = inspect.unwrap(td3.critic_loss)(q, target, batch, jax.random.key(0), td3.Config(discount=0.9))[0]
    np.testing.assert_allclose(value, 0.039505, atol=1e-6)
    epsilon = jnp.array([(2, -0.6)])
    explored = td3.Noisy(jnp.zeros((1, 2)), 0.4, 0.5).sample(jax.random.key(0))
    np.testing.assert_allclose(explored, [(0.5, -0.24)], atol=1e-6)
    epsilon = jnp.array([(9.0, 9.0)])
    np.testing.assert_array_equal(td3.Noisy(jnp.full((1, 2), 0.9), 0.4, 0.5).sample(jax.random.key(0)), 1)


def numpy_c_learning(true, random, target, discount, clip, nce):
    """Row by row, from the formulas."""
    cross_entropy = lambda f, label: np.log1p(np.exp(-f if label else f))
    total = 0
    for j, i in np.ndindex(true.shape):
        c = 1 / (1 + np.exp(-target[:, i].min()))
        w = min(c / (1 - c), clip)
        total += (1 - discount + nce) * cross_entropy(true[j, i], 1)
        total += discount * w * cross_entropy(random[j, i], 1) + (1 + nce) * cross_entropy(random[j, i], 0)
    return total / true.size


@pytest.mark.parametrize(
    ("loss", "clip", "golden"),
    [("c_learning", None, 4.635554), ("c_learning", 20.0, 8.053517), ("nce_c_learning", 20.0, 9.108431)],
)
def test_c_learning_losses_are_those_of_the_sheet_and_of_numpy(monkeypatch, loss, clip, golden):
    true = np.array([(0.5, -0.2, 1), (0.3, 0.1, 0.8)])
    random = np.array([(-1, 0.4, -0.6), (-0.8, 0.2, -0.9)])
    target = np.array([(-0.5, 1.2, 3.5), (-0.2, 0.9, 4)])
    batch = c_learning.Batch(None, None, None, "future", "random")
    critics = {"future": jnp.array(true), "random": jnp.array(random)}
    monkeypatch.setattr(c_learning, "logits", lambda critics, observation, action, goal: critics[goal])
    monkeypatch.setattr(c_learning, "policy", lambda *_: Fixed(None))
    config = c_learning.Config(loss=loss, weight_clip=clip, discount=0.9)
    value, info = inspect.unwrap(c_learning.critic_loss)(
        critics, None, {"random": jnp.array(target)}, batch, None, config
    )
    np.testing.assert_allclose(value, golden, atol=2e-5)
    exact = numpy_c_learning(true, random, target, 0.9, clip or 10, loss == "nce_c_learning")
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    weights = np.minimum([0.606531, 2.459603, 33.115452], clip or 10)
    np.testing.assert_allclose(info["train/weight"], weights.mean(), rtol=1e-5)


@pytest.mark.parametrize(("size", "discount", "near"), [(256, 0.99, 2), (512, 0.99, 5), (8, 0.75, 1)])
def test_nce_c_learning_has_next_states_in_so_many_rows(monkeypatch, size, discount, near):
    states = np.stack([np.arange(1001), np.zeros(1001)], axis=1).astype(np.float32)
    rows = c_learning.Transition(states[:-1], np.zeros((1000, 1), np.float32), states[1:])
    replay = buffer.init(c_learning.Transition(jnp.zeros(2), jnp.zeros(1), jnp.zeros(2)), 1000, 1)
    replay = buffer.add(replay, jax.tree.map(lambda x: jnp.array(x)[:, None], rows), jnp.zeros((1000, 1), bool))
    pairs = buffer.Pairs(jnp.zeros(size, int), jnp.arange(size), jnp.arange(size) + 3)
    monkeypatch.setattr(buffer, "sample_future", lambda *_: pairs)
    config = c_learning.Config(loss="nce_c_learning", batch_size=size, discount=discount)
    batch = c_learning.sample(config, Plane(), replay, jax.random.key(0))
    ahead = np.asarray(batch.future - batch.observation)[:, 0]
    np.testing.assert_array_equal(ahead, [1] * near + [4] * (size - near))
    np.testing.assert_array_equal(batch.random, np.roll(batch.future, -1, axis=0))
    only_next = c_learning.sample(c_learning.Config(batch_size=size), Plane(), replay, jax.random.key(0))
    np.testing.assert_array_equal(only_next.future, only_next.next_observation)


# ---- updates -------------------------------------------------------------------------------------------------------


def begun(script, **settings):
    """A config, and a state with experience, on the line."""
    small = dict(
        num_envs=8, episode_length=9, unroll_length=30, min_replay_size=30, max_replay_size=30, batch_size=32, width=8,
        updates_per_chunk=2, total_env_steps=100_000,
    )  # fmt: skip
    config = script.Config(**(small | settings))
    return config, jax.jit(lambda key: script.collect(config, Line(), script.init(config, Line(), key)))(
        jax.random.key(0)
    )


def changed(old, new):
    return [bool((np.asarray(a) != np.asarray(b)).any()) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new))]


@pytest.mark.parametrize("script", [sac, td3, c_learning])
def test_targets_follow_in_closed_form(script):
    """After n updates a target is (1 - rate)^n times its start, and rate (1 - rate)^(n - i) of the i-th network."""
    rate = 0.2
    config, state = begun(script, target_rate=rate)
    update = jax.jit(partial(script.update, config, Line()))
    networks = (lambda state: state.agent) if script is td3 else (lambda state: state.agent.critics)
    assert not any(changed(networks(state), state.target))
    expected = jax.tree.map(lambda x: (1 - rate) ** 4 * np.asarray(x), state.target)
    for i in range(1, 5):
        state, _ = update(state, jax.random.key(i))
        share = rate * (1 - rate) ** (4 - i)
        expected = jax.tree.map(lambda x, new, share=share: x + share * np.asarray(new), expected, networks(state))
    for ours, exact in zip(jax.tree.leaves(state.target), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-6)
    assert int(state.gradient_steps) == 4 * (config.policy_delay if script is td3 else 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_changes_every_network_and_targets_carry_no_gradient(script):
    config, state = begun(script)
    arguments = (config,) if script is gcsl else (config, Line())
    new, _ = jax.jit(partial(script.update, *arguments))(state, jax.random.key(1))
    biases_of_logits = 1  # a raw log-std at which the gradient is 0 may stay
    assert sum(not each for each in changed(state.agent, new.agent)) <= biases_of_logits
    if script is gcsl:
        return
    batch = script.sample(config, Line(), state.replay, jax.random.key(2))
    agent, target = state.agent, state.target
    if script is td3:
        loss = lambda target: script.critic_loss(agent.critics, target, batch, jax.random.key(3), config)[0]
        frozen = (jax.grad(loss)(target),)
    else:
        loss = lambda agent, target: script.critic_loss(
            state.agent.critics, agent, target, batch, jax.random.key(3), config
        )[0]
        frozen = jax.grad(loss, (0, 1))(agent, target)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize("script", [sac, c_learning])
def test_gradients_are_taken_at_the_parameters_from_before_the_update(script):
    """So the step of one network does not depend on the learning rates of the others."""
    config, state = begun(script)

    @jax.jit
    def after(actor_lr, critic_lr):
        rates = copy.copy(config)
        vars(rates).update(actor_lr=actor_lr, critic_lr=critic_lr)  # traced, so that one program does for all
        return script.update(rates, Line(), state, jax.random.key(1))[0].agent

    here, other_critic, other_actor = after(0.01, 0.01), after(0.01, 0.5), after(0.5, 0.01)
    assert any(changed(here.critics, other_critic.critics)) and any(changed(here.actor, other_actor.actor))
    assert not any(changed(here.actor, other_critic.actor)) and not any(changed(here.critics, other_actor.critics))


def test_the_actor_of_td3_moves_once_in_two_steps_and_its_target_from_the_target():
    config, state = begun(td3, policy_delay=3, updates_per_chunk=3, target_rate=0.5)
    old = state._replace(target=jax.tree.map(lambda x: x + 1.0, state.target))
    new, _ = jax.jit(partial(td3.update, config, Line()))(old, jax.random.key(1))
    counts = [int(leaf) for leaf in jax.tree.leaves(new.optimizers) if leaf.dtype == jnp.int32]
    assert sorted(set(counts)) == [1, 3] and int(new.gradient_steps) == 3
    middle = jax.tree.map(lambda target, network: (target + network) / 2, old.target, new.agent)
    for ours, exact in zip(jax.tree.leaves(new.target), jax.tree.leaves(middle)):
        np.testing.assert_allclose(ours, exact, atol=1e-6)


def test_gcsl_losses_equal_numpy():
    config, state = begun(gcsl)
    batch = gcsl.sample(config, state.replay, jax.random.key(1))
    output = np.asarray(
        jax.vmap(state.agent.actor)(jnp.concatenate([batch.observation, batch.goal], axis=1)), np.float64
    )
    mean, log_std = output[:, :1], -5 + 3.5 * (np.tanh(output[:, 1:]) + 1)
    action = np.clip(np.asarray(batch.action, np.float64), -1 + 1e-6, 1 - 1e-6)
    x = np.arctanh(action)
    density = -0.5 * ((x - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - action**2)
    np.testing.assert_allclose(gcsl.actor_loss(state.agent, batch, config)[0], -density.mean(), rtol=1e-3)
    config = gcsl.Config(likelihood="mse")
    error = np.mean((np.tanh(mean) - np.asarray(batch.action)) ** 2)
    np.testing.assert_allclose(gcsl.actor_loss(state.agent, batch, config)[0], error, rtol=1e-5)


@pytest.mark.parametrize(
    ("script", "settings", "discount"),
    [
        (gcsl, {"future": "uniform"}, 1),
        (gcsl, {"future": "geometric"}, 0.6),
        *((script, {"her": "future"}, 1) for script in (sac, td3)),
        *((script, {"her": "geometric"}, 0.6) for script in (sac, td3)),
        *((script, {"her": "final"}, math.inf) for script in (sac, td3)),
        (c_learning, {"loss": "nce_c_learning"}, 0.6),
    ],
)
def test_futures_are_drawn_by_the_law_that_is_named(script, settings, discount, monkeypatch):
    """The laws themselves: tests/shared/test_replay.py."""
    config, state = begun(script, discount=0.6, **settings)
    asked = []
    law = buffer.sample_future
    monkeypatch.setattr(buffer, "sample_future", lambda *args: asked.append(args[3]) or law(*args))
    script.sample(*((config,) if script is gcsl else (config, Line())), state.replay, jax.random.key(1))
    assert asked == [discount]


@pytest.mark.parametrize("script", [sac, td3, c_learning])
def test_actor_losses_equal_numpy(script):
    config, state = begun(script, **({"random_goals": 0.25} if script is c_learning else {}))
    batch, key = script.sample(config, Line(), state.replay, jax.random.key(1)), jax.random.key(2)
    goal = np.asarray(batch.goal if script is not c_learning else batch.future)
    if script is c_learning:
        goal = np.concatenate([np.asarray(batch.random)[:8], goal[8:]])
    network = state.agent.actor.network if script is td3 else state.agent.actor
    output = np.asarray(jax.vmap(network)(jnp.concatenate([batch.observation, goal], axis=1)), np.float64)
    mean, log_std = output[:, :1], -5 + 3.5 * (np.tanh(output[:, 1:]) + 1)
    noise = np.asarray(jax.random.normal(key, mean.shape), np.float64)
    x = mean if script is td3 else mean + np.exp(log_std) * noise
    inputs = jnp.concatenate([batch.observation, jnp.array(np.tanh(x), jnp.float32), goal], axis=1)
    critics = [jax.tree.map(lambda leaf, j=j: leaf[j], state.agent.critics) for j in range(2)]
    q = np.stack([np.asarray(jax.vmap(critic)(inputs))[:, 0] for critic in critics])
    if script is td3:
        loss, expected = td3.actor_loss(state.agent.actor, state.agent, batch)[0], -q[0].mean()
    elif script is c_learning:
        loss = c_learning.actor_loss(state.agent.actor, state.agent, batch, key, config)[0]
        expected = -(1 / (1 + np.exp(-q.min(axis=0)))).mean()
    else:
        agent = state.agent._replace(log_alpha=jnp.log(0.7))
        density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(x) ** 2)
        loss, info = sac.actor_loss(agent.actor, agent, batch, key)
        expected = np.mean(0.7 * density[:, 0] - q.min(axis=0))
        np.testing.assert_allclose(info["train/entropy"], -density.mean(), rtol=1e-3)
        gradient = jax.grad(sac.alpha_loss)(jnp.log(0.5), jnp.array(3.0), 1.0)
        np.testing.assert_allclose(gradient, 0.5 * (3.0 - 1.0), rtol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=1e-5)
    assert np.abs(q[0] - q[1]).max() > 1e-3, "the two networks differ"


class Holes(Line):
    """The robot falls in many narrow places."""

    def step(self, state, action):
        after = super().step(state, action)
        return after._replace(terminated=jnp.floor(100 * after.observation[0]) % 10 == 3)


@pytest.mark.parametrize("script", [sac, td3])
def test_a_fall_is_a_termination_and_the_time_limit_is_not(script):
    config, _ = begun(script)
    begin = lambda key: script.collect(config, Holes(), script.init(config, Holes(), key))
    state = jax.jit(begin)(jax.random.key(0))
    rows = jax.tree.map(np.asarray, state.replay.data)
    fell = np.floor(100 * rows.next_observation[..., 0]) % 10 == 3
    np.testing.assert_array_equal(rows.terminated, fell)
    ended = rows.next_observation[:-1, :, 0] != rows.observation[1:, :, 0]  # an episode starts at 0
    assert fell.sum() > 5 and (ended & ~fell[:-1]).sum() > 5
    np.testing.assert_array_equal(rows.observation[1:][ended], 0)


def test_learning_rates_of_td3_fall_to_their_share_at_the_end():
    config, _ = begun(td3, final_lr_fraction=0.1, actor_lr=1e-2, critic_lr=1e-1)
    total = buffer.total_updates(config)
    for adam, steps, rate in zip(td3.make_optimizers(config), (total // 2, total), (1e-2, 1e-1)):
        state = adam.init(jnp.zeros(()))
        state = jax.tree.map(lambda x, n=steps: jnp.full_like(x, n) if x.dtype == jnp.int32 else x, state)
        update, _ = adam.update(jnp.ones(()), state)
        before, _ = adam.update(jnp.ones(()), adam.init(jnp.zeros(())))
        np.testing.assert_allclose(before, -rate, rtol=1e-4)
        # Adam after so many steps without a gradient
        first, second = 0.1 / (1 - 0.9 ** (steps + 1)), 0.001 / (1 - 0.999 ** (steps + 1))
        np.testing.assert_allclose(update, -0.1 * rate * first / np.sqrt(second), rtol=1e-3)


# ---- commands ------------------------------------------------------------------------------------------------------


TINY = [
    *("--num_envs=8", "--episode_length=20", "--unroll_length=20", "--min_replay_size=40", "--max_replay_size=60"),
    *("--batch_size=16", "--updates_per_chunk=2", "--width=16", "--num_eval_envs=4", "--eval_every=320"),
    *("--checkpoint_every=640", "--total_env_steps=1280"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(script, tmp_path, capsys, monkeypatch):
    """Of two seeds; its agent can be loaded."""
    whole = tmp_path / "whole"
    script.main([script.__name__, *TINY, "--num_seeds=2", f"--run_dir={whole}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(whole)
    assert len(metrics(whole)) == 2 * 6
    monkeypatch.setattr(pictures, "draw_goal_reaching", lambda *_: None)  # once is enough
    check_repeats_its_end(script, whole)
    drawn = {"curve.png", "rollout.gif", "trajectories.png"} | ({"value_map.png"} if script is not gcsl else set())
    assert drawn <= {path.name for path in whole.iterdir()}
    _, env, agent = script.load(whole, seed=1)
    state = env.reset(jax.random.key(0))
    assert np.isfinite(script.policy(agent, state.observation, state.goal).mode()).all()


def test_the_published_hyperparameters_of_sac_are_one_flag():
    config = run.configure(sac.Config, sac.RECIPES, None, ["sac.py", "--env=ant", "--published", "--her_share=0.7"])
    assert (config.discount, config.actor_lr, config.critic_lr, config.alpha_lr) == (0.9, 1e-4, 1e-4, 3e-4)
    assert (config.her, config.her_share, config.norm, config.activation, config.residual) == (
        *("final", 0.7, "none", "relu", False),
    )
    assert (config.goals, config.width, config.batch_size) == ("fixed", 256, 256)
    point = run.configure(sac.Config, sac.RECIPES, None, ["sac.py", "--published"])
    assert (point.width, point.final_lr_fraction, point.num_envs) == (256, 1, 256)
    assert run.configure(sac.Config, sac.RECIPES, None, ["sac.py", "--env=ant"]).discount == 0.99


def test_defaults_are_those_of_crl():
    ours = {field.name: field.default for field in crl.dataclasses.fields(crl.Config)}
    for script in SCRIPTS:
        for field in crl.dataclasses.fields(script.Config):
            if field.name in set(ours) - {"loss", "random_goals"}:
                assert field.default == ours[field.name], (script, field.name)
        for env in ("humanoid_u_maze", "ant_hardest_maze", "ant"):
            budgets = {
                run.configure(x.Config, x.RECIPES, None, ["", f"--env={env}"]).total_env_steps for x in (script, crl)
            }
            assert len(budgets) == 1
