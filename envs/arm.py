"""The JaxGCRL tasks of a Franka Panda arm, on MuJoCo's physics (mujoco.mjx).

| task             | what is to be brought where                                        | observation | goal | action |
|------------------|--------------------------------------------------------------------|-------------|------|--------|
| reach            | the wrist to a point in the air; there is no cube and no gripper   | 13          | 3    | 4      |
| push_easy        | a 6 cm cube to a point on the table, anywhere in a square of 20 cm | 17          | 3    | 5      |
| push_hard        | the same in squares of 50 cm                                       | 17          | 3    | 5      |
| binpick_easy     | the cube from the left bin to a point in the right bin beside it   | 17          | 3    | 5      |
| binpick_hard     | the same with larger bins, further apart                           | 17          | 3    | 5      |
| grasp            | the gripper, open by 7.5 cm, around the cube                       | 23          | 7    | 5      |
| binpick_easy_EEF | as binpick_easy with a floating hand instead of the arm            | 10          | 3    | 4      |

Observation: cube x y z (not in reach); the 7 joint angles (not with the floating hand); x y z of the wrist, which is
the origin of the arm's last link, and its linear velocity; distance between the fingers (not in reach); in grasp also
x y z of the left and of the right fingertip. Metres, radians, seconds. The cube's orientation is not observed.

Action: target angles of joints 1, 2, 4 and 6 over the ranges `DRIVEN`, then the gripper, which closes above 0 and opens
otherwise. Joints 3, 5 and 7 are held. Targets are held for a step of 0.05 s; the servos of joints 3 to 7 are weak
and settle at about half their targets, as published. Nothing terminates.

The published models carry the goal as a marker body that touches nothing; ours keeps it in `GoalState.goal`. The base,
the angles and the inertias are those of MuJoCo Menagerie's Panda as the published code's loader leaves them: joints
without damping, joints 1, 3, 5 and 7 without limits, a hand without mass.

Ours, where we know no more than the row above:
- grasp starts as push_easy does. A fingertip is the middle of the end of a finger. The goal is the two fingertips, at
  the cube's height and 3.75 cm to either side of its centre, on the horizontal line across the arm (perpendicular to
  the line from the arm's base to the cube: with joints 3, 5 and 7 held, the gripper cannot turn otherwise), and the
  opening, 0.075 m. It follows the cube, so that a goal set from outside lasts until the next step.
- binpick_easy_EEF: the hand has the mass of the arm's last link, is weightless, points downwards, opens along x, and
  starts at `HAND_START`. Action: target displacements in x, y and z, times 0.2 m from where the hand is, inside
  `HAND_RANGES`; then the gripper. The servos are overdamped: 1000 N/m, 100 N s/m, 87 N at most.
"""

import math
from types import MappingProxyType
from typing import NamedTuple
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, Key

from envs import viewer
from envs.base import GoalEnv, GoalState
from envs.mjx_physics import MjxRobot, Physics, body_velocity


class Task(NamedTuple):
    """Where things are, in metres; what is drawn is drawn uniformly."""

    cube: tuple[float, float, float] | None
    """Centre x, y and half width of the square in which the cube starts."""
    goal: tuple[float, float, float] | None
    """Centre of the box of goals; None where the goal follows the cube."""
    goal_range: tuple[float, float, float] = (0, 0, 0)
    """Half widths of that box."""
    bins: tuple[float, float] | None = None
    """The two bins are centred at minus and plus this x, and their walls stand this far from the centres."""


TASKS = {
    "reach": Task(None, (0, 0.5, 0.3), (0.2, 0.2, 0.2)),
    "push_easy": Task((-0.1, 0.6, 0.1), (0.1, 0.6, 0.03), (0.1, 0.1, 0)),
    "push_hard": Task((-0.25, 0.65, 0.25), (0.25, 0.65, 0.03), (0.25, 0.25, 0)),
    "binpick_easy": Task((-0.15, 0.6, 0.09), (0.17, 0.6, 0.03), (0.09, 0.09, 0), bins=(0.17, 0.14)),
    "binpick_hard": Task((-0.3, 0.6, 0.15), (0.3, 0.6, 0.03), (0.15, 0.15, 0), bins=(0.3, 0.19)),
    "grasp": Task((-0.1, 0.6, 0.1), None),
}
TASKS["binpick_easy_EEF"] = TASKS["binpick_easy"]

