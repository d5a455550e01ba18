import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import envs
from envs import GoalEnv, GoalState, VectorEnv

LIMIT = 6


class Position(NamedTuple):
    x: jax.Array
    goal: jax.Array


class Walk(GoalEnv):
    """Starts at x in [0, 1), moves by the action, ends beyond 3; observation (x, 10 x), reward x."""

    name = "walk"
    observation_size = 2
    action_size = 1
    goal_indices = (0,)
    success_radius = 0.5

    def reset(self, key):
        start_key, goal_key = jax.random.split(key)
        return self._state(Position(jax.random.uniform(start_key), self.sample_goal(goal_key)), jnp.zeros(()))

    def step(self, state, action):
        x = state.physics.x + action[0]
        return self._state(state.physics._replace(x=x), x)

    def _state(self, physics, reward):
        observation = jnp.stack([physics.x, 10 * physics.x])
        return GoalState(physics, observation, physics.goal, reward, physics.x > 3)

    def sample_goal(self, key):
        return jax.random.uniform(key, (1,), minval=3.0, maxval=4.0)

    def render(self, states, stem):
        raise NotImplementedError


def start(num_envs: int, goals: str, fresh_worlds: int | None = None):
    vector = VectorEnv(Walk(), num_envs, LIMIT, goals, fresh_worlds)
    return jax.jit(vector.step), vector.reset(jax.random.key(0))


def at(state, x):
    """The vector state with every environment at x."""
    x = jnp.asarray(x, jnp.float32)
    observation = jnp.stack([x, 10 * x], axis=1)
    return state._replace(env=state.env._replace(physics=state.env.physics._replace(x=x), observation=observation))


def starts_of_episodes(goals: str, num_envs: int, episodes: int):
    """Starts and goals of successive episodes: two arrays (episodes, num_envs)."""
    step, state = start(num_envs, goals)
    seen = []
    for _ in range(episodes):
        seen.append((state.env.physics.x, state.env.goal[:, 0]))
        for _ in range(LIMIT):
            state, *_ = step(state, jnp.zeros((num_envs, 1)))
    return map(np.stack, zip(*seen))


def test_terminal_observation_is_kept_and_the_state_goes_on_from_the_reset():
    step, state = start(2, "fixed")
    first, goal = np.asarray(state.env.observation), np.asarray(state.env.goal)
    before = at(state, [2.5, 1.0])
    np.testing.assert_array_equal(before.env.observation, [[2.5, 25], [1, 10]])
    state, after, truncated = step(before, jnp.ones((2, 1)))
    np.testing.assert_array_equal(after.observation, [[3.5, 35], [2, 20]])
    np.testing.assert_array_equal(after.physics.x, [3.5, 2])
    np.testing.assert_array_equal(after.goal, goal)
    np.testing.assert_array_equal(after.reward, [3.5, 2])
    np.testing.assert_array_equal(after.terminated, [True, False])
    assert not truncated.any()
    np.testing.assert_array_equal(state.env.observation, [first[0], [2, 20]])
    np.testing.assert_array_equal(state.env.terminated, [False, False])
    np.testing.assert_array_equal(state.env.reward, [0, 2])
    np.testing.assert_array_equal(state.steps, [0, 1])


def test_time_limit_truncates_and_does_not_terminate():
    step, state = start(3, "resampled")
    flags = []
    for _ in range(2 * LIMIT):
        state, after, truncated = step(state, jnp.zeros((3, 1)))
        flags.append(np.asarray(truncated))
        assert not after.terminated.any()
    expected = ([False] * (LIMIT - 1) + [True]) * 2
    np.testing.assert_array_equal(np.array(flags), np.array(expected)[:, None].repeat(3, axis=1))


def test_termination_at_the_time_limit_is_no_truncation():
    step, state = start(2, "resampled")
    for _ in range(LIMIT - 1):
        state, after, truncated = step(state, jnp.zeros((2, 1)))
        assert not (after.terminated | truncated).any()
    state, after, truncated = step(at(state, [2.5, 0.5]), jnp.ones((2, 1)))
    np.testing.assert_array_equal(after.terminated, [True, False])
    np.testing.assert_array_equal(truncated, [False, True])
    np.testing.assert_array_equal(state.steps, [0, 0])


