from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from envs import Env, State, VectorEnv

LIMIT = 6


class Position(NamedTuple):
    x: jax.Array
    goal: jax.Array


class Walk(Env):
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
        return State(physics, observation, physics.goal, reward, physics.x > 3)

    def sample_goal(self, key):
        return jax.random.uniform(key, (1,), minval=3.0, maxval=4.0)

    def render(self, states, stem):
        raise NotImplementedError


def start(num_envs: int, goals: str):
    vector = VectorEnv(Walk(), num_envs, LIMIT, goals)
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
            state, _ = step(state, jnp.zeros((num_envs, 1)))
    return map(np.stack, zip(*seen))


def test_terminal_observation_is_kept_and_the_state_goes_on_from_the_reset():
    step, state = start(2, "fixed")
    first = np.asarray(state.env.observation)
    state, transition = step(at(state, [2.5, 1.0]), jnp.ones((2, 1)))
    np.testing.assert_array_equal(transition.observation, [[2.5, 25], [1, 10]])
    np.testing.assert_array_equal(transition.next_observation, [[3.5, 35], [2, 20]])
    np.testing.assert_array_equal(transition.reward, [3.5, 2])
    np.testing.assert_array_equal(transition.terminated, [True, False])
    np.testing.assert_array_equal(state.env.observation, [first[0], [2, 20]])
    np.testing.assert_array_equal(state.env.terminated, [False, False])
    np.testing.assert_array_equal(state.env.reward, [0, 2])
    np.testing.assert_array_equal(state.steps, [0, 1])


def test_time_limit_truncates_and_does_not_terminate():
    step, state = start(3, "resampled")
    flags = []
    for _ in range(2 * LIMIT):
        state, transition = step(state, jnp.zeros((3, 1)))
        flags.append(np.asarray(transition.truncated))
        assert not transition.terminated.any()
    expected = ([False] * (LIMIT - 1) + [True]) * 2
    np.testing.assert_array_equal(np.array(flags), np.array(expected)[:, None].repeat(3, axis=1))


def test_termination_at_the_time_limit_is_no_truncation():
    step, state = start(2, "resampled")
    for _ in range(LIMIT - 1):
        state, transition = step(state, jnp.zeros((2, 1)))
        assert not (transition.terminated | transition.truncated).any()
    state, transition = step(at(state, [2.5, 0.5]), jnp.ones((2, 1)))
    np.testing.assert_array_equal(transition.terminated, [True, False])
    np.testing.assert_array_equal(transition.truncated, [False, True])
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


@pytest.mark.parametrize("goals", ["fixed", "resampled"])
def test_vector_env_equals_a_loop_over_single_environments(goals):
    num_envs, length = 5, 200
    actions = np.random.default_rng(0).uniform(0, 1.2, (length, num_envs, 1)).astype(np.float32)
    step, state = start(num_envs, goals)
    first_x, first_goal = np.array(state.env.physics.x), np.array(state.env.goal)
    x, goal, clock = first_x.copy(), first_goal.copy(), [0] * num_envs
    ends = {"terminated": 0, "truncated": 0, "terminated at the limit": 0}
    for t in range(length):
        state, transition = step(state, actions[t])
        transition = jax.tree.map(np.asarray, transition)
        now = jax.tree.map(np.asarray, state.env)
        for i in range(num_envs):
            before, x[i] = x[i], x[i] + actions[t, i, 0]
            clock[i] += 1
            terminated = bool(x[i] > 3)
            truncated = not terminated and clock[i] == LIMIT
            ends["terminated"] += terminated
            ends["truncated"] += truncated
            ends["terminated at the limit"] += terminated and clock[i] == LIMIT
            np.testing.assert_array_equal(transition.observation[i], np.float32([before, 10 * before]))
            np.testing.assert_array_equal(transition.action[i], actions[t, i])
            np.testing.assert_array_equal(transition.next_observation[i], np.float32([x[i], 10 * x[i]]))
            assert transition.reward[i] == x[i]
            assert transition.terminated[i] == terminated
            assert transition.truncated[i] == truncated
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


@pytest.mark.parametrize("goals", ["fixed", "resampled"])
def test_state_can_be_donated(goals):
    vector = VectorEnv(Walk(), 4, LIMIT, goals)
    step = jax.jit(vector.step, donate_argnums=0)
    state = jax.jit(vector.reset)(jax.random.key(0))
    for _ in range(2 * LIMIT):
        state, _ = step(state, jnp.ones((4, 1)))
    assert np.isfinite(state.env.observation).all()


def test_unknown_goals_value_is_refused():
    with pytest.raises(ValueError, match=r"^goals is 'random'; it is 'fixed' or 'resampled'$"):
        VectorEnv(Walk(), 2, LIMIT, "random")


def test_wrong_shapes_are_caught_under_test():
    """Guards conftest.py: were its import hook off, no annotation would be checked anywhere."""
    step, state = start(2, "resampled")
    with pytest.raises(TypeCheckError, match="num_envs action"):
        step(state, jnp.zeros(2))