TIMESTEP, SUBSTEPS = 0.002, 25
CONTACT_POINTS = 32
"""Only so many of the possible contact points of a model, the deepest, go to the constraint solver, which makes a step
faster where there are bins, which have 140. Points that do not touch have no effect anyway, and fewer than this touch
at once, also where the arm pushes at bins, cube and table at random (tests/envs/test_arm.py)."""
CUBE_HALF, CUBE_START_HEIGHT = 0.03, 0.07
BIN_Y, WALL_HALF_THICKNESS, WALL_HEIGHT = 0.6, 0.005, 0.066

DRIVEN = {1: (0.3491, 2.7925), 2: (0, 1.48353), 4: (-3.0718, -0.0698), 6: (2.3562, 3.7525)}
"""Joint: its target at actions -1 and 1."""
HELD = {3: 0.0, 5: 0.0, 7: 1.4487}
ARM_START = (1.571, 0.742, 0, -1.571, 0, 3.054, 1.449)
OPEN, CLOSED, FINGER_START = 255.0, 0.0, 0.04
HAND_START, HAND_STEP = (0, 0.6, 0.4), 0.2
HAND_RANGES = {"x": (-0.5, 0.5), "y": (0.3, 0.9), "z": (0.25, 0.6)}
"""At the lowest, the fingers end 1 cm above the table."""
GRASP_OPENING = 0.075

ARM, HAND, CUBE = (0.93, 0.93, 0.9), (0.25, 0.27, 0.3), (0.15, 0.45, 0.95)
START, GOAL = (0.62, 0.76, 0.92), (0.6, 0.85, 0.6)
"""Colours; the last two are those of zones and bins."""

EIGHTH = math.cos(math.pi / 8), math.sin(math.pi / 8)


class Link(NamedTuple):
    """A link, in the frame of the one before it; its hinge is along its z."""

    position: tuple[float, float, float]
    quaternion: tuple[float, ...]
    """w first, not of unit length."""
    mass: float
    centre: tuple[float, float, float]
    inertia: tuple[float, ...]
    """xx, yy, zz, xy, xz, yz about the centre of mass."""


LINKS = [
    Link((0, 0, 0.333), (1, 0, 0, 0), 4.970684, (0.003875, 0.002081, -0.04762),
         (0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169)),
    Link((0, 0, 0), (1, -1, 0, 0), 0.646926, (-0.003141, -0.02872, 0.003495),
         (0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704)),
    Link((0, -0.316, 0), (1, 1, 0, 0), 3.228604, (0.027518, 0.039252, -0.066502),
         (0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805)),
    Link((0.0825, 0, 0), (1, 1, 0, 0), 3.587895, (-0.05317, 0.104419, 0.027454),
         (0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641)),
    Link((-0.0825, 0.384, 0), (1, -1, 0, 0), 1.225946, (-0.011953, 0.041065, -0.038437),
         (0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229)),
    Link((0, 0, 0), (1, 1, 0, 0), 1.666555, (0.060149, -0.014117, -0.010517),
         (0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341)),
    Link((0.088, 0, 0), (1, 1, 0, 0), 0.735522, (0.010517, -0.004252, 0.061597),
         (0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741)),
]  # fmt: skip
LIMITS = {2: (-1.7628, 1.7628), 4: (-3.0718, -0.0698), 6: (-0.0175, 3.7525)}
FINGERS = {"left_finger": (EIGHTH[0], 0, 0, -EIGHTH[1]), "right_finger": (EIGHTH[1], 0, 0, EIGHTH[0])}
FINGER_POSITION, FINGER_LENGTH = (0, 0, 0.1654), 0.075
FINGER_SIZE, FINGER_CENTRE = (0.015, 0.005, 0.04), (0, 0.0055, 0.035)
HAND_SIZE, HAND_CENTRE = (0.04, 0.06), (0, 0, 0.142)
HAND_QUATERNION = (EIGHTH[0], EIGHTH[0], -EIGHTH[1], -EIGHTH[1])