def test_fixed_returns_each_copy_to_its_own_first_start_and_goal():
    xs, goals = starts_of_episodes("fixed", num_envs=16, episodes=5)
    for seen in (xs, goals):
        np.testing.assert_array_equal(seen, seen[:1].repeat(5, axis=0))
        assert len(np.unique(seen[0])) == 16


def test_resampled_draws_new_starts_and_goals_for_every_copy_and_episode():
    xs, goals = starts_of_episodes("resampled", num_envs=16, episodes=20)
    for seen in (xs, goals):
        assert len(np.unique(seen)) == 16 * 20
    assert 0 <= xs.min() < 0.1 and 0.9 < xs.max() < 1
    assert 3 <= goals.min() < 3.1 and 3.9 < goals.max() < 4


@pytest.mark.parametrize("goals, fresh_worlds", [("fixed", None), ("resampled", None), ("resampled", 2)])
def test_vector_env_equals_a_loop_over_single_environments(goals, fresh_worlds):
    num_envs, length = 5, 200
    actions = np.random.default_rng(0).uniform(0, 1.2, (length, num_envs, 1)).astype(np.float32)
    step, state = start(num_envs, goals, fresh_worlds)
    first_x, first_goal = np.array(state.env.physics.x), np.array(state.env.goal)
    x, goal, clock = first_x.copy(), first_goal.copy(), [0] * num_envs
    ends = {"terminated": 0, "truncated": 0, "terminated at the limit": 0}
    for t in range(length):
        before = np.asarray(state.env.observation)
        state, after, cut = step(state, actions[t])
        after, cut, now = jax.tree.map(np.asarray, (after, cut, state.env))
        for i in range(num_envs):
            np.testing.assert_array_equal(before[i], np.float32([x[i], 10 * x[i]]))
            x[i] += actions[t, i, 0]
            clock[i] += 1
            terminated = bool(x[i] > 3)
            truncated = not terminated and clock[i] == LIMIT
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            ends["terminated at the limit"] += terminated and clock[i] == LIMIT
            np.testing.assert_array_equal(after.observation[i], np.float32([x[i], 10 * x[i]]))
            np.testing.assert_array_equal(after.goal[i], goal[i])
            assert after.reward[i] == x[i]
            assert after.terminated[i] == terminated
            assert cut[i] == truncated
            if terminated or truncated:
                clock[i] = 0
                if goals == "fixed":
                    x[i], goal[i] = first_x[i], first_goal[i]
                else:  # a draw, of which the loop only knows that it is a new one
                    assert now.physics.x[i] not in (x[i], first_x[i])
                    assert now.goal[i] != goal[i]
                    x[i], goal[i] = now.physics.x[i], now.goal[i]
                    assert 0 <= x[i] < 1 and 3 <= goal[i] < 4
            np.testing.assert_array_equal(now.observation[i], np.float32([x[i], 10 * x[i]]))
            np.testing.assert_array_equal(now.goal[i], goal[i])
            assert state.steps[i] == clock[i]
    assert min(ends.values()) >= 5, ends


ENDED = ([], [0], [3], [4], [1, 2], [0, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4])
"""Which of five copies end in one step."""


def ending(ended: list[int]):
    """A first state of five copies, and actions that end these of them."""
    _, state = start(5, "resampled")
    return at(state, np.linspace(1, 2, 5)), jnp.where(jnp.isin(jnp.arange(5), jnp.array(ended, int)), 3.0, 0.5)[:, None]


