"""Crafter's worlds in a process of envs/pool_worker.py."""

import crafter
import numpy as np


class World(crafter.Env):
    """Crafter, made a function of its seed, the episode's number and the actions.

    By itself it is not: the creatures of a chunk are a set, which Python iterates in the order of their addresses in
    memory, and one of them is drawn when there are too many. Here the draw is from a list in the order of positions.
    """

    def _balance_chunk(self, chunk, objs):
        super()._balance_chunk(chunk, sorted(objs, key=lambda creature: tuple(creature.pos)))


class Worlds:
    """The worlds of this process; all arguments and answers have one entry for each."""

    def begin(self, seeds, episodes, actions):
        """Makes the worlds, and plays these episodes up to now: their number from 1, and the actions taken so far.

        The answer is the observations, uint8 (worlds, 64, 64, 3).
        """
        # the time limit is the parent's affair
        self._worlds = [World(seed=int(seed), length=None) for seed in seeds]
        observations = []
        for world, episode, taken in zip(self._worlds, episodes, actions):
            world._episode = int(episode) - 1  # which reset counts up, and draws the world from
            observation = world.reset()
            for action in taken:
                observation = world.step(action)[0]
            observations.append(observation)
        return (np.stack(observations),)

    def step(self, actions, last):
        """Advances the worlds, and resets those that end: by death, or because this is the `last` step in any case.

        The answer is the observations of the step, those to act in next (which differ where a world was reset), the
        rewards, who died, and the achievements that the episode has unlocked, this step included.
        """
        return tuple(np.stack(column) for column in zip(*map(self._step, self._worlds, actions, last)))

    def _step(self, world, action, last):
        observation, reward, _, info = world.step(action)
        dead = info["discount"] == 0
        achieved = np.array([info["achievements"][name] > 0 for name in crafter.constants.achievements])
        return observation, world.reset() if dead or last else observation, np.float32(reward), dead, achieved