class Servo(NamedTuple):
    """Its force is gain * target - stiffness * (position + velocity / 10), at most `force`."""

    gain: float
    stiffness: float
    targets: tuple[float, float]
    force: float


SERVOS = [
    Servo(4500, 4500, (-2.8973, 2.8973), 87),
    Servo(4500, 4500, (-1.7628, 1.7628), 87),
    Servo(2000, 3500, (-2.8973, 2.8973), 87),
    Servo(2000, 3500, (-3.0718, -0.0698), 87),
    Servo(1000, 2000, (-2.8973, 2.8973), 12),
    Servo(1000, 2000, (-0.0175, 3.7525), 12),
    Servo(1000, 2000, (-2.8973, 2.8973), 12),
]
FINGER_SERVO = Servo(0.15686, 500, (CLOSED, OPEN), 500)


class Arm(MjxRobot, GoalEnv):
    """The arm at one task.

    Args:
      task: `reach`, `push_easy`, ... (`TASKS`).
      all_contacts: whether all possible contact points go to the solver, as published, rather than the deepest
        `CONTACT_POINTS`: the same forces while no more than these touch, and slower where there are bins.
    """

    success_radius = 0.1
    other_radii = MappingProxyType({"easy": 0.3, "hard": 0.03})
    marker_radius = 0.03

    def __init__(self, task: str, all_contacts: bool = False):
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
        self.task, self.name = TASKS[task], f"arm_{task}"
        self._has_cube, self._is_hand, self._is_grasp = task != "reach", task.endswith("EEF"), task == "grasp"
        xml = _model(self.task, self._is_hand, all_contacts)
        super().__init__(mujoco.MjModel.from_xml_string(xml), SUBSTEPS)
        self.shapes = _shapes(self.model, self.task, self._is_hand)
        self._wrist = self.model.body("link7").id
        self._fingers = [self.model.body(finger).id for finger in FINGERS] if self._has_cube else []

        joints = HAND_START if self._is_hand else ARM_START
        self._joints = slice(7 * self._has_cube, 7 * self._has_cube + len(joints))
        cube, fingers = ((0, 0, 0, 1, 0, 0, 0), (FINGER_START, FINGER_START)) if self._has_cube else ((), ())
        self._start = np.array([*cube, *joints, *fingers], np.float32)

        self.observation_size = 7 * (not self._is_hand) + 6 + 4 * self._has_cube + 6 * self._is_grasp
        self.action_size = (3 if self._is_hand else len(DRIVEN)) + self._has_cube
        self.goal_indices = (0, 1, 2) if self._has_cube else (7, 8, 9)
        if self._is_grasp:
            self.goal_indices = (*range(17, 23), 16)

    @property
    def world(self) -> tuple:
        return *super().world, self.task.bins, self._is_hand

    def reset(self, key: Key[Array, ""]) -> GoalState:
        cube_key, goal_key = jax.random.split(key)
        qpos = jnp.asarray(self._start)
        if self._has_cube:
            qpos = qpos.at[:3].set(self._sample_cube(cube_key))
        goal = grasp_goal(qpos[:3]) if self._is_grasp else self.sample_goal(goal_key)
        return self.state_at(qpos, jnp.zeros(self.model.nv), goal)

    def state_at(
        self, qpos: Float[Array, " positions"], qvel: Float[Array, " velocities"], goal: Float[Array, " goal"]
    ) -> GoalState:
        """The state with these joint positions and velocities: of the cube (7 and 6), the arm and the 2 fingers."""
        physics = Physics(qpos, qvel, jnp.zeros(self.model.nv))
        return GoalState(physics, self._observe(physics), goal, jnp.zeros(()), jnp.zeros((), bool))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, " goal"]:
        if self._is_grasp:
            return grasp_goal(self._sample_cube(key))
        offset = jax.random.uniform(key, (3,), minval=-1, maxval=1)
        return jnp.array(self.task.goal) + jnp.array(self.task.goal_range) * offset

    def step(self, state: GoalState, action: Float[Array, " action"]) -> GoalState:
        physics = self.advance(state.physics, self._control(state.physics, action))
        observation = self._observe(physics)
        goal = grasp_goal(observation[:3]) if self._is_grasp else state.goal
        after = GoalState(physics, observation, goal, jnp.zeros(()), jnp.zeros((), bool))
        return self.rewarded(after)

    def goal_position(self, states: GoalState):
        goal = np.asarray(states.goal)
        return (goal[..., :3] + goal[..., 3:6]) / 2 if self._is_grasp else goal

    def _sample_cube(self, key) -> Float[Array, "3"]:
        x, y, half = self.task.cube
        offset = jax.random.uniform(key, (2,), minval=-half, maxval=half)
        return jnp.append(jnp.array([x, y]) + offset, CUBE_START_HEIGHT)

    def _control(self, physics: Physics, action: Float[Array, " action"]) -> Float[Array, " actuators"]:
        """The servos' targets."""
        if self._is_hand:
            targets = physics.qpos[self._joints] + HAND_STEP * action[:3]
        else:
            low, high = np.array(list(DRIVEN.values()), np.float32).T
            held = np.zeros(7, np.float32)
            held[np.array(list(HELD)) - 1] = list(HELD.values())
            targets = jnp.array(held).at[np.array(list(DRIVEN)) - 1].set((low + high + action[:4] * (high - low)) / 2)
        if not self._has_cube:
            return targets
        return jnp.append(targets, jnp.full(2, jnp.where(action[-1] > 0, CLOSED, OPEN)))

    def _observe(self, physics: Physics) -> Float[Array, " observation"]:
        data = self.kinematics(physics)
        wrist = [data.xpos[self._wrist], body_velocity(self.model, data, self._wrist)]
        angles = [] if self._is_hand else [physics.qpos[self._joints]]
        if not self._has_cube:
            return jnp.concatenate([*angles, *wrist])
        left, right = self._fingers
        distance = jnp.linalg.norm(data.xpos[left] - data.xpos[right])
        parts = [physics.qpos[:3], *angles, *wrist, distance[None]]
        if self._is_grasp:
            parts += [data.xpos[finger] + FINGER_LENGTH * data.xmat[finger, :, 2] for finger in self._fingers]
        return jnp.concatenate(parts)


