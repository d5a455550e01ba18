"""The JaxGCRL ant, in the open and in every maze, on brax's spring physics.

The model is brax's own ant.xml, edited by program. Observation (29): torso x y z, quaternion (w first), 8 joint angles,
linear and angular velocity, 8 joint velocities. Action (8): torques, times 150 N m. Goal (2): torso x, y in metres. A
step is 0.05 s. The episode terminates where the torso is below 0.2 m or above 1.0 m.

The published model carries the goal as a massive marker body that touches nothing; ours keeps it in `GoalState.goal`,
which leaves every observation as it was (tests/envs/test_ant.py has the published code's numbers).
"""

import math
from types import MappingProxyType
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from envs import mazes, spring
from envs.base import GoalEnv, GoalState
from envs.mazes import Maze

CELL_SIZE = 4.0
GOAL_RADIUS = 10.0
"""In the open, goals lie on a circle of this radius around the origin."""
TIMESTEP, SUBSTEPS = 0.005, 10
RESET_NOISE = 0.1
HEIGHTS = (0.2, 1.0)


class Ant(spring.SpringRobot, GoalEnv):
    """The ant in the open (`layout` None) or in a maze.

    Args:
      layout: a maze (`mazes.load`), or None.
      merged_walls: few large boxes instead of one a cell, as published. The walls are the same, and cheaper to step.
    """

    name = "ant"
    observation_size = 29
    action_size = 8
    goal_indices = (0, 1)
    success_radius = 0.5
    other_radii = MappingProxyType({"easy": 2.0})

    def __init__(self, layout: str | None = None, merged_walls: bool = True):
        self.maze = mazes.load(layout, CELL_SIZE) if layout else None
        super().__init__(model(self.maze, merged_walls), TIMESTEP, SUBSTEPS)

    def reset(self, key: Key[Array, ""]) -> GoalState:
        start_key, q_key, qd_key, goal_key = jax.random.split(key, 4)
        q = self.system.init_q
        noise, qd = reset_noise(q_key, qd_key)
        if not self.maze:
            return self.state_at(q + noise, qd, self.sample_goal(goal_key))
        start, goal = self.maze.sample(start_key, goal_key)
        if self.maze.distances:  # as published, stitching tasks start exactly at the centre
            noise = noise.at[:2].set(0)
        return self.state_at(q.at[:2].set(start) + noise, qd, goal)

    def state_at(self, q: Float[Array, "15"], qd: Float[Array, "14"], goal: Float[Array, "2"]) -> GoalState:
        """The state with these joint positions and velocities."""
        return self._state(spring.pipeline.init(self.system, q, qd), goal)

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        return self.state_at(self.system.init_q.at[:2].set(position), jnp.zeros(self.system.qd_size()), goal)

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        if self.maze:
            return self.maze.sample_goal(key)
        return on_circle(key, GOAL_RADIUS)

    def step(self, state: GoalState, action: Float[Array, "8"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, action), state.goal))

    def _state(self, physics, goal):
        return GoalState(physics, jnp.concatenate([physics.q, physics.qd]), goal, jnp.zeros(()), fallen(physics.q))


class AntRandomStart(Ant):
    """The ant in the open that starts on a circle of 10 m around its goal."""

    def reset(self, key: Key[Array, ""]) -> GoalState:
        reset_key, start_key = jax.random.split(key)
        state = super().reset(reset_key)
        start = state.physics.q.at[:2].add(state.goal + self.sample_goal(start_key))
        return self.state_at(start, state.physics.qd, state.goal)


def reset_noise(q_key: Key[Array, ""], qd_key: Key[Array, ""]) -> tuple[Float[Array, "15"], Float[Array, "14"]]:
    """What is added to an ant's pose and to its velocities at a reset."""
    noise = jax.random.uniform(q_key, (15,), minval=-RESET_NOISE, maxval=RESET_NOISE)
    return noise, RESET_NOISE * jax.random.normal(qd_key, (14,))


def on_circle(key: Key[Array, ""], radius: float) -> Float[Array, "2"]:
    """A point uniform on a circle around the origin."""
    angle = jax.random.uniform(key, maxval=2 * math.pi)
    return radius * jnp.array([jnp.cos(angle), jnp.sin(angle)])


def fallen(q: Float[Array, " positions"]) -> Bool[Array, ""]:
    """Whether an ant with these joint positions ends the episode."""
    return (q[2] < HEIGHTS[0]) | (q[2] > HEIGHTS[1])


def model(maze: Maze | None, merged_walls: bool) -> str:
    """brax's ant.xml, with walls that the torso, hips and feet collide with."""
    root = ElementTree.fromstring(spring.asset("ant.xml"))
    world = root.find("worldbody")
    if maze:
        for geom in world.iter("geom"):
            if geom.get("name").startswith(("torso", "aux")) or geom.get("name").endswith("foot_geom"):
                geom.set("conaffinity", "1")
        maze.add_walls(world, merged_walls)
    return ElementTree.tostring(root, encoding="unicode")
