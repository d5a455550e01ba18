"""The evaluation of goal-reaching policies against counts by hand."""

from types import MappingProxyType
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stubs import Line

from algorithms import crl
from envs import GoalState
from shared import evaluation


class RightOrLeft(NamedTuple):
    """A distribution whose mode goes right and whose samples go left."""

    right: jax.Array

    def mode(self):
        return self.right

    def sample(self, key):
        return -self.right


def right_or_left(observation, goal):
    chex.assert_equal_shape([observation, goal])
    return RightOrLeft(jnp.ones_like(observation))


class To(Line):
    """Always to the same goal."""

    def __init__(self, goal: float):
        self.goal = goal

    def sample_goal(self, key):
        return jnp.array([self.goal])


def test_each_layout_and_kind_of_action_is_scored_by_itself():
    scores = evaluation.evaluate(To(1.0), To(-1.0), right_or_left, 3, 10, jax.random.key(0))
    # 0.25 a step: within 0.2 of 1 after 4 steps, at 1.2 from the fifth on, which is 0.2 away and not below it
    reached = [("", 1), ("sampled/", 0), ("far/", 0), ("far/sampled/", 1)]
    for kind, success in reached:
        assert scores[f"eval/{kind}success_any"] == success, kind
        assert scores[f"eval/{kind}time_at_goal"] == success, kind
        assert scores[f"eval/{kind}episode_length"] == 10, kind
    away = [0.75, 0.5, 0.25, 0.0] + [0.2] * 6
    np.testing.assert_allclose(scores["eval/distance"], np.mean(away), rtol=1e-5)
    np.testing.assert_allclose(scores["eval/far/sampled/distance"], np.mean(away), rtol=1e-5)
    away = [1.25, 1.5, 1.75, 2.0] + [2.2] * 6
    np.testing.assert_allclose(scores["eval/far/distance"], np.mean(away), rtol=1e-5)
    assert set(evaluation.SCORES.curves) <= set(scores)


def test_without_far_goals_there_are_no_far_scores():
    scores = evaluation.evaluate(To(1.0), None, right_or_left, 3, 10, jax.random.key(0))
    assert scores["eval/success_any"] == 1 and not any("far" in name for name in scores)


def test_an_episode_is_that_of_a_loop():
    """Sampled actions and mean ones against a loop over single steps, with the draws of one key for all of a batch."""
    config = crl.Config(episode_length=5, width=8)
    env = Line()
    agent = crl.make_agent(config, env, jax.random.key(0))
    policy = lambda observation, goal: crl.policy(agent, observation, goal)
    start = jax.vmap(env.reset)(jax.random.split(jax.random.key(1), 4))
    sampled, key = jnp.array([False, True, True, False]), jax.random.key(2)
    states = evaluation.play(env, policy, start, sampled, 5, key, lambda state: state)
    for i in range(4):
        state = jax.tree.map(lambda x, i=i: x[i], start)
        for t, step_key in enumerate(jax.random.split(key, 5)):
            distribution = policy(state.observation, state.goal)
            noise = jax.random.normal(step_key, (4, 1))[i]
            action = jnp.tanh(distribution.mean + jnp.exp(distribution.log_std) * noise * sampled[i])
            state = env.step(state, action)
            np.testing.assert_allclose(states.observation[t, i], state.observation, rtol=1e-4, atol=1e-6)


def test_steps_count_until_a_fall():
    """Against a hand count: this robot stands at its goal for 3 steps, then falls, and would be there again later."""

    class Faller(Line):
        other_radii = MappingProxyType({"easy": 5.5, "hard": 1e-3})

        def step(self, state, action):
            t = state.physics + 1
            return GoalState(t, t, jnp.where((t <= 3) | (t > 6), t, t + 5), jnp.zeros(()), (t == 5)[0])

    scores = evaluation.evaluate(Faller(), None, right_or_left, 3, 10, jax.random.key(0))
    for kind in ("", "sampled/"):
        assert scores[f"eval/{kind}time_at_goal"] == 3
        assert scores[f"eval/{kind}time_at_goal_easy"] == 5
        assert scores[f"eval/{kind}time_at_goal_hard"] == 3
        assert scores[f"eval/{kind}success_any"] == 1
        assert scores[f"eval/{kind}episode_length"] == 5
        np.testing.assert_allclose(scores[f"eval/{kind}distance"], 2 * 5 / 5)


@pytest.mark.parametrize(
    ("name", "far"), [("point_u_maze", "point_u_maze_eval"), ("point_u4_maze", "point_u4_maze_eval")]
)
def test_far_goals_are_those_of_the_name(name, far):
    env, far_env = evaluation.make_envs(crl.Config(env=name))
    assert (env.name, far_env.name) == (name, far)
    _, chosen = evaluation.make_envs(crl.Config(env=name, eval_env=name))
    assert chosen.name == name
