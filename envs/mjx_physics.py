"""MuJoCo's physics in JAX: what robots stepped by mujoco.mjx share.

mujoco.mjx prints at its import that warp, an optional backend nobody here asked for, is missing.
"""

import contextlib
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float

from envs import viewer
from envs.base import State
from envs.robot import Robot

with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

__all__ = ["MjxRobot", "Physics", "body_velocity", "mjx"]


class Physics(NamedTuple):
    """All that a step needs of the steps before it; mjx.Data is a hundred times larger, and follows from this."""

    qpos: Float[Array, "*batch positions"]
    qvel: Float[Array, "*batch velocities"]
    warmstart: Float[Array, "*batch velocities"]
    """The accelerations of the last step, where the constraint solver starts."""


class MjxRobot(Robot):
    """A robot stepped by mujoco.mjx; `State.physics` is a `Physics`.

    Args:
      model: the model, with the integrator implicitfast; its timestep is that of a physics step.
      substeps: physics steps in a control step.
    """

    simulator = "mujoco mjx"
    long_chain = True
    """Whether `forward_kinematics` is used: many times faster for an arm, up to two times slower for legged robots."""

    def __init__(self, model: mujoco.MjModel, substeps: int):
        self.model = model
        self.shapes = viewer.shapes_of(model)
        self.control_step, self._substeps = model.opt.timestep * substeps, substeps
        self.mjx_model = mjx.put_model(model, impl="jax")
        self._data = mjx.make_data(model, impl="jax")

    def advance(self, physics: Physics, control: Float[Array, " actuators"], model: mjx.Model | None = None) -> Physics:
        """The physics a control step later; `model` is `mjx_model` with other values."""
        model = self.mjx_model if model is None else model

        # mjx.Data is rebuilt in each substep, because a loop moves all it carries through memory
        def substep(physics, _):
            data = self._data.replace(
                qpos=physics.qpos, qvel=physics.qvel, qacc_warmstart=physics.warmstart, ctrl=control
            )
            data = _step(self.model, model, data) if self.long_chain else mjx.step(model, data)
            return Physics(data.qpos, data.qvel, data.qacc_warmstart), None

        return jax.lax.scan(substep, physics, None, length=self._substeps)[0]

    def kinematics(self, physics: Physics) -> mjx.Data:
        """Positions and velocities of all bodies; what a step leaves in its data is one physics step old."""
        data = self._data.replace(qpos=physics.qpos, qvel=physics.qvel)
        data = forward_kinematics(self.model, data) if self.long_chain else mjx.kinematics(self.mjx_model, data)
        return mjx.com_vel(self.mjx_model, mjx.com_pos(self.mjx_model, data))

    def poses(self, states: State):
        data = mujoco.MjData(self.model)
        qpos = np.asarray(states.physics.qpos)
        positions = np.empty((*qpos.shape[:-1], self.model.nbody - 1, 3))
        rotations = np.empty((*qpos.shape[:-1], self.model.nbody - 1, 4))
        for index in np.ndindex(qpos.shape[:-1]):
            data.qpos = qpos[index]
            mujoco.mj_kinematics(self.model, data)
            positions[index], rotations[index] = data.xpos[1:], data.xquat[1:]
        return positions, rotations


def body_velocity(model: mujoco.MjModel, data: mjx.Data, body: int) -> Float[Array, "3"]:
    """Linear velocity of the origin of a body's frame, in world axes (`data` from `MjxRobot.kinematics`).

    MuJoCo's `cvel` is about another point: angular velocity, then the velocity of the point of the body that is just
    now at the centre of mass of its whole kinematic tree.
    """
    angular, linear = data.cvel[body, :3], data.cvel[body, 3:]
    arm = data.xpos[body] - data.subtree_com[model.body_rootid[body]]
    return linear + jnp.cross(angular, arm)


