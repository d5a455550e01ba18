"""OGBench's mazes in a process of envs/pool_worker.py."""

import zlib

import gymnasium
import mujoco
import numpy as np
import ogbench  # noqa: F401 (registers its environments)

WHOLE = mujoco.mjtState.mjSTATE_FULLPHYSICS | mujoco.mjtState.mjSTATE_WARMSTART


class Worlds:
    """One world, which takes on each state in turn; arguments and answers have an entry for each.

    Args:
      name: the environment's, in gymnasium.
    """

    def __init__(self, name):
        self._world = gymnasium.make(name).unwrapped
        self._size = mujoco.mj_stateSize(self._world.model, WHOLE)

    def _state(self):
        """MuJoCo's, as 32-bit words."""
        state = np.empty(self._size)
        mujoco.mj_getState(self._world.model, self._world.data, state, WHOLE)
        return state.view(np.uint32)

    def size(self, _):
        return (np.array([2 * self._size]),)

    def begin(self, tasks, seeds):
        """The start of each task (0 to 4): state, observation, goal."""
        answers = []
        for task, seed in zip(tasks, seeds):
            np.random.seed(seed)  # OGBench draws the noise of places from it, and where a teleport leads
            self._world.action_space.seed(int(seed))
            observation, info = self._world.reset(seed=int(seed), options={"task_id": int(task) + 1})
            answers.append((self._state(), np.float32(observation), np.float32(info["goal"])))
        return tuple(map(np.array, zip(*answers)))

    def step(self, states, actions):
        """State and observation after a step from each state."""
        answers = []
        for state, action in zip(states, actions):
            np.random.seed(zlib.crc32(state))
            mujoco.mj_setState(self._world.model, self._world.data, state.view(np.float64), WHOLE)
            observation = self._world.step(action)[0]
            answers.append((self._state(), np.float32(observation)))
        return tuple(map(np.array, zip(*answers)))
