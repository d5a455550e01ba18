"""Meta-World's worlds in a process of envs/pool_worker.py."""

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

DRAWS = 100
"""A draw of a task that Meta-World accepts takes a few; a given task that it does not accept is asked for for ever."""


class World:
    """What is changed of Meta-World's environments."""

    _asked = 0

    def reset_mocap_welds(self):
        """As in the package, which knows rows of 11 numbers; MuJoCo 3.17 has a twelfth, which stays."""
        welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
        self.model.eq_data[welds, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    def touching_object(self, object_geom_id):
        """Only for info['grasp_success'], which nobody looks at; the package's takes half of a step's time."""
        return False

    def _get_state_rand_vec(self):
        self._asked += 1
        if self._asked > DRAWS:
            raise ValueError(f"Meta-World has no task {self._last_rand_vec.tolist()}: object and goal are too close")
        return super()._get_state_rand_vec()

    def begin(self, task):
        """A reset in a task, or in one that the world draws itself; returns the observation."""
        self._freeze_rand_vec, self.seeded_rand_vec, self._set_task_called = task is not None, True, True
        if task is not None:
            low, high = self._random_reset_space.low, self._random_reset_space.high
            self._last_rand_vec = np.clip(task, low, high)
            if np.abs(self._last_rand_vec - task).max() > 1e-6:  # more than float32 rounds by
                raise ValueError(
                    f"Meta-World has no task {task.tolist()}: it lies in {low.tolist()} to {high.tolist()}"
                )
        self._asked = 0
        return self.reset()[0]


class Worlds:
    """The worlds of this process; all arguments and answers have one entry for each.

    Args:
      name: of the family, in Meta-World's spelling without the version.
      reward: which of its two rewards, 'v1' or 'v2'.
      drawn: worlds for films.
    """

    def __init__(self, name, reward, drawn=False):
        kind = type("World", (World, ALL_V3_ENVIRONMENTS[f"{name}-v3"]), {})
        film = {"render_mode": "rgb_array", "camera_name": "corner2", "width": 240, "height": 240} if drawn else {}
        self._make = lambda: kind(reward_function_version=reward, **film)
        self._worlds = []

    def _first(self, number):
        """So many worlds; each holds some 30 MB, so they are kept."""
        while len(self._worlds) < number:
            self._worlds.append(self._make())
        return self._worlds[:number]

    def bounds(self, _):
        """The least and the greatest task, entry by entry: (1, 2, task)."""
        box = self._first(1)[0]._random_reset_space
        return (np.stack([box.low, box.high])[None],)

    def tasks(self, seeds, numbers):
        """The tasks that the world of each seed draws in so many resets: (seeds, number, task)."""
        lists = []
        for seed, number in zip(seeds, numbers):
            (world,) = self._first(1)
            world.seed(int(seed))
            drawn = []
            for _ in range(number):
                world.begin(None)
                drawn.append(world._last_rand_vec.copy())
            lists.append(drawn)
        return (np.array(lists),)

    def begin(self, tasks, actions):
        """Begins an episode in each task and takes these actions (time, 4); the observations (worlds, 39) then."""
        observations = []
        for world, task, taken in zip(self._first(len(tasks)), tasks, actions):
            observation = world.begin(task)
            for action in taken:
                observation = world.step(action)[0]
            observations.append(observation)
        return (np.array(observations, np.float32),)

    def step(self, actions):
        """Observations, rewards, and whether the task is solved now, after a step."""
        steps = [world.step(action) for world, action in zip(self._worlds, actions)]
        observation, reward, _, _, info = zip(*steps)
        success = np.array([step["success"] > 0 for step in info])
        return np.array(observation, np.float32), np.array(reward, np.float32), success

    def film(self, tasks, actions, intervals):
        """Images (worlds, frames, height, width, 3) of episodes, one in each interval of steps."""
        films = []
        for world, task, taken, every in zip(self._first(len(tasks)), tasks, actions, intervals):
            world.begin(task)
            frames = []
            for i, action in enumerate(taken):
                if i % every == 0:
                    frames.append(world.render()[::-1])  # this camera hangs upside down
                world.step(action)
            films.append(frames)
        return (np.array(films),)
