"""The JaxGCRL reacher: bring the tip of a planar arm of two links of 10 cm to a point, on brax's spring physics.

The model is brax's own reacher.xml without its target body. Observation (10): cosines of the two joint angles, their
sines, tip x y z, tip linear velocity; metres, radians, seconds. Action (2): torques at shoulder and elbow, times 25.
Goal (3): tip x y z, with z the tip's own height, 0.01 m. A step is 0.02 s. Nothing terminates.
"""

import math
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from envs import spring
from envs.base import GoalEnv, GoalState

GOAL_RADIUS = 0.2
TIP = (0.11, 0.0, 0.0)
"""In the frame of the second link."""
HEIGHT = 0.01
TIMESTEP, SUBSTEPS, GEAR = 0.005, 4, 25.0
ANGLE_NOISE, VELOCITY_NOISE = 0.1, 0.005


class Reacher(spring.SpringRobot, GoalEnv):
    """The arm on a table.

    Timestep, torques and the noise of a start (joint angles within 0.1 rad of the stretched arm, velocities within
    0.005 rad/s) are those of brax's reacher on this physics. A goal's distance from the shoulder is uniform up to
    0.2 m, as its angle is all around: goals crowd at the shoulder, as in brax.

    The paper's code meant to set this timestep too, which, as for the humanoid, had no effect under its version of
    brax; its control step was then 0.04 s (4 of 0.01 s), as far as we can tell.

    Ours: the velocity is the tip's in the world. brax's own reacher does not turn the lever from the elbow to the tip
    with the arm, so that its velocity is right where the arm points along x only.
    """

    name = "reacher"
    observation_size = 10
    action_size = 2
    goal_indices = (4, 5, 6)
    success_radius = 0.05
    marker_radius = 0.015

    def __init__(self):
        super().__init__(_model(), TIMESTEP, SUBSTEPS)

    def reset(self, key: Key[Array, ""]) -> GoalState:
        q_key, qd_key, goal_key = jax.random.split(key, 3)
        q = jax.random.uniform(q_key, (2,), minval=-ANGLE_NOISE, maxval=ANGLE_NOISE)
        qd = jax.random.uniform(qd_key, (2,), minval=-VELOCITY_NOISE, maxval=VELOCITY_NOISE)
        return self.state_at(q, qd, self.sample_goal(goal_key))

    def state_at(self, q: Float[Array, "2"], qd: Float[Array, "2"], goal: Float[Array, "3"]) -> GoalState:
        """The state with these joint angles and velocities."""
        return self._state(spring.pipeline.init(self.system, q, qd), goal)

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "3"]:
        radius_key, angle_key = jax.random.split(key)
        radius = jax.random.uniform(radius_key, maxval=GOAL_RADIUS)
        angle = jax.random.uniform(angle_key, maxval=2 * math.pi)
        return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), jnp.array(HEIGHT)])

    def step(self, state: GoalState, action: Float[Array, "2"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, action), state.goal))

    def _state(self, physics, goal):
        rotated = spring.rotate(jnp.array(TIP), physics.x.rot[1])
        tip = physics.x.pos[1] + rotated
        velocity = physics.xd.vel[1] + jnp.cross(physics.xd.ang[1], rotated)
        observation = jnp.concatenate([jnp.cos(physics.q), jnp.sin(physics.q), tip, velocity])
        return GoalState(physics, observation, goal, jnp.zeros(()), jnp.zeros((), bool))


def _model() -> str:
    """brax's reacher.xml with only its arm, and the torques that brax gives it on the spring physics."""
    root = ElementTree.fromstring(spring.asset("reacher.xml"))
    world = root.find("worldbody")
    world.remove(world.find("body[@name='target']"))
    custom = root.find("custom")
    custom.remove(custom.find("numeric[@name='init_qpos']"))
    for number in custom:  # some have a value for each link, the target last
        number.set("data", " ".join(number.get("data").split()[:2]))
    for motor in root.iter("motor"):
        motor.set("gear", str(GEAR))
    return ElementTree.tostring(root, encoding="unicode")
