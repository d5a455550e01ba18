"""Environments for tests: one that has sizes and nothing else, and one whose right answer is known."""

import jax
import jax.numpy as jnp

from envs import GoalEnv, GoalState


class Sizes(GoalEnv):
    def __init__(self, observation: int, action: int, goal: int):
        self.observation_size, self.action_size, self.goal_indices = observation, action, tuple(range(goal))

    reset = step = sample_goal = render = None


class Line(GoalEnv):
    """A robot on a line starts at 0; its goal is at -1 or 1 and a step moves it by at most 0.25."""

    name = "line"
    observation_size = action_size = 1
    goal_indices = (0,)
    success_radius = 0.2

    def _state(self, x, goal):
        reached = (jnp.abs(x - goal) < self.success_radius)[0]
        return GoalState(x, x, goal, reached.astype(jnp.float32), jnp.zeros((), bool))

    def reset(self, key):
        return self._state(jnp.zeros(1), self.sample_goal(key))

    def step(self, state, action):
        return self._state(jnp.clip(state.physics + 0.25 * action, -1.2, 1.2), state.goal)

    def sample_goal(self, key):
        return jax.random.choice(key, jnp.array([-1.0, 1.0]), (1,))

    def render(self, states, stem):
        raise NotImplementedError


class Fixed:
    """A distribution of which all is known."""

    def __init__(self, log_prob, action=None):
        self.log_probability, self.action = log_prob, action

    def sample_and_log_prob(self, key):
        return self.action, self.log_probability

    def sample(self, key):
        return self.action
