"""OGBench's ant in its mazes, stepped by the package ogbench in other processes (envs/host.py).

A state holds MuJoCo's own, in bits, so that a step is a function of state and action.
"""

import importlib.metadata
from collections.abc import Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from envs.base import GoalState
from envs.host import Host
from envs.mazes import draw
from envs.ogbench_point import PointMaze
from envs.point import film


class AntMaze(Host, PointMaze):
    """The ant, in the mazes and tasks of `PointMaze`. Published episodes have 1000 steps.

    Observation: positions (15; x and y first) and velocities (14). Action: 8 torques. A goal is a whole observation, of
    an ant that was put there in some posture; it is reached within 0.5 of its x and y.

    Args:
      layout: medium, large, giant or teleport.
      workers: how many processes step the worlds; by default one for each core.
    """

    observation_size, action_size = 29, 8
    goal_indices = tuple(range(29))
    success_radius = 0.5
    control_step = 0.1

    def __init__(self, layout: str, workers: int | float = 0):
        if workers < 0 or workers != int(workers):
            raise ValueError(f"option workers of antmaze_{layout} is {workers:g}; it is a whole number, 0 or more")
        try:
            importlib.metadata.version("ogbench")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                "the package ogbench is not installed; pip install -e '.[offline]', with Python 3.11 or 3.12"
            ) from None
        PointMaze.__init__(self, layout)
        self.name = f"antmaze_{layout}"
        Host.__init__(self, "OGBench", "ogbench_worker.py", (f"antmaze-{layout}-v0",), int(workers))

    @cached_property
    def _state_size(self) -> int:
        """32-bit words of MuJoCo's state."""
        return int(self.ask("size", [None])[0][0])

    def begin(self, task: Int[Array, ""], key: Key[Array, ""]) -> GoalState:
        asked = jnp.stack([jnp.asarray(task, jnp.int32), jax.random.randint(key, (), 0, 2**31 - 1)])
        like = jnp.zeros(self._state_size, jnp.uint32), jnp.zeros(29), jnp.zeros(29)
        physics, observation, goal = self._call(lambda asked: self.ask("begin", *asked.T), like, asked)
        return GoalState(physics, observation, goal, jnp.zeros(()), jnp.zeros((), bool))

    def step(self, state: GoalState, action: Float[Array, "8"]) -> GoalState:
        like = state.physics, state.observation
        step = lambda *columns: self.ask("step", *columns)
        physics, observation = self._call(step, like, state.physics, jnp.clip(action, -1, 1))
        return self.rewarded(state._replace(physics=physics, observation=observation))

    def distance(self, state: GoalState) -> Float[Array, "*batch"]:
        return jnp.linalg.norm(self.position(state.observation) - self.position(state.goal), axis=-1)

    def render(self, states: GoalState, stem: str, labels: Sequence[str] = ()) -> str:
        """A GIF of the ways of all episodes in one maze, every fourth step."""
        path, goal = np.asarray(states.observation)[:, ::4, :2], np.asarray(states.goal)[..., :2]
        return film(path, goal, stem, 0.5, lambda axes: draw(self.maze, axes), labels)