def grasp_goal(cube: Float[Array, "3"]) -> Float[Array, "7"]:
    """Left fingertip, right fingertip and opening around a cube."""
    x, y, _ = cube
    across = jnp.array([y, -x, 0]) / jnp.hypot(x, y) * GRASP_OPENING / 2
    return jnp.concatenate([cube + across, cube - across, jnp.array([GRASP_OPENING])])


def _add(parent, tag: str, **attributes):
    """An XML element; attributes are strings, numbers or tuples of numbers."""
    for name, value in attributes.items():
        if not isinstance(value, str):
            attributes[name] = " ".join(repr(float(number)) for number in np.ravel(value))
    return ElementTree.SubElement(parent, tag, attributes)


def _model(task: Task, is_hand: bool, all_contacts: bool) -> str:
    """The MJCF of a task."""
    root = ElementTree.Element("mujoco")
    _add(root, "compiler", angle="radian", autolimits="true")
    _add(
        root, "option", timestep=TIMESTEP, integrator="implicitfast", solver="Newton", iterations="6",
        ls_iterations="12", cone="pyramidal", impratio=10 if task.bins else 1,
    )  # fmt: skip
    solid = {"contype": "0", "conaffinity": "0"}
    world = _add(root, "worldbody")
    _add(world, "geom", name="table", type="plane", pos=(0, 0.2, 0), size=(2.8, 2.4, 0.05), **solid)
    walls = _add_bins(world, task.bins, solid) if task.bins else []
    actuators = ElementTree.Element("actuator")
    if task.cube:
        cube = _add(world, "body", name="cube", pos=(0, 0, CUBE_HALF))
        _add(cube, "freejoint", name="cube")
        _add(cube, "geom", name="cube", type="box", size=[CUBE_HALF] * 3, density=1000, **solid)

    wrist = _add_hand(world, actuators) if is_hand else _add_arm(world, actuators)
    _add(
        wrist,
        "geom",
        name="hand",
        type="capsule",
        size=HAND_SIZE,
        pos=HAND_CENTRE,
        quat=HAND_QUATERNION,
        mass=0,
        **solid,
    )
    pairs = [("table", "hand")]
    if task.cube:
        _add_fingers(wrist, actuators, is_hand, solid)
        equality = _add(root, "equality")
        left, right = FINGERS
        _add(equality, "joint", joint1=left, joint2=right, solref=(0.005, 1), solimp=(0.95, 0.99, 0.001))
        pairs += [("cube", "table"), ("cube", "hand"), ("cube", left), ("cube", right)]
        pairs += [("table", left), ("table", right), (left, right)]
        pairs += [(wall, moving) for wall in walls for moving in ("cube", "hand", left, right)]
    contact = _add(root, "contact")
    for first, second in pairs:
        _add(
            contact, "pair", geom1=first, geom2=second, condim="3", friction=(1, 1, 0.005, 1e-4, 1e-4),
            solref=(0.02, 1), solimp=(0.9, 0.95, 0.001, 0.5, 2), margin=0,
        )  # fmt: skip
    root.append(actuators)
    if not all_contacts:
        _add(_add(root, "custom"), "numeric", name="max_contact_points", data=CONTACT_POINTS)
    return ElementTree.tostring(root, encoding="unicode")