def _step(model: mujoco.MjModel, mjx_model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """mjx.step for models without cameras, tendons and sensors, and integrators of one stage, but much faster."""
    integrate = {mujoco.mjtIntegrator.mjINT_EULER: mjx.euler, mujoco.mjtIntegrator.mjINT_IMPLICITFAST: mjx.implicit}
    data = forward_kinematics(model, data)
    for stage in (
        mjx.com_pos,
        mjx.crb,
        mjx.factor_m,
        mjx.collision,
        mjx.make_constraint,
        mjx.transmission,
        mjx.fwd_velocity,
        mjx.fwd_actuation,
        mjx.fwd_acceleration,
        mjx.solve,
        integrate[mujoco.mjtIntegrator(model.opt.integrator)],
    ):
        data = stage(mjx_model, data)
    return data


def forward_kinematics(model: mujoco.MjModel, data: mjx.Data) -> mjx.Data:
    """mjx.kinematics, for free, hinge and slide joints.

    mjx's own leaves XLA free to fuse the whole chain of bodies into one loop, in which each body computes its parent
    several times over: on a CPU a step of an arm of seven joints then takes tens of times as long. Here a barrier
    after each body stops that.
    """
    positions, rotations, matrices = [jnp.zeros(3)], [jnp.array([1.0, 0, 0, 0])], [jnp.eye(3)]
    anchors, axes = [], []
    for body in range(1, model.nbody):
        parent, first = model.body_parentid[body], model.body_jntadr[body]
        position = positions[parent] + _rotate(matrices[parent], model.body_pos[body])
        rotation = _multiply(rotations[parent], model.body_quat[body])
        for joint in range(first, first + model.body_jntnum[body]):
            kind, address = model.jnt_type[joint], model.jnt_qposadr[joint]
            if kind == mujoco.mjtJoint.mjJNT_FREE:
                position, rotation = data.qpos[address : address + 3], data.qpos[address + 3 : address + 7]
                rotation /= jnp.linalg.norm(rotation)
                anchor, axis = position, jnp.array([0.0, 0, 1])
            else:
                moved = data.qpos[address] - model.qpos0[address]
                matrix = _matrix(rotation)
                anchor = position + _rotate(matrix, model.jnt_pos[joint])
                axis = _rotate(matrix, model.jnt_axis[joint])
                if kind == mujoco.mjtJoint.mjJNT_SLIDE:
                    position += axis * moved
                else:
                    turn = jnp.append(jnp.cos(moved / 2), jnp.sin(moved / 2) * model.jnt_axis[joint])
                    rotation = _multiply(rotation, turn)
                    position = anchor - _rotate(_matrix(rotation), model.jnt_pos[joint])
            anchors, axes = [*anchors, anchor], [*axes, axis]
        matrix = _matrix(rotation)
        position, rotation, matrix = jax.lax.optimization_barrier((position, rotation, matrix))
        positions, rotations, matrices = [*positions, position], [*rotations, rotation], [*matrices, matrix]
    xpos, xquat, xmat = jnp.stack(positions), jnp.stack(rotations), jnp.stack(matrices)
    geom_body = model.geom_bodyid
    return data.replace(
        xpos=xpos,
        xquat=xquat,
        xmat=xmat,
        xanchor=jnp.stack(anchors),
        xaxis=jnp.stack(axes),
        xipos=xpos + _rotate(xmat, model.body_ipos),
        ximat=_matrix(_multiply(xquat, model.body_iquat)),
        geom_xpos=xpos[geom_body] + _rotate(xmat[geom_body], model.geom_pos),
        geom_xmat=_matrix(_multiply(xquat[geom_body], model.geom_quat)),
    )


def _product() -> np.ndarray:
    """The tensor of the product of quaternions, w first: (p q)_i = sum_jk tensor_ijk p_j q_k."""
    tensor, unit = np.empty((4, 4, 4), np.float32), np.eye(4)
    for j, k in np.ndindex(4, 4):
        product = np.empty(4)
        mujoco.mju_mulQuat(product, unit[j], unit[k])
        tensor[:, j, k] = product
    return tensor


PRODUCT = _product()
CONJUGATE = np.float32([1, -1, -1, -1])
ROTATION = np.einsum("ajm,mbk,k->abjk", PRODUCT, PRODUCT, CONJUGATE)[1:, 1:]
"""Likewise for the rotation matrix of a quaternion: matrix_ab = sum_jk tensor_abjk q_j q_k."""


# sums of products rather than jnp.einsum, because matrix products are not exact to float32 on a GPU
def _multiply(p, q):
    """The product of quaternions, w first, in the last axis."""
    return (PRODUCT * p[..., None, :, None] * q[..., None, None, :]).sum((-1, -2))


def _matrix(q):
    """Rotation matrices of unit quaternions."""
    return (ROTATION * q[..., None, None, :, None] * q[..., None, None, None, :]).sum((-1, -2))


def _rotate(matrix, vector):
    return (matrix * vector[..., None, :]).sum(-1)
