"""Environments whose worlds live in other processes, as pure functions all the same.

`reset` and `step` leave the compiled program (`jax.pure_callback`) for the processes of envs/pool.py. They work under
jit, under vmap and in loops.
"""

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs.base import Env, TaskFamily, TaskState
from envs.pool import Pool


class Episode(NamedTuple):
    """From what a world can be made again."""

    actions: Float[Array, "*batch longest action"]
    """Those taken come first."""
    steps: Int[Array, "*batch"]
    """How many that is."""
    success: Bool[Array, "*batch"]
    """Whether the task was solved in the last step."""


class Host(Env):
    """An environment by a file that defines the class `Worlds`, which envs/pool_worker.py runs.

    Args:
      title: what messages call the worlds.
      worlds: the file, in this folder if it has none.
      arguments: of `Worlds`, as strings.
      workers: how many processes; by default one for each core.
    """

    in_jax = False

    def __init__(self, title: str, worlds: str, arguments: Sequence[str] = (), workers: int = 0):
        cores = os.cpu_count() or 1
        self.pool = Pool(title, worlds, workers or cores, arguments)
        self.simulator = f"{title} in {workers or cores} processes on {cores} cores"
        self._lock = threading.Lock()

    @property
    def failure(self) -> str | None:
        return self.pool.failure

    def close(self) -> None:
        self.pool.close()

    def ask(self, request: str, *columns) -> tuple[np.ndarray, ...]:
        """What `Pool.ask` answers, from processes that are started if they are not there."""
        self.pool.start()
        return self.pool.ask(request, *columns)

    def _call(self, function, like, *columns: Array):
        """A function of NumPy arrays with a leading axis of worlds, from inside a compiled program, in which JAX itself
        must not be used. The first column has one axis behind those of the batch."""

        def flat(*columns):
            batch = np.shape(columns[0])[:-1]
            with self._lock:  # a program may have two calls under way
                results = function(*(np.asarray(x).reshape(-1, *np.shape(x)[len(batch) :]) for x in columns))
            return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        return jax.pure_callback(flat, shapes, *columns, vmap_method="broadcast_all")


class HostFamily(Host, TaskFamily):
    """A task family whose episode is a function of its task and its actions, bit for bit. So a state holds the actions
    of its episode, and where it is not the one that the worlds are in, they replay it. Its `Worlds` have

        begin(tasks, actions)   starts an episode in each task, float64, and takes these actions (time, action):
                                a tuple of the observations then
        step(actions)           observations, rewards, and whether each task is solved now

    Answers are NumPy arrays with an entry for each world, float32 or bool. Episodes end by a time limit only.
    """

    longest_episode: int
    _latest: tuple[np.ndarray, ...] = ()
    """Tasks, actions and steps of the states that the worlds are in."""

    def reset(self, key: Key[Array, ""]) -> TaskState:
        return self.begin(self.sample_task(key))

    def with_task(self, state: TaskState, task: Float[Array, " task"]) -> TaskState:
        """The start of another episode, in another task."""
        return self.begin(task)

    def begin(self, task: Float[Array, " task"]) -> TaskState:
        """The start of an episode."""
        observation = self._call(self._host_begin, jnp.zeros(self.observation_size), task)
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        episode = Episode(jnp.zeros((self.longest_episode, self.action_size)), zero, no)
        return TaskState(episode, observation, task, jnp.zeros(()), no)

    def step(self, state: TaskState, action: Float[Array, " action"]) -> TaskState:
        actions, steps, _ = state.physics
        like = jnp.zeros(self.observation_size), jnp.zeros(()), jnp.zeros((), bool)
        observation, reward, success = self._call(self._host_step, like, state.task, actions, steps, action)
        episode = Episode(actions.at[steps].set(action), steps + 1, success)
        return state._replace(physics=episode, observation=observation, reward=reward)

    def solved(self, state: TaskState) -> Bool[Array, "*batch"]:
        return state.physics.success

    def render(self, states: TaskState, stem: str) -> str:
        """A picture of the rewards of each episode over time."""
        from matplotlib.figure import Figure  # envs run without matplotlib

        figure = Figure(layout="constrained")
        axis = figure.subplots()
        axis.plot(np.asarray(states.reward).T)
        axis.set(xlabel="step", ylabel="reward")
        figure.savefig(f"{stem}.png")
        return f"{stem}.png"

    def ask(self, request: str, *columns) -> tuple[np.ndarray, ...]:
        """Only `step` leaves the worlds in a state that is known."""
        if request != "step":
            self._latest = ()
        return super().ask(request, *columns)

    # What follows is called from inside compiled programs, where JAX itself must not be used.

    def _host_begin(self, tasks: np.ndarray) -> Float[np.ndarray, "worlds observation"]:
        nothing = np.zeros((len(tasks), self.longest_episode, self.action_size), np.float32)
        return self._open(tasks, nothing, np.zeros(len(tasks), np.int32))

    def _host_step(self, tasks, actions, steps, action) -> tuple[np.ndarray, ...]:
        state = tasks, actions, steps
        if not (self.pool.workers and self._latest and all(map(np.array_equal, self._latest, state))):
            self._open(*state)
        results = self.ask("step", action)
        actions = actions.copy()
        actions[np.arange(len(steps)), steps] = action
        self._latest = tasks, actions, steps + 1
        return results

    def _open(self, tasks, actions, steps) -> Float[np.ndarray, "worlds observation"]:
        taken = [row[:n] for row, n in zip(actions, steps)]
        (observation,) = self.ask("begin", np.float64(tasks), taken)
        self._latest = tasks, actions, steps
        return observation
