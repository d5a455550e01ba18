"""The JaxGCRL ant, in the open and in every maze, on brax's spring physics.

The model is brax's own ant.xml, edited by program. Observation (29): torso x y z, quaternion (w first), 8 joint angles,
linear and angular velocity, 8 joint velocities. Action (8): torques, times 150 N m. Goal (2): torso x, y in metres. A
step is 0.05 s. The episode terminates where the torso is below 0.2 m or above 1.0 m.

The published model carries the goal as a massive marker body that touches nothing; ours keeps it in `State.goal`, which
leaves every observation as it was (tests/test_ant.py has the published code's numbers).
"""

import math
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from envs import mazes, spring, viewer
from envs.base import Env, State

CELL_SIZE = 4.0
GOAL_RADIUS = 10.0
"""In the open, goals lie on a circle of this radius around the origin."""
TIMESTEP, SUBSTEPS = 0.005, 10
RESET_NOISE = 0.1
HEIGHTS = (0.2, 1.0)


class Ant(Env):
    """The ant in the open (`layout` None) or in a maze.

    Args:
      layout: a name in `mazes.DRAWINGS`, or None.
      merged_walls: few large boxes instead of one a cell, as published. The walls are the same, and cheaper to step.
    """

    observation_size = 29
    action_size = 8
    goal_indices = (0, 1)
    success_radius = 0.5

    def __init__(self, layout: str | None, merged_walls: bool = True):
        self.name = f"ant_{layout}" if layout else "ant"
        self.maze = mazes.load(layout, CELL_SIZE) if layout else None
        walls = self.maze.wall_boxes(merged_walls) if layout else ()
        self.system = spring.load(_model(walls), TIMESTEP)

    def reset(self, key: Key[Array, ""]) -> State:
        start_key, q_key, qd_key, goal_key = jax.random.split(key, 4)
        q = self.system.init_q
        if self.maze:
            q = q.at[:2].set(jax.random.choice(start_key, jnp.asarray(self.maze.positions("R"))))
        q = q + jax.random.uniform(q_key, q.shape, minval=-RESET_NOISE, maxval=RESET_NOISE)
        qd = RESET_NOISE * jax.random.normal(qd_key, (self.system.qd_size(),))
        return self.state_at(q, qd, self.sample_goal(goal_key))

    def state_at(self, q: Float[Array, "15"], qd: Float[Array, "14"], goal: Float[Array, "2"]) -> State:
        """The state with these joint positions and velocities."""
        return self._state(spring.pipeline.init(self.system, q, qd), goal, jnp.zeros(()))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        if self.maze:
            return jax.random.choice(key, jnp.asarray(self.maze.positions("G")))
        angle = jax.random.uniform(key, maxval=2 * math.pi)
        return GOAL_RADIUS * jnp.array([jnp.cos(angle), jnp.sin(angle)])

    def step(self, state: State, action: Float[Array, "8"]) -> State:
        def substep(physics, _):
            return spring.pipeline.step(self.system, physics, action), None

        physics, _ = jax.lax.scan(substep, state.physics, None, length=SUBSTEPS)
        reached = jnp.linalg.norm(physics.q[:2] - state.goal) < self.success_radius
        return self._state(physics, state.goal, reached.astype(jnp.float32))

    def _state(self, physics, goal, reward):
        height = physics.q[2]
        fallen = (height < HEIGHTS[0]) | (height > HEIGHTS[1])
        return State(physics, jnp.concatenate([physics.q, physics.qd]), goal, reward, fallen)

    def render(self, states: State, stem: str) -> str:
        """An HTML page that shows the episodes in 3-D, in any browser, offline."""
        x = states.physics.x
        viewer.save(
            f"{stem}.html",
            viewer.shapes_of(self.system.mj_model),
            np.asarray(x.pos),
            np.asarray(x.rot),
            markers=np.pad(np.asarray(states.goal[:, 0]), ((0, 0), (0, 1)), constant_values=0.5),
            seconds_per_frame=TIMESTEP * SUBSTEPS,
            title=self.name,
        )
        return f"{stem}.html"


def _model(walls) -> str:
    """brax's ant.xml, with walls (`Maze.wall_boxes`) that the torso, hips and feet collide with."""
    root = ET.fromstring(spring.asset("ant.xml"))
    world = root.find("worldbody")
    if len(walls):
        for geom in world.iter("geom"):
            if geom.get("name").startswith(("torso", "aux")) or geom.get("name").endswith("foot_geom"):
                geom.set("conaffinity", "1")
    for x, y, half_x, half_y in walls:
        # walls are half a cell high
        box = {"pos": f"{x} {y} {CELL_SIZE / 4}", "size": f"{half_x} {half_y} {CELL_SIZE / 4}"}
        ET.SubElement(world, "geom", type="box", contype="1", conaffinity="1", **box)
    return ET.tostring(root, encoding="unicode")
