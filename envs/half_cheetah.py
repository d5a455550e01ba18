"""The JaxGCRL half-cheetah: run to a line 5 m ahead; on MuJoCo's physics (mujoco.mjx).

The model is brax's own half_cheetah.xml. Observation (18): torso x, z and pitch, the joint angles of back thigh, shin
and foot and of front thigh, shin and foot, then the 9 velocities; metres, radians, seconds. x counts from the start and
z from the torso's first height, 0.7 m. Action (6): torques at the six joints in that order, times 120, 90, 60, 120, 60
and 30 N m. Goal (1): torso x, always 5. A step is 0.05 s. Nothing terminates.
"""

from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, Key

from envs import spring
from envs.base import GoalEnv, GoalState
from envs.mjx_physics import MjxRobot, Physics

GOAL, HEIGHT = 5.0, 0.7
SUBSTEPS, LS_ITERATIONS = 5, 8
RESET_NOISE = 0.1
MASS = 14.0


class HalfCheetah(MjxRobot, GoalEnv):
    """The half-cheetah.

    Timestep, solver and the noise of a start (positions uniform within 0.1, velocities 0.1 times normal) are those of
    brax's half-cheetah on this physics, but that a line search of the solver ends after 8 tries instead of 50.
    """

    name = "half_cheetah"
    observation_size = 18
    action_size = 6
    goal_indices = (0,)
    success_radius = 0.5

    def __init__(self):
        super().__init__(model(), SUBSTEPS)

    def reset(self, key: Key[Array, ""]) -> GoalState:
        q_key, qd_key, goal_key = jax.random.split(key, 3)
        qpos = jax.random.uniform(q_key, (9,), minval=-RESET_NOISE, maxval=RESET_NOISE)
        return self.state_at(qpos, RESET_NOISE * jax.random.normal(qd_key, (9,)), self.sample_goal(goal_key))

    def state_at(self, qpos: Float[Array, "9"], qvel: Float[Array, "9"], goal: Float[Array, "1"]) -> GoalState:
        """The state with these joint positions and velocities."""
        physics = Physics(qpos, qvel, jnp.zeros(9))
        return GoalState(physics, jnp.concatenate([qpos, qvel]), goal, jnp.zeros(()), jnp.zeros((), bool))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "1"]:
        return jnp.array([GOAL])

    def step(self, state: GoalState, action: Float[Array, "6"]) -> GoalState:
        physics = self.advance(state.physics, action)
        after = state._replace(physics=physics, observation=jnp.concatenate([physics.qpos, physics.qvel]))
        return self.rewarded(after)

    def goal_position(self, states: GoalState):
        goal = np.asarray(states.goal)
        return np.concatenate([goal, np.zeros_like(goal), np.full_like(goal, HEIGHT)], axis=-1)


def model() -> mujoco.MjModel:
    """brax's half-cheetah, with its mass of 14 kg."""
    root = ElementTree.fromstring(spring.asset("half_cheetah.xml"))
    del root.find("compiler").attrib["settotalmass"]  # deprecated: MuJoCo says so in a file it writes
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    mujoco.mj_setTotalmass(model, MASS)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    model.opt.ls_iterations = LS_ITERATIONS
    return model