def _add_bins(world, bins, solid) -> list[str]:
    """Four walls around each bin; their names."""
    centre, offset = bins
    along, between = offset + WALL_HALF_THICKNESS, offset - WALL_HALF_THICKNESS
    walls = []
    for side, x in (("left", -centre), ("right", centre)):
        for wall, position, size in (
            ("front", (x, BIN_Y - offset), (along, WALL_HALF_THICKNESS)),
            ("back", (x, BIN_Y + offset), (along, WALL_HALF_THICKNESS)),
            ("outer", (x + math.copysign(offset, x), BIN_Y), (WALL_HALF_THICKNESS, between)),
            ("inner", (x - math.copysign(offset, x), BIN_Y), (WALL_HALF_THICKNESS, between)),
        ):
            walls.append(f"{side}_bin_{wall}")
            half = WALL_HEIGHT / 2
            _add(world, "geom", name=walls[-1], type="box", pos=(*position, half), size=(*size, half), **solid)
    return walls


def _add_arm(world, actuators):
    """The seven links and their servos; the last link."""
    body = world
    for number, (link, servo) in enumerate(zip(LINKS, SERVOS), start=1):
        name = f"link{number}"
        body = _add(body, "body", name=name, pos=link.position, quat=link.quaternion)
        _add(body, "inertial", pos=link.centre, mass=link.mass, fullinertia=link.inertia)
        limits = {"range": LIMITS[number]} if number in LIMITS else {}
        _add(body, "joint", name=name, type="hinge", axis=(0, 0, 1), **limits)
        _add_servo(actuators, name, servo)
    return body


def _add_hand(world, actuators):
    """A hand on three slides, pointing downwards; it is the arm's last link in all but what carries it."""
    # half a turn about x, after an eighth of a turn that brings the fingers' direction to x
    body = _add(world, "body", name="link7", quat=(0, *EIGHTH, 0), gravcomp=1)
    _add(body, "inertial", pos=LINKS[-1].centre, mass=LINKS[-1].mass, fullinertia=LINKS[-1].inertia)
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, np.array([0, *EIGHTH, 0]))
    for (name, targets), axis in zip(HAND_RANGES.items(), rotation.reshape(3, 3)):
        _add(body, "joint", name=name, type="slide", axis=axis)
        _add_servo(actuators, name, Servo(1000, 1000, targets, 87))
    return body


