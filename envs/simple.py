"""A point mass in every maze: JaxGCRL's simple mazes, on brax's spring physics.

A sphere of radius 0.25 m on two slides, in mazes of the ant's size. Observation (4): x, y and their velocities, in
metres and seconds. Action (2): forces along x and y, 5 N on 1 kg. Goal (2): x, y. A step is 0.05 s.
"""

from xml.etree import ElementTree

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from envs import mazes, spring
from envs.base import GoalEnv, GoalState

CELL_SIZE = 4.0
TIMESTEP, SUBSTEPS = 0.005, 10


class SimpleMaze(spring.SpringRobot, GoalEnv):
    """The point mass in the maze `layout`.

    JaxGCRL ends an episode where the height leaves 0.2 to 1 m. On slides the height is 0.25 m always, so nothing
    terminates here. Physics step and walls are those of the ant mazes. Ours: success within 0.5 m, as for the ant; a
    start at rest at the exact centre of its cell; no friction but at the walls, for this physics gives slides none.

    Args:
      layout: a maze (`mazes.load`).
      merged_walls: few large boxes instead of one a cell, as published. The walls are the same, and cheaper to step.
    """

    name = "simple"
    observation_size = 4
    action_size = 2
    goal_indices = (0, 1)
    success_radius = 0.5

    def __init__(self, layout: str, merged_walls: bool = True):
        self.maze = mazes.load(mazes.jaxgcrl(layout), CELL_SIZE)
        root = ElementTree.fromstring(MODEL)
        self.maze.add_walls(root.find("worldbody"), merged_walls)
        super().__init__(ElementTree.tostring(root, encoding="unicode"), TIMESTEP, SUBSTEPS)

    def reset(self, key: Key[Array, ""]) -> GoalState:
        return self.place(*self.maze.sample(*jax.random.split(key)))

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        return self.state_at(position, jnp.zeros(2), goal)

    def state_at(self, q: Float[Array, "2"], qd: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        """The state with this position and velocity."""
        return self._state(spring.pipeline.init(self.system, q, qd), goal)

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return self.maze.sample_goal(key)

    def step(self, state: GoalState, action: Float[Array, "2"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, action), state.goal))

    def _state(self, physics, goal):
        observation = jnp.concatenate([physics.q, physics.qd])
        return GoalState(physics, observation, goal, jnp.zeros(()), jnp.zeros((), bool))


# constants of the springs as in brax's ant.xml; spring_mass_scale 1 makes the mass 1 kg
MODEL = """
<mujoco model="simple">
  <option gravity="0 0 0"/>
  <custom>
    <numeric name="constraint_stiffness" data="4000"/>
    <numeric name="constraint_limit_stiffness" data="1000"/>
    <numeric name="constraint_ang_damping" data="10"/>
    <numeric name="constraint_vel_damping" data="20"/>
    <numeric name="spring_mass_scale" data="1"/>
    <numeric name="spring_inertia_scale" data="1"/>
  </custom>
  <worldbody>
    <geom name="floor" type="plane" size="100 100 1" contype="0" conaffinity="0"/>
    <body name="point" pos="0 0 0.25">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom name="point" type="sphere" size="0.25" contype="0" conaffinity="1"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="5" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="y" gear="5" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>"""
