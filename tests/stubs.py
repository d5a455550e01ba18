"""An environment that has sizes and nothing else, for tests of networks and losses."""

from envs.base import GoalEnv


class Sizes(GoalEnv):
    def __init__(self, observation: int, action: int, goal: int):
        self.observation_size, self.action_size, self.goal_indices = observation, action, tuple(range(goal))

    reset = step = sample_goal = render = None
