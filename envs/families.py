"""Task families of MuJoCo robots (meta-RL): what PEARL and CoCOA are trained on, on MuJoCo's physics (mujoco.mjx).

A task is a vector, `TaskState.task`; observations do not tell it. Robots are brax's MJCF, edited by program.
Observations and rewards are those of PEARL's environments; v is a displacement in a step over the step's seconds, a the
action:

    half_cheetah_dir  obs (20) qpos[1:], qvel, torso x y z    reward g v_x - 0.05 |a|^2,  task g: -1 or 1
    half_cheetah_vel  obs (20) the same                       reward -|v_x - g| - 0.05 |a|^2,  task g: U(0, 3) m/s
    ant_dir           obs (27) qpos[2:], qvel                 reward v . (cos g, sin g) - 0.5 |a|^2 + 1, task g: 0 or pi
    ant_goal          obs (29) qpos, qvel                     reward -|x - g_x| - |y - g_y| - 0.1 |a|^2,  task g: a disc
    humanoid_dir      obs (292) qpos[2:], qvel, cinert, cvel, qfrc_actuator
                                                              reward 1.25 v . (cos g, sin g) - 0.1 |0.4 a|^2 + 5
    walker_params     obs (17) z, pitch, joints, qvel in +-10 reward v_x + 1 - 0.001 |a|^2,  task: 65 exponents

where the humanoid's v is that of the centre of mass, and the ant's and cheetah's that of the torso. The ant ends an
episode where its torso is outside [0.2, 1] m, the humanoid outside [1, 2] m, the walker outside (0.8, 2) m or where it
leans 1 rad. External contact forces (84 numbers of the ant's and the humanoid's published observations, and a cost) are
left out: MuJoCo leaves them at 0 since version 2.
"""

import math
from types import MappingProxyType

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from envs import half_cheetah, spring
from envs.base import TaskFamily, TaskState
from envs.mjx_physics import MjxRobot, Physics, mjx
from envs.robot import in_space

DIRECTIONS = 2 * math.pi
LS_ITERATIONS = 8
"""Tries of the solver's line search."""


class RobotFamily(MjxRobot, TaskFamily):
    """A robot whose reward, or whose body, depends on the task."""

    long_chain = False
    start_position: Float[np.ndarray, " positions"]
    position_noise: float = 0.1
    velocity_noise: float = 0.1
    """A start's joint positions are uniform within the one, its velocities normal with the other as deviation."""

    def reset(self, key: Key[Array, ""]) -> TaskState:
        q_key, qd_key, task_key = jax.random.split(key, 3)
        noise = jax.random.uniform(
            q_key, self.start_position.shape, minval=-self.position_noise, maxval=self.position_noise
        )
        qvel = self.sample_velocity(qd_key)
        return self.state_at(jnp.asarray(self.start_position) + noise, qvel, self.sample_task(task_key))

    def sample_velocity(self, key: Key[Array, ""]) -> Float[Array, " velocities"]:
        return self.velocity_noise * jax.random.normal(key, (self.model.nv,))

    def state_at(
        self, qpos: Float[Array, " positions"], qvel: Float[Array, " velocities"], task: Float[Array, " task"]
    ) -> TaskState:
        """The state with these joint positions and velocities."""
        physics = Physics(qpos, qvel, jnp.zeros(self.model.nv))
        no_action = jnp.zeros(self.action_size)
        return TaskState(physics, self.observe(physics, no_action), task, jnp.zeros(()), jnp.zeros((), bool))

    def step(self, state: TaskState, action: Float[Array, " action"]) -> TaskState:
        action = jnp.clip(action, -1, 1)
        physics = self.advance(state.physics, action, self.body(state.task))
        return TaskState(
            physics=physics,
            observation=self.observe(physics, action),
            task=state.task,
            reward=self.reward(state.physics, physics, action, state.task),
            terminated=self.fallen(physics),
        )

    def body(self, task: Float[Array, " task"]) -> mjx.Model | None:
        """The model that the task steps; by default that of all."""
        return None

    def velocity(self, before: Physics, after: Physics, axes: int) -> Float[Array, " axes"]:
        """Of the torso, along the first axes of qpos, in m/s."""
        return (after.qpos[:axes] - before.qpos[:axes]) / self.control_step

    def observe(self, physics: Physics, action: Float[Array, " action"]) -> Float[Array, " observation"]:
        """What the robot senses, after this action."""
        raise NotImplementedError

    def reward(
        self, before: Physics, after: Physics, action: Float[Array, " action"], task: Float[Array, " task"]
    ) -> Float[Array, ""]:
        """Of a step between these states."""
        raise NotImplementedError

    def fallen(self, physics: Physics) -> Bool[Array, ""]:
        """Whether an episode ends here; by default never."""
        return jnp.zeros((), bool)


# ---- half-cheetah -------------------------------------------------------------------------------------------------


