"""Meta-World's robot arm (Yu et al. 2019, package metaworld 3.0) as task families: 30 of its 50, those of the CoCOA
thesis. A task is where the object and its target are. Its worlds live in other processes (envs/host.py)."""

import importlib.metadata
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from envs.base import TaskState
from envs.crafter import save_gif, side_by_side
from envs.host import HostFamily
from envs.pool import Pool, PoolError

WORLDS = "metaworld_worker.py"
FILM_EPISODES, FILM_EVERY = 3, 5


class MetaWorld(HostFamily):
    """A Sawyer arm with a gripper over a table. Action: 3 displacements of the hand (1 is 1 cm), and the gripper.

    Observation (39): hand, gripper, up to two objects, now and a step before; the target's place is 0. Episodes end by
    a time limit only, of at most 500 steps. Rewards are Meta-World's. As each starts with a place of the object, which
    the task contains, `with_task` starts another episode.

    Args:
      task: the family's name, such as 'reach'.
      reward_version: 1, the thesis' rewards, of mostly up to 2,400 a step; or 2, the newer ones, between 0 and 10.
      workers: how many processes step the worlds; by default one for each core.
    """

    action_size, observation_size = 4, 39
    num_train_tasks, num_test_tasks = 50, 10
    control_step = 0.0125
    longest_episode = 500

    def __init__(self, task: str, reward_version: int | float = 1, workers: int | float = 0):
        if reward_version not in (1, 2):
            raise ValueError(f"option reward_version of metaworld_{task} is {reward_version:g}; it is 1 or 2")
        if workers < 0 or workers != int(workers):
            raise ValueError(f"option workers of metaworld_{task} is {workers:g}; it is a whole number, 0 or more")
        try:
            version = importlib.metadata.version("metaworld")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError("the package metaworld is not installed; pip install -e '.[metaworld]'") from None
        if not version.startswith("3.0."):
            raise ValueError(f"metaworld is {version}, whose physics may differ; pip install -e '.[metaworld]' has 3.0")
        self._arguments = task.replace("_", "-"), f"v{reward_version:g}"
        super().__init__("Meta-World", WORLDS, self._arguments, int(workers))

    @cached_property
    def _bounds(self) -> Float[np.ndarray, "2 task"]:
        return self.ask("bounds", [None])[0][0].astype(np.float32)

    @cached_property
    def task_size(self) -> int:
        return self._bounds.shape[1]

    @property
    def oracle_size(self) -> int:
        return self.task_size

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, " task"]:
        return self._draw(key, 1)[0]

    def tasks(self, key, num_train, num_test):
        """Those that one of Meta-World's worlds draws in so many resets, from a seed."""
        tasks = self._draw(key, num_train + num_test)
        return tasks[:num_train], tasks[num_train:]

    def _draw(self, key: Key[Array, ""], number: int) -> Float[Array, "number task"]:
        draw = lambda seed: self.ask("tasks", [int(seed)], [number])[0][0].astype(np.float32)
        shape = jax.ShapeDtypeStruct((number, self.task_size), jnp.float32)
        return jax.pure_callback(draw, shape, jax.random.randint(key, (), 0, 2**31 - 1), vmap_method="sequential")

    def oracle(self, task: Float[Array, " task"]) -> Float[Array, " task"]:
        """The task; each entry is -1 and 1 at its bounds."""
        low, high = self._bounds
        return (2 * task - low - high) / np.where(high > low, high - low, 1)

    def render(self, states: TaskState, stem: str) -> str:
        """A GIF of the first episodes side by side, by MuJoCo's renderer on EGL; OSError where there is none."""
        tasks, physics = states.task[:FILM_EPISODES, -1], states.physics
        taken = np.asarray(physics.actions[:FILM_EPISODES, -1, : int(physics.steps[0, -1])])
        drawer = Pool("Meta-World", WORLDS, 1, (*self._arguments, "drawn"), MUJOCO_GL="egl")
        try:
            drawer.start()
            (images,) = drawer.ask("film", np.float64(tasks), taken, [FILM_EVERY] * len(tasks))
        except PoolError as error:
            raise OSError(f"Meta-World's films need EGL: {error}") from None
        finally:
            drawer.close()
        save_gif(side_by_side(images, np.zeros(images.shape[:2], bool)), f"{stem}.gif", fps=16, enlarge=1)
        return f"{stem}.gif"