def _add_fingers(wrist, actuators, is_hand: bool, solid):
    for name, quaternion in FINGERS.items():
        finger = _add(wrist, "body", name=name, pos=FINGER_POSITION, quat=quaternion, gravcomp=float(is_hand))
        _add(finger, "inertial", pos=(0, 0, 0), mass=0.015, diaginertia=(2.375e-6, 2.375e-6, 7.5e-7))
        _add(finger, "joint", name=name, type="slide", axis=(0, 1, 0), range=(0, 0.08), damping=5, armature=0.1)
        _add(finger, "geom", name=name, type="box", size=FINGER_SIZE, pos=FINGER_CENTRE, **solid)
        _add_servo(actuators, name, FINGER_SERVO)


def _add_servo(actuators, joint: str, servo: Servo):
    _add(
        actuators, "general", joint=joint, ctrlrange=servo.targets, forcerange=(-servo.force, servo.force),
        biastype="affine", gainprm=servo.gain, biasprm=(0, -servo.stiffness, -servo.stiffness / 10),
    )  # fmt: skip


def _shapes(model: mujoco.MjModel, task: Task, is_hand: bool) -> list[viewer.Shape]:
    """What collides, and what does not: the arm, and zones on the table where the cube starts and goals are."""
    colours = {"table": viewer.SCENE, "cube": CUBE, "hand": HAND} | dict.fromkeys(FINGERS, HAND)
    shapes = []
    for geom, shape in enumerate(viewer.shapes_of(model)):
        name = model.geom(geom).name
        shapes.append(shape._replace(colour=colours.get(name, START if name.startswith("left") else GOAL)))
    if not is_hand:
        shapes.append(_capsule(-1, (0, 0, 0), LINKS[0].position, 0.07, ARM))
        ends = [*(link.position for link in LINKS[1:]), HAND_CENTRE]
        for number, end in enumerate(ends, start=1):
            link = model.body(f"link{number}").id - 1
            shapes.append(_capsule(link, (0, 0, -0.05), (0, 0, 0.05), 0.06, viewer.ROBOT))
            if any(end):
                shapes.append(_capsule(link, (0, 0, 0), end, 0.05, ARM))
    if not task.cube:  # no gripper, but it is there to see
        for quaternion in FINGERS.values():
            rotation = np.empty(9)
            mujoco.mju_quat2Mat(rotation, np.array(quaternion, np.float64))
            opened = np.add(FINGER_CENTRE, (0, FINGER_START, 0))
            centre = FINGER_POSITION + rotation.reshape(3, 3) @ opened
            link = model.body("link7").id - 1
            shapes.append(viewer.Shape("box", FINGER_SIZE, HAND, link, tuple(centre.tolist()), quaternion))
    elif task.goal and not task.bins:
        x, y, half = task.cube
        for centre, half_size, colour in (((x, y), (half, half), START), (task.goal[:2], task.goal_range[:2], GOAL)):
            shapes.append(viewer.Shape("box", (*half_size, 0.001), colour, -1, (*centre, 0.001), (1, 0, 0, 0)))
    return shapes


def _capsule(link: int, start, end, radius: float, colour) -> viewer.Shape:
    start, end = np.array(start, float), np.array(end, float)
    x, y, z = direction = (end - start) / np.linalg.norm(end - start)
    # half-way between no turn and half a turn, about the axis that takes z to the direction
    rotation = np.array([1 + z, -y, x, 0])
    rotation /= np.linalg.norm(rotation)
    centre, half_length = (start + end) / 2, (end - start) @ direction / 2
    return viewer.Shape(
        "capsule", (radius, float(half_length)), colour, link, tuple(centre.tolist()), tuple(rotation.tolist())
    )