class HalfCheetahFamily(RobotFamily):
    """What both families of the half-cheetah share."""

    observation_size, action_size, task_size, oracle_size = 20, 6, 1, 1
    start_position = np.zeros(9, np.float32)

    def __init__(self):
        super().__init__(half_cheetah.model(), half_cheetah.SUBSTEPS)

    def observe(self, physics, action):
        x, z = physics.qpos[:2]
        torso = jnp.stack([x, jnp.zeros(()), z + half_cheetah.HEIGHT])
        return jnp.concatenate([physics.qpos[1:], physics.qvel, torso])


class HalfCheetahDir(HalfCheetahFamily):
    """Run forward or backward."""

    name = "half_cheetah_dir"
    num_train_tasks, num_test_tasks = 2, 2

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "1"]:
        return jax.random.rademacher(key, (1,), jnp.float32)

    def tasks(self, key, num_train, num_test):
        return both(jnp.array([[-1.0], [1.0]]), num_train, num_test)

    def reward(self, before, after, action, task):
        return task[0] * self.velocity(before, after, 1)[0] - 0.05 * jnp.sum(action**2)

    def goal_position(self, states: TaskState):
        return np.asarray(states.task) * [10.0, 0, 0]


class HalfCheetahVel(HalfCheetahFamily):
    """Run at a given speed."""

    name = "half_cheetah_vel"
    num_train_tasks, num_test_tasks = 100, 30

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "1"]:
        return jax.random.uniform(key, (1,), maxval=3.0)

    def reward(self, before, after, action, task):
        return -jnp.abs(self.velocity(before, after, 1)[0] - task[0]) - 0.05 * jnp.sum(action**2)

    def goal_position(self, states: TaskState):
        """A pacemaker."""
        seconds = self.control_step * np.arange(states.task.shape[-2])[:, None]
        return np.asarray(states.task) * seconds * [1.0, 0, 0]


# ---- ant ----------------------------------------------------------------------------------------------------------


class AntFamily(RobotFamily):
    """What both families of the ant share."""

    action_size = 8

    def __init__(self):
        model = mujoco.MjModel.from_xml_string(spring.asset("ant.xml"))
        model.opt.ls_iterations = LS_ITERATIONS
        super().__init__(model, 5)
        self.start_position = np.asarray(model.numeric("init_qpos").data, np.float32)


class AntDir(AntFamily):
    """Run in a direction.

    Args:
      forward_backward: the two tasks are the directions 0 and pi. Without, train and test tasks are drawn from all
        directions (PEARL's shipped configuration does so, for two tasks that it both trains and tests on).
    """

    name = "ant_dir"
    observation_size, task_size, oracle_size = 27, 1, 2
    num_train_tasks, num_test_tasks = 2, 2

    def __init__(self, forward_backward: bool = True):
        super().__init__()
        self.forward_backward = forward_backward

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "1"]:
        if self.forward_backward:
            return math.pi * jax.random.bernoulli(key, shape=(1,)).astype(jnp.float32)
        return jax.random.uniform(key, (1,), maxval=DIRECTIONS)

    def tasks(self, key, num_train, num_test):
        if self.forward_backward:
            return both(jnp.array([[0.0], [math.pi]]), num_train, num_test)
        return super().tasks(key, num_train, num_test)

    def oracle(self, task):
        return direction(task)

    def observe(self, physics, action):
        return jnp.concatenate([physics.qpos[2:], physics.qvel])

    def reward(self, before, after, action, task):
        ahead = self.velocity(before, after, 2) @ direction(task)
        return ahead - 0.5 * jnp.sum(action**2) + 1.0

    def fallen(self, physics):
        height = physics.qpos[2]
        return (height < 0.2) | (height > 1.0) | ~jnp.isfinite(physics.qpos).all()

    def goal_position(self, states: TaskState):
        return ahead_of(states, 10.0)


class AntGoal(AntFamily):
    """Go to a point in a disc of 3 m around the start."""

    name = "ant_goal"
    observation_size, task_size, oracle_size = 29, 2, 2
    num_train_tasks, num_test_tasks = 150, 30

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        angle_key, radius_key = jax.random.split(key)
        radius = 3 * jnp.sqrt(jax.random.uniform(radius_key))
        return radius * direction(jax.random.uniform(angle_key, (1,), maxval=DIRECTIONS))

    def observe(self, physics, action):
        return jnp.concatenate([physics.qpos, physics.qvel])

    def reward(self, before, after, action, task):
        return -jnp.sum(jnp.abs(after.qpos[:2] - task)) - 0.1 * jnp.sum(action**2)

    def goal_position(self, states: TaskState):
        return in_space(states.task)


# ---- humanoid -----------------------------------------------------------------------------------------------------


