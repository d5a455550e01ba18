"""The JaxGCRL humanoid, in the open and in every maze, on brax's spring physics.

The model is brax's own humanoid.xml, edited by program: every body collides with the floor and with walls. Action (17):
torques, 140 N m at the waist and legs and 40 N m at the arms. Goal (3): torso x, y, z in metres; z is always 1.25, so
to reach a goal is to stand there. The episode terminates where the torso is below 1 m or above 2 m.

Observation (268), with the 24 joint positions q and 23 velocities qd of the robot:

    0-25    q: torso x y z, quaternion (w first), 17 joint angles; then the commanded goal's x, y
    26-50   qd: linear and angular velocity, 17 joint velocities; then 0, 0
    51-170  for each of 12 links the inertia about the common centre of mass (3 x 3, by rows), and the mass
    171-242 for each link linear velocity times its share of the mass, angular velocity
    243-267 torque on each velocity of qd in the last step

The twelfth link is the published model's goal marker, a body of 1 kg at the goal, so that the state tells the commanded
goal: in entries 24 and 25 and in the inertias, also where an algorithm asks for another goal. `goal_in_state=False`
leaves out the marker and all that depends on it (246 numbers). Here the marker is no body, so that goals can be
switched, and its height is exactly 1.25.

The paper ran `humanoid` with a control step of 0.03 s (its setting of 0.015 s had no effect under its version of brax),
and the mazes with 0.015 s. JaxGCRL's is 0.015 s in both: `humanoid_jaxgcrl`.
"""

import math
from types import MappingProxyType
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from envs import mazes, spring
from envs.base import GoalEnv, GoalState
from envs.mazes import Maze

CELL_SIZE = 2.0
GOAL_RADII = (1.0, 5.0)
"""In the open, a goal's distance from the origin is uniform in this range."""
GOAL_HEIGHT, GOAL_MASS = 1.25, 1.0
SUBSTEPS = 10
HEIGHTS = (1.0, 2.0)
GEARS = np.array([350.0] * 11 + [100.0] * 6)
CONTROL_RANGE = 0.4


class Humanoid(spring.SpringRobot, GoalEnv):
    """The humanoid in the open (`layout` None) or in a maze.

    Args:
      layout: a maze (`mazes.load`), or None. `big_maze_eval` is JaxGCRL's, which differs from the ant's in a goal.
      control_step: seconds; by default 0.03 in the open and 0.015 in a maze, as in the paper.
      goal_in_state: whether the observation contains the commanded goal, as published.
      merged_walls: few large boxes instead of one a cell, as published. The walls are the same, and cheaper to step.
    """

    name = "humanoid"
    action_size = 17
    goal_indices = (0, 1, 2)
    success_radius = 0.5
    other_radii = MappingProxyType({"easy": 2.0})

    def __init__(
        self,
        layout: str | None = None,
        control_step: float | None = None,
        goal_in_state: bool = True,
        merged_walls: bool = True,
    ):
        self.maze = mazes.load(mazes.jaxgcrl(layout), CELL_SIZE) if layout else None
        if control_step is None:
            control_step = 0.015 if self.maze else 0.03
        if not 0 < control_step <= 0.1:
            raise ValueError(f"control_step is {control_step}; it is a number of seconds, above 0 and at most 0.1")
        super().__init__(_model(self.maze, merged_walls), control_step / SUBSTEPS, SUBSTEPS)
        self.system = self.system.tree_replace({"actuator.gear": jnp.asarray(GEARS)})
        self.goal_in_state = goal_in_state
        self.observation_size = 268 if goal_in_state else 246

    def reset(self, key: Key[Array, ""]) -> GoalState:
        start_key, goal_key = jax.random.split(key)
        if self.maze:
            return self.place(*self.maze.sample(start_key, goal_key))
        return self.place(jnp.zeros(2), self.sample_goal(goal_key)[:2])

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        q = self.system.init_q.at[:2].set(position)
        return self.state_at(q, jnp.zeros(self.system.qd_size()), jnp.append(goal, GOAL_HEIGHT))

    def state_at(self, q: Float[Array, "24"], qd: Float[Array, "23"], goal: Float[Array, "3"]) -> GoalState:
        """The state with these joint positions and velocities."""
        physics = spring.pipeline.init(self.system, q, qd)
        return self._state(physics, goal, jnp.zeros(self.action_size))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "3"]:
        if self.maze:
            return jnp.append(self.maze.sample_goal(key), GOAL_HEIGHT)
        radius_key, angle_key = jax.random.split(key)
        radius = jax.random.uniform(radius_key, minval=GOAL_RADII[0], maxval=GOAL_RADII[1])
        angle = jax.random.uniform(angle_key, maxval=2 * math.pi)
        return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), jnp.array(GOAL_HEIGHT)])

    def with_goal(self, state: GoalState, goal: Float[Array, "3"]) -> GoalState:
        force = state.observation[-25 if self.goal_in_state else -23 :]
        return state._replace(goal=goal, observation=self._observe(state.physics, goal, force[:23]))

    def step(self, state: GoalState, action: Float[Array, "17"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, CONTROL_RANGE * action), state.goal, action))

    def _state(self, physics, goal, action):
        height = physics.q[2]
        fallen = (height < HEIGHTS[0]) | (height > HEIGHTS[1])
        torque = jnp.asarray(GEARS, jnp.float32) * CONTROL_RANGE * action
        force = jnp.zeros(23).at[self.system.actuator.qd_id].set(torque)
        return GoalState(physics, self._observe(physics, goal, force), goal, jnp.zeros(()), fallen)

    def _observe(self, physics, goal, force):
        q, qd = physics.q, physics.qd
        link = self.system.link.inertia
        mass, position, angular = link.mass, physics.x.vmap().do(link.transform).pos, physics.xd.ang
        linear = physics.xd.vel + jnp.cross(angular, position - physics.x.pos)
        if self.goal_in_state:
            goal_xyz = jnp.append(goal[:2], GOAL_HEIGHT)
            q, qd, force = jnp.append(q, goal[:2]), jnp.pad(qd, (0, 2)), jnp.pad(force, (0, 2))
            mass, position = jnp.append(mass, GOAL_MASS), jnp.concatenate([position, goal_xyz[None]])
            linear, angular = (jnp.pad(x, ((0, 1), (0, 0))) for x in (linear, angular))
        total = mass.sum()
        away = position - mass @ position / total
        squared = jnp.sum(away**2, axis=1)[:, None, None] * jnp.eye(3)
        # in the spring physics as configured, each link's own inertia is 1 along every axis
        inertia = jnp.eye(3) + mass[:, None, None] * (squared - away[:, :, None] * away[:, None])
        inertias = jnp.concatenate([inertia.reshape(-1, 9), mass[:, None]], axis=1)
        velocities = jnp.concatenate([linear * mass[:, None] / total, angular], axis=1)
        return jnp.concatenate([q, qd, inertias.ravel(), velocities.ravel(), force])


def _model(maze: Maze | None, merged_walls: bool) -> str:
    """brax's humanoid.xml, in which every part of the body collides with the floor and with walls."""
    root = ElementTree.fromstring(spring.asset("humanoid.xml"))
    root.find("default/geom").set("contype", "1")
    if maze:
        maze.add_walls(root.find("worldbody"), merged_walls)
    return ElementTree.tostring(root, encoding="unicode")