def numbers(tree):
    """The leaves, of which keys as their raw numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def assert_equal(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fresh_worlds", [1, 2, 3, 5])
def test_every_ended_copy_gets_the_reset_of_its_own_key(fresh_worlds):
    """However few are made at a time, and nothing else changes."""
    step = jax.jit(VectorEnv(Walk(), 5, LIMIT, fresh_worlds=fresh_worlds).step)
    for ended in ENDED:
        before, action = ending(ended)
        state, after, _ = step(before, action)
        assert np.flatnonzero(after.terminated).tolist() == ended
        np.testing.assert_array_equal(after.observation[:, 0], before.env.physics.x + action[:, 0])
        np.testing.assert_array_equal(state.steps, [0 if i in ended else 1 for i in range(5)])
        for i in range(5):
            now = jax.tree.map(lambda x, i=i: x[i], state)
            if i in ended:
                reset_key, key = jax.random.split(before.key[i])
                assert_equal(now.env, Walk().reset(reset_key))
                assert_equal(now.key, key)
            else:
                assert_equal(now.env, Walk().step(jax.tree.map(lambda x, i=i: x[i], before.env), action[i]))
                assert fresh_worlds >= 5 or (numbers(now.key)[0] == numbers(before.key[i])[0]).all()


def test_few_fresh_worlds_at_a_time_under_vmap():
    """Two vector environments, as of two seeds, of which each ends others of its copies, or none."""
    step = jax.jit(VectorEnv(Walk(), 5, LIMIT, fresh_worlds=2).step)
    for pair in (([], [0, 1, 4]), ([2], [0, 1, 2, 3, 4]), ([], []), ([3], [1])):
        both = [ending(ended) for ended in pair]
        together = jax.vmap(step)(*jax.tree.map(lambda *x: jnp.stack(x), *both))
        for i, (state, action) in enumerate(both):
            assert_equal(jax.tree.map(lambda x, i=i: x[i], together), step(state, action))


@pytest.mark.parametrize("goals, fresh_worlds", [("fixed", None), ("resampled", None), ("resampled", 1)])
def test_state_can_be_donated(goals, fresh_worlds):
    vector = VectorEnv(Walk(), 4, LIMIT, goals, fresh_worlds)
    step = jax.jit(vector.step, donate_argnums=0)
    state, after = jax.jit(vector.reset)(jax.random.key(0)), None
    for _ in range(2 * LIMIT):
        before, (state, after, _) = after, step(state, jnp.ones((4, 1)))
        if before:  # it outlives the donated state that it came with
            chex.assert_tree_all_finite(before)
    chex.assert_tree_all_finite(state.env)


def test_unknown_goals_value_is_refused():
    with pytest.raises(ValueError, match=r"^goals is 'random'; it is 'fixed' or 'resampled'$"):
        VectorEnv(Walk(), 2, LIMIT, "random")


def test_wrong_shapes_are_caught_under_test():
    """Guards conftest.py: were its import hook off, no annotation would be checked anywhere."""
    step, state = start(2, "resampled")
    with pytest.raises(TypeCheckError, match="num_envs action"):
        step(state, jnp.zeros(2))


@pytest.mark.parametrize("name", ["ant", "half_cheetah"])
def test_physics_has_float32_whatever_the_networks_have(name):
    env = envs.make(name)
    state, action = jax.eval_shape(env.reset, jax.random.key(0)), jax.ShapeDtypeStruct((env.action_size,), jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        traced = str(jax.make_jaxpr(env.step)(state, action))
    products = re.findall(r" precision=(.*)", traced)
    assert products and set(products) == {"(Precision.HIGHEST, Precision.HIGHEST)"}


class Fragile(Walk):
    """Its simulator fails beyond 2."""

    def step(self, state, action):
        after = super().step(state, action)
        return after._replace(observation=jnp.where(after.observation[0] > 2, jnp.nan, after.observation))


@pytest.mark.parametrize("fresh_worlds", [None, 2])
def test_a_failed_step_ends_its_episode_where_it_was(fresh_worlds):
    vector = VectorEnv(Fragile(), 5, 100, fresh_worlds=fresh_worlds)
    step, state = jax.jit(vector.step), vector.reset(jax.random.key(0))
    broken = np.zeros(5, int)
    for _ in range(12):
        before = state
        state, after, truncated = step(state, jnp.linspace(0.1, 0.9, 5)[:, None])
        fails = np.asarray(before.env.observation[:, 0] + jnp.linspace(0.1, 0.9, 5) > 2)
        broken += fails
        assert not truncated.any()
        np.testing.assert_array_equal(state.broken, broken)
        np.testing.assert_array_equal(after.observation[fails], before.env.observation[fails])
        np.testing.assert_array_equal(after.terminated, fails)
        assert not after.reward[fails].any()
        np.testing.assert_array_equal(state.steps == 0, fails)
        assert np.isfinite(state.env.observation).all() and (state.env.observation[fails, 0] < 1).all()
    assert broken.sum() > 5 and (broken == 0).sum() <= 1