class HumanoidDir(RobotFamily):
    """Run in a direction."""

    name = "humanoid_dir"
    observation_size, action_size, task_size, oracle_size = 292, 17, 1, 2
    num_train_tasks, num_test_tasks = 100, 30
    position_noise = 0.01
    CONTROL = 0.4

    def __init__(self):
        model = mujoco.MjModel.from_xml_string(spring.asset("humanoid.xml"))
        model.opt.ls_iterations = LS_ITERATIONS
        super().__init__(model, 5)
        self.start_position = np.asarray(model.qpos0, np.float32)

    def sample_velocity(self, key: Key[Array, ""]) -> Float[Array, "23"]:
        return jax.random.uniform(key, (23,), minval=-self.position_noise, maxval=self.position_noise)

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "1"]:
        return jax.random.uniform(key, (1,), maxval=DIRECTIONS)

    def oracle(self, task):
        return direction(task)

    def advance(self, physics, control, model=None):
        return super().advance(physics, self.CONTROL * control, model)

    def observe(self, physics, action):
        data = self.kinematics(physics)
        torque = jnp.zeros(23).at[self._driven].set(self.CONTROL * action * self.model.actuator_gear[:, 0])
        parts = physics.qpos[2:], physics.qvel, data.cinert.ravel(), data.cvel.ravel(), torque
        return jnp.concatenate(parts)

    @property
    def _driven(self):
        """The velocities that the actuators act on."""
        return self.model.jnt_dofadr[self.model.actuator_trnid[:, 0]]

    def reward(self, before, after, action, task):
        start, end = (self.kinematics(physics).subtree_com[1, :2] for physics in (before, after))
        ahead = (end - start) / self.control_step @ direction(task)
        return 1.25 * ahead - 0.1 * jnp.sum((self.CONTROL * action) ** 2) + 5.0

    def fallen(self, physics):
        height = physics.qpos[2]
        return (height < 1.0) | (height > 2.0)

    def goal_position(self, states: TaskState):
        return ahead_of(states, 10.0)


# ---- walker -------------------------------------------------------------------------------------------------------


class WalkerParams(RobotFamily):
    """Walk with another body in each task.

    Every entry of four fields of the model is multiplied by base^u with u uniform in [-3, 3]: the base is 1.5 for the
    masses (8, the world's first) and principal inertias (8 x 3) of the bodies, 1.3 for the damping of the joints (9),
    and 1.5 for the friction of the geoms (8 x 3, the floor's first). The task is u, in this order. Quantities that
    MuJoCo's compiler derives from these fields stay those of the model, as published.
    """

    name = "walker_params"
    observation_size, action_size = 17, 6
    FIELDS = MappingProxyType({"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5})
    task_size = oracle_size = 65
    num_train_tasks, num_test_tasks = 40, 10
    position_noise = 0.005
    start_position = np.zeros(9, np.float32)
    HEIGHT = 1.25

    def __init__(self):
        model = mujoco.MjModel.from_xml_string(spring.asset("walker2d.xml"))
        model.opt.timestep, model.opt.ls_iterations = 0.004, LS_ITERATIONS
        super().__init__(model, 4)

    def sample_velocity(self, key: Key[Array, ""]) -> Float[Array, "9"]:
        return jax.random.uniform(key, (9,), minval=-self.position_noise, maxval=self.position_noise)

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "65"]:
        return jax.random.uniform(key, (65,), minval=-3.0, maxval=3.0)

    def fields(self, task: Float[Array, "65"]) -> dict[str, Float[Array, "..."]]:
        """The task's masses, inertias, dampings and frictions."""
        sizes = [getattr(self.model, name).size for name in self.FIELDS]
        parts = jnp.split(task, np.cumsum(sizes)[:-1])
        values = {}
        for (name, base), part in zip(self.FIELDS.items(), parts):
            field = getattr(self.model, name)
            values[name] = field * base ** part.reshape(field.shape)
        return values

    def body(self, task):
        return self.mjx_model.replace(**self.fields(task))

    def oracle(self, task):
        """Logarithms of the multipliers."""
        sizes = [getattr(self.model, name).size for name in self.FIELDS]
        return task * np.repeat(np.log(list(self.FIELDS.values())), sizes).astype(np.float32)

    def observe(self, physics, action):
        qpos = physics.qpos.at[1].add(self.HEIGHT)
        return jnp.concatenate([qpos[1:], jnp.clip(physics.qvel, -10, 10)])

    def reward(self, before, after, action, task):
        return self.velocity(before, after, 1)[0] + 1.0 - 0.001 * jnp.sum(action**2)

    def fallen(self, physics):
        height, pitch = physics.qpos[1] + self.HEIGHT, physics.qpos[2]
        return ~((height > 0.8) & (height < 2.0) & (jnp.abs(pitch) < 1.0))

    def goal_position(self, states: TaskState):
        return np.tile([10.0, 0, 0], (*np.shape(states.task)[:-1], 1))


# ---- helpers ------------------------------------------------------------------------------------------------------


def both(tasks: Float[Array, "2 task"], num_train: int, num_test: int):
    """The two tasks, for training and for testing."""
    if (num_train, num_test) != (2, 2):
        raise ValueError(f"{num_train} train and {num_test} test tasks; there are 2 tasks, for training and testing")
    return tasks, tasks


def direction(angle: Float[Array, "1"]) -> Float[Array, "2"]:
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


def ahead_of(states: TaskState, metres: float) -> Float[np.ndarray, "*batch 3"]:
    """A point in the task's direction, on the ground."""
    angle = np.asarray(states.task)
    return metres * np.concatenate([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
