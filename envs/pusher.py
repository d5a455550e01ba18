"""The JaxGCRL pusher: an arm of seven joints pushes an object, or two, over a table; on MuJoCo's physics (mujoco.mjx).

The model is brax's own pusher.xml, edited by program. Metres, radians, seconds; a step is 0.05 s. Nothing terminates.

    observation     pusher_easy, pusher_hard    pusher2
    joint angles    0-6                         0-6
    tip x y z       7-9                         7-9
    object x y z    10-12                       10-12, 13-15
    velocities      13-19                       16-22, of the joints

Goal: x y z of the object, or of both. Action (7): torques, times 2 N m.
"""

import copy
from types import MappingProxyType
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, Key

from envs import spring
from envs.base import GoalEnv, GoalState
from envs.mjx_physics import MjxRobot, Physics

BOXES = {
    "easy": ((0.40, -0.10), (0.50, 0.0)),
    "hard": ((0.25, -0.35), (0.65, -0.05)),
}
"""Where goals are: lowest and highest x, y."""
OBJECTS = BOXES["hard"]
"""Where objects start."""
HEIGHT = -0.275
TASK_LENGTH, BETWEEN_GOALS, BETWEEN_OBJECTS = 0.17, 0.12, 0.12
"""The least distance of an object from its goal, of two goals and of two objects, which are 10 cm thick."""
CANDIDATES = 64
SUBSTEPS, TORQUE = 5, 2.0
VELOCITY_NOISE = 0.005
ITERATIONS, LS_ITERATIONS = 6, 12
COLOURS = (0.15, 0.45, 0.95), (0.55, 0.3, 0.75)


class Pusher(MjxRobot, GoalEnv):
    """Push one object to a goal; `kind` is 'easy' or 'hard'.

    The timestep (5 of 0.01 s), the torques and the noise of a start (joint velocities within 0.005 rad/s of rest, in
    brax's first pose) are those of brax's pusher. The object starts anywhere in brax's box of 40 by 30 cm, at least
    17 cm from its goal, as in brax.

    Ours, where only the sizes are published: a 'hard' goal is anywhere in that same box, an 'easy' one within 5 cm in x
    and y of the only goal that brax has. The tip is the point half-way between the two fingertips, as in Gym. brax's
    spring physics lets the arm sink deep into object and table, MuJoCo's hardly (tests/envs/test_other_tasks.py);
    its solver does 6 iterations here instead of the file's 20. Distances are kept by drawing from 64 candidates: about
    one reset of `pusher2` in a million finds none that does.
    """

    action_size = 7
    success_radius = 0.1
    other_radii = MappingProxyType({"hard": 0.05})
    marker_radius = 0.05
    objects = 1

    def __init__(self, kind: str):
        if kind not in BOXES:
            raise ValueError(f"unknown pusher {kind!r}; there are {', '.join(BOXES)}")
        self.name, self._goals = f"pusher_{kind}", BOXES[kind]
        super().__init__(_model(self.objects), SUBSTEPS)
        self._tip = self.model.body("tips_arm").id
        first = self.model.body("object").id - 1
        self.shapes = [
            shape if shape.link < first else shape._replace(colour=COLOURS[shape.link - first]) for shape in self.shapes
        ]
        self.observation_size = 17 + 3 * self.objects
        self.goal_indices = tuple(range(10, 10 + 3 * self.objects))

    def reset(self, key: Key[Array, ""]) -> GoalState:
        goal_key, velocity_key, *object_keys = jax.random.split(key, 2 + self.objects)
        goal = self.sample_goal(goal_key)
        objects = []
        for object_key, own in zip(object_keys, goal.reshape(-1, 3)):
            avoid = [(own[:2], TASK_LENGTH), *((other, BETWEEN_OBJECTS) for other in objects)]
            objects.append(_draw(object_key, OBJECTS, avoid))
        velocity = jax.random.uniform(velocity_key, (7,), minval=-VELOCITY_NOISE, maxval=VELOCITY_NOISE)
        qvel = jnp.pad(velocity, (0, 2 * self.objects))
        return self.state_at(jnp.concatenate([jnp.zeros(7), *objects]), qvel, goal)

    def state_at(
        self, qpos: Float[Array, " positions"], qvel: Float[Array, " positions"], goal: Float[Array, " goal"]
    ) -> GoalState:
        """The state with these positions and velocities: of the 7 joints, then x and y of each object."""
        physics = Physics(qpos, qvel, jnp.zeros(self.model.nv))
        return GoalState(physics, self._observe(physics), goal, jnp.zeros(()), jnp.zeros((), bool))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, " goal"]:
        goals = []
        for goal_key in jax.random.split(key, self.objects):
            goals.append(_draw(goal_key, self._goals, [(other, BETWEEN_GOALS) for other in goals]))
        return _in_space(jnp.concatenate(goals))

    def step(self, state: GoalState, action: Float[Array, "7"]) -> GoalState:
        physics = self.advance(state.physics, TORQUE * action)
        after = state._replace(physics=physics, observation=self._observe(physics))
        return self.rewarded(after)

    def goal_position(self, states: GoalState):
        return np.asarray(states.goal)[..., :3]

    def _observe(self, physics):
        tip = self.kinematics(physics).xipos[self._tip]
        return jnp.concatenate([physics.qpos[:7], tip, _in_space(physics.qpos[7:]), physics.qvel[:7]])


class Pusher2(Pusher):
    """Push two objects, which also touch each other, to a goal each.

    Ours: goals and starts are those of the hard pusher, goals at least 12 cm apart, objects too. A goal is reached
    where the distance in all six coordinates is below the radius. The viewer shows the first (blue) object's goal only.
    """

    objects = 2

    def __init__(self):
        super().__init__("hard")
        self.name = "pusher2"


def _in_space(positions):
    """x, y of each object, as x, y, z of each."""
    return jnp.pad(positions.reshape(-1, 2), ((0, 0), (0, 1)), constant_values=HEIGHT).ravel()


def _draw(key, box, avoid) -> Float[Array, "2"]:
    """A point uniform in a box, of those that keep their distance from the points of `avoid`: (point, distance)."""
    low, high = (jnp.array(corner) for corner in box)
    points = jax.random.uniform(key, (CANDIDATES, 2), minval=low, maxval=high)
    allowed = jnp.ones(CANDIDATES, bool)
    for point, distance in avoid:
        allowed &= jnp.linalg.norm(points - point, axis=1) >= distance
    return points[jnp.argmax(allowed)]


def _model(objects: int) -> mujoco.MjModel:
    """brax's pusher.xml without its goal, with so many objects on slides along x and y of the world."""
    root = ElementTree.fromstring(spring.asset("pusher.xml"))
    world = root.find("worldbody")
    world.remove(world.find("body[@name='goal']"))
    body = world.find("body[@name='object']")
    body.set("pos", f"0 0 {HEIGHT}")
    for joint in sorted(body.findall("joint"), key=lambda joint: joint.get("name")):  # slidex before slidey
        body.remove(joint)
        body.append(joint)
    if objects == 2:
        solid = body.find("geom[@name='object_geom']")  # contype 1 is what the arm's conaffinity of 1 touches
        solid.set("contype", "3")
        solid.set("conaffinity", "2")
        second = copy.deepcopy(body)
        for element in second.iter():
            if element.get("name"):
                element.set("name", f"{element.get('name')}2")
        world.append(second)
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    model.opt.iterations, model.opt.ls_iterations = ITERATIONS, LS_ITERATIONS
    return model
