"""Meta-World's robot arm (Yu et al. 2019, package metaworld 3.0) as task families: 30 of its 50, those of the CoCOA
thesis. A task is where the object and its target are.

The package is not in JAX: its worlds live in other processes (envs/pool.py). An episode is a function of its task and
its actions, bit for bit, and so `reset` and `step` are pure functions here too, under jit, vmap and in loops: a state
holds the actions of its episode. Where a state is not the one that the worlds are in, they replay it.
"""

import importlib.metadata
import os
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs.base import TaskFamily, TaskState
from envs.crafter import save_gif, side_by_side
from envs.pool import Pool, PoolError

LONGEST_EPISODE = 500
FILM_EPISODES, FILM_EVERY = 3, 5


class Episode(NamedTuple):
    """From what the world can be made again."""

    actions: Float[Array, "*batch 500 4"]
    """Those taken come first."""
    steps: Int[Array, "*batch"]
    """How many that is."""
    success: Bool[Array, "*batch"]
    """Whether the task was solved in the last step."""


class MetaWorld(TaskFamily):
    """A Sawyer arm with a gripper over a table. Action: 3 displacements of the hand (1 is 1 cm), and the gripper.

    Observation (39): hand, gripper, up to two objects, now and a step before; the target's place is 0. Episodes end by
    a time limit only, of at most 500 steps. Rewards are Meta-World's.

    Args:
      task: the family's name, such as 'reach'.
      reward_version: 1, the thesis' rewards, of up to 2,200 a step; or 2, the newer ones, between 0 and 10.
      workers: how many processes step the worlds; by default one for each core.
    """

    action_size, observation_size = 4, 39
    num_train_tasks, num_test_tasks = 50, 10
    control_step = 0.0125
    longest_episode = LONGEST_EPISODE
    in_jax = False

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
        cores = os.cpu_count() or 1
        number = int(workers) or cores
        self.simulator = f"metaworld {version} in {number} processes on {cores} cores"
        self._arguments = task.replace("_", "-"), f"v{reward_version:g}"
        self._pool = Pool("Meta-World", "metaworld_worker.py", number, self._arguments)
        self._latest: tuple[np.ndarray, ...] = ()
        """Tasks, actions and steps of the states that the worlds are in."""

    @property
    def failure(self) -> str | None:
        return self._pool.failure

    def close(self) -> None:
        self._pool.close()
        self._latest = ()

    def reset(self, key: Key[Array, ""]) -> TaskState:
        return self._begin(self.sample_task(key))

    def with_task(self, state: TaskState, task: Float[Array, " task"]) -> TaskState:
        """The start of another episode, in another task: the object's place is a part of it."""
        return self._begin(task)

    def _begin(self, task: Float[Array, " task"]) -> TaskState:
        observation = self._call(self._host_begin, jnp.zeros(39), task)
        actions, zero = jnp.zeros((LONGEST_EPISODE, 4)), jnp.zeros((), jnp.int32)
        no = jnp.zeros((), bool)
        return TaskState(Episode(actions, zero, no), observation, task, jnp.zeros(()), no)

    def step(self, state: TaskState, action: Float[Array, "4"]) -> TaskState:
        actions, steps, _ = state.physics
        results = jnp.zeros(39), jnp.zeros(()), jnp.zeros((), bool)
        observation, reward, success = self._call(self._host_step, results, state.task, actions, steps, action)
        physics = Episode(actions.at[steps].set(action), steps + 1, success)
        return state._replace(physics=physics, observation=observation, reward=reward)

    def solved(self, state: TaskState) -> Bool[Array, "*batch"]:
        return state.physics.success

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

    def oracle(self, task: Float[Array, " task"]) -> Float[Array, " task"]:
        """The task; each entry is -1 and 1 at its bounds."""
        low, high = self._bounds
        return (2 * task - low - high) / np.where(high > low, high - low, 1)

    def render(self, states: TaskState, stem: str) -> str:
        """A GIF of the first episodes side by side, by MuJoCo's renderer on EGL; OSError where there is none."""
        tasks, physics = states.task[:FILM_EPISODES, -1], states.physics
        steps = int(physics.steps[0, -1])
        drawer = Pool("Meta-World", "metaworld_worker.py", 1, (*self._arguments, "drawn"), MUJOCO_GL="egl")
        try:
            drawer.start()
            taken = physics.actions[:FILM_EPISODES, -1, :steps]
            (images,) = drawer.ask("film", np.float64(tasks), np.asarray(taken), [FILM_EVERY] * len(tasks))
        except PoolError as error:
            raise OSError(f"Meta-World's films need EGL: {error}") from None
        finally:
            drawer.close()
        save_gif(side_by_side(images, np.zeros(images.shape[:2], bool)), f"{stem}.gif", fps=16, enlarge=1)
        return f"{stem}.gif"

    @cached_property
    def _bounds(self) -> Float[np.ndarray, "2 task"]:
        return self._ask("bounds", [None])[0][0].astype(np.float32)

    def _draw(self, key: Key[Array, ""], number: int) -> Float[Array, "number task"]:
        draw = lambda seed: self._ask("tasks", [seed], [number])[0][0].astype(np.float32)
        shape = jax.ShapeDtypeStruct((number, self.task_size), jnp.float32)
        seed = jax.random.randint(key, (), 0, 2**31 - 1)
        return jax.pure_callback(draw, shape, seed, vmap_method="sequential")

    def _call(self, function, like, *columns: Array):
        """A function of NumPy arrays with a leading axis of worlds, from inside a compiled program."""

        def flat(*columns):
            batch = np.shape(columns[0])[:-1]
            results = function(*(np.asarray(x).reshape(-1, *np.shape(x)[len(batch) :]) for x in columns))
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return jax.pure_callback(flat, shapes, *columns, vmap_method="broadcast_all")

    # What follows is called from inside compiled programs, where JAX itself must not be used.

    def _host_begin(self, tasks: np.ndarray) -> Float[np.ndarray, "worlds 39"]:
        return self._open(tasks, np.zeros((len(tasks), LONGEST_EPISODE, 4), np.float32), np.zeros(len(tasks), np.int32))

    def _host_step(self, tasks, actions, steps, action) -> tuple[np.ndarray, ...]:
        asked = tasks, actions, steps
        if not (self._pool.workers and self._latest and all(map(np.array_equal, self._latest, asked))):
            self._open(*asked)
        results = self._ask("step", action)
        actions = actions.copy()
        actions[np.arange(len(steps)), steps] = action
        self._latest = tasks, actions, steps + 1
        return results

    def _open(self, tasks, actions, steps) -> Float[np.ndarray, "worlds 39"]:
        taken = [row[:n] for row, n in zip(actions, steps)]
        (observation,) = self._ask("begin", np.float64(tasks), taken)
        self._latest = tasks, actions, steps
        return observation

    def _ask(self, request: str, *columns) -> tuple[np.ndarray, ...]:
        if request != "step":
            self._latest = ()
        self._pool.start()
        return self._pool.ask(request, *columns)
