"""The JaxGCRL ant with something to push: a ball, in the open and in every maze, and a box that bars the way.

Observation (31): the ant's 29 numbers (envs/ant.py), then x, y of the ball or the box. Action (8): the ant's. A step is
0.05 s. The episode terminates where the torso is below 0.2 m or above 1.0 m.
"""

from types import MappingProxyType
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float, Key

from envs import ant, mazes, spring
from envs.base import GoalEnv, GoalState
from envs.mazes import Maze
from envs.mjx_physics import MjxRobot, Physics

BALL_RADIUS, BALL_DAMPING = 0.5, 1.0
BALL_GOAL_RADIUS = 5.0
"""In the open, the ball's goals lie on a circle of this radius around the origin."""
BALL_DISTANCES = (1.75, 3.5)
"""In the open, the ball starts this far from the origin, on the line to the goal."""
BALL_AHEAD = 2.0
"""In a maze, the ball starts this far from the ant; the ant reaches about 1 m, and the ball half a metre."""
OBJECT_COLOUR = (0.15, 0.45, 0.95)

BLOCKS = """
    #######
    #R.####
    #...G.#
    ##.#..#
    ##G.###
    ##..###
    #######"""
"""Where AntPush happens: `mazes` has the letters. The movable box starts in the cell at row 2, column 2."""
BOX, BOX_HALF, BOX_HEIGHT = (2, 2), 1.8, 2.0
"""The box's cell, and in metres its half width (of a cell: 2) and its height, that of the blocks."""
BOX_MASS, BOX_DAMPING, CORNER_RADIUS = 0.5, 1.0, 0.2
PUSH_GOALS, PUSH_GOAL_SIDE = ((16.0, 8.0), (8.0, 16.0)), 2.0
PUSH_TIMESTEP, PUSH_SUBSTEPS = 0.01, 5
ITERATIONS, LS_ITERATIONS = 4, 8
CONTACTS = 16
"""The solver takes so many contacts with friction, and as many without, the deepest; fewer than that touch, also where
the ant acts at random (tests/envs/test_other_tasks.py)."""


class AntBall(spring.SpringRobot, GoalEnv):
    """Push a ball to a goal: the ant in the open (`layout` None) or in a maze, on brax's spring physics.

    Goal (2): x, y of the ball, in metres. The ball has radius 0.5 m, slides upright at z 0.5 and weighs as much as each
    of the ant's nine links do in this physics, 1 kg. All of the ant touches it; walls touch the ball and what they
    touch of the ant. The noise of the ant's start is that of `ant`.

    Ours, where only the size and the goal's circle are published: a friction that slows the ball by 1 / s (this physics
    gives slides none); the ball starts at rest on the line to the goal, 1.75 to 3.5 m (uniform) from the origin; in a
    maze, goals are the G cells, and the ball starts 2 m from the start towards the next cell of the shortest way to the
    goal, which is half-way there.

    Args:
      layout: a maze (`mazes.load`), or None.
      merged_walls: few large boxes instead of one a cell, as published. The walls are the same, and cheaper to step.
    """

    name = "ant_ball"
    observation_size = 31
    action_size = 8
    goal_indices = (29, 30)
    success_radius = 0.5
    other_radii = MappingProxyType({"easy": 2.0})
    marker_radius = 0.5

    def __init__(self, layout: str | None = None, merged_walls: bool = True):
        self.maze = mazes.load(mazes.jaxgcrl(layout), ant.CELL_SIZE) if layout else None
        super().__init__(_with_ball(ant.model(self.maze, merged_walls)), ant.TIMESTEP, ant.SUBSTEPS)
        ball = self.system.num_links() - 1
        self.shapes = [shape._replace(colour=OBJECT_COLOUR) if shape.link == ball else shape for shape in self.shapes]
        self._ways = _ways(self.maze) if self.maze else None

    def reset(self, key: Key[Array, ""]) -> GoalState:
        start_key, q_key, qd_key, goal_key, ball_key = jax.random.split(key, 5)
        noise, qd = ant.reset_noise(q_key, qd_key)
        if self.maze:
            start, goal = self.maze.sample(start_key, goal_key)
            ball = self._ball(start, goal)
            if self.maze.distances:
                noise = noise.at[:2].set(0)
        else:
            start, goal = jnp.zeros(2), self.sample_goal(goal_key)
            away = jax.random.uniform(ball_key, minval=BALL_DISTANCES[0], maxval=BALL_DISTANCES[1])
            ball = away * goal / BALL_GOAL_RADIUS
        q = self.system.init_q.at[:2].set(start).at[:15].add(noise)
        return self.state_at(q.at[15:].set(ball), jnp.pad(qd, (0, 2)), goal)

    def state_at(self, q: Float[Array, "17"], qd: Float[Array, "16"], goal: Float[Array, "2"]) -> GoalState:
        """The state with these joint positions and velocities, the ball's x and y last."""
        return self._state(spring.pipeline.init(self.system, q, qd), goal)

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        q = self.system.init_q.at[:2].set(position).at[15:].set(self._ball(position, goal))
        return self.state_at(q, jnp.zeros(16), goal)

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        if self.maze:
            return self.maze.sample_goal(key)
        return ant.on_circle(key, BALL_GOAL_RADIUS)

    def step(self, state: GoalState, action: Float[Array, "8"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, jnp.pad(action, (0, 2))), state.goal))

    def goal_position(self, states: GoalState):
        goal = np.asarray(states.goal)
        return np.concatenate([goal, np.full_like(goal[..., :1], BALL_RADIUS)], axis=-1)

    def _state(self, physics, goal):
        observation = jnp.concatenate([physics.q[:15], physics.qd[:14], physics.q[15:]])
        return GoalState(physics, observation, goal, jnp.zeros(()), ant.fallen(physics.q))

    def _ball(self, position, goal):
        """Where the ball starts in a maze: before the ant on its way to the goal."""
        cells = [jnp.round(xy / self.maze.cell_size).astype(int) for xy in (position, goal)]
        return position + BALL_AHEAD * jnp.asarray(self._ways)[(*cells[0], *cells[1])]


class AntPush(MjxRobot, GoalEnv):
    """Reach a goal behind a box that bars the way; on MuJoCo's physics (mujoco.mjx).

    Goal (2): torso x, y in metres: (16, 8) or (8, 16), plus 2 m times a uniform draw from [0, 1] along each axis. The
    ant starts at R, (4, 4); rows are x, columns y, cells 4 m. The box B bars the ways to both chambers of goals. From
    the cell right of R the ant pushes B down, into the way to the lower chamber, and so opens the way to the right
    one; from the cell below R it pushes B to the right, and opens the way to the lower one.

        #######
        #R.####
        #.B.G.#     goals: from the centre of G up to 2 m down and to the right
        ##.#..#
        ##G.###
        ##..###
        #######

    Ours, where only the goals are published: these blocks; the box, 3.6 m wide, 2 m high, 0.5 kg on slides, slowed by a
    friction of 1 N s/m, without any at the blocks; the noise of the start, that of `ant`. The ant is brax's with its
    settings for this physics, but for a solver of 4 iterations of 8 tries instead of 1 of 4; its torso and feet touch
    blocks and box.
    """

    name = "ant_push"
    observation_size = 31
    action_size = 8
    goal_indices = (0, 1)
    success_radius = 0.5
    other_radii = MappingProxyType({"easy": 2.0})
    marker_radius = 0.5

    def __init__(self):
        blocks = mazes.parse(BLOCKS, self.name, ant.CELL_SIZE)
        super().__init__(_push_model(blocks), PUSH_SUBSTEPS)
        box = self.model.body("box").id - 1
        self.shapes = [shape._replace(colour=OBJECT_COLOUR) if shape.link == box else shape for shape in self.shapes]
        start = self.model.numeric("init_qpos").data[2:]
        self._start = np.concatenate([blocks.positions("R")[0], start, np.array(BOX) * ant.CELL_SIZE])

    def reset(self, key: Key[Array, ""]) -> GoalState:
        q_key, qd_key, goal_key = jax.random.split(key, 3)
        noise, qvel = ant.reset_noise(q_key, qd_key)
        qpos = jnp.asarray(self._start, jnp.float32).at[:15].add(noise)
        return self.state_at(qpos, jnp.pad(qvel, (0, 2)), self.sample_goal(goal_key))

    def state_at(self, qpos: Float[Array, "17"], qvel: Float[Array, "16"], goal: Float[Array, "2"]) -> GoalState:
        """The state with these joint positions and velocities, the box's x and y last."""
        return self._state(Physics(qpos, qvel, jnp.zeros(16)), goal)

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        chamber_key, offset_key = jax.random.split(key)
        offset = jax.random.uniform(offset_key, (2,), maxval=PUSH_GOAL_SIDE)
        return jax.random.choice(chamber_key, jnp.array(PUSH_GOALS)) + offset

    def step(self, state: GoalState, action: Float[Array, "8"]) -> GoalState:
        return self.rewarded(self._state(self.advance(state.physics, action), state.goal))

    def _state(self, physics, goal):
        observation = jnp.concatenate([physics.qpos[:15], physics.qvel[:14], physics.qpos[15:]])
        return GoalState(physics, observation, goal, jnp.zeros(()), ant.fallen(physics.qpos))


def _ways(maze: Maze) -> Float[np.ndarray, "rows columns rows columns 2"]:
    """At [i, j, k, l] the step, e.g. (0, -1), from cell i, j to the next one on a shortest way to cell k, l.

    Of equally short ways, one of them; at the goal, to a free cell beside it; in walls, 0.
    """
    steps = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
    free = {tuple(cell): [] for cell in np.argwhere(~maze.is_wall).tolist()}
    for cell, neighbours in free.items():
        neighbours += [(tuple(cell + step), step) for step in steps if tuple(cell + step) in free]
    ways = np.zeros((*maze.is_wall.shape * 2, 2), np.float32)
    for goal in free:
        ways[goal + goal] = free[goal][0][1] if free[goal] else 0
        reached, frontier = {goal}, [goal]
        for cell in frontier:  # grows while it is read: breadth first
            for neighbour, step in free[cell]:
                if neighbour not in reached:
                    reached.add(neighbour)
                    frontier.append(neighbour)
                    ways[neighbour + goal] = -step
    return ways


def _with_ball(xml: str) -> str:
    """An ant's model with a ball that touches all of the ant, and walls, but not the floor.

    Two geoms touch where the contype of one has a bit of the conaffinity of the other: bit 1 is that of the floor, the
    feet and walls, and bit 2 that between the ant and the ball.
    """
    root = ElementTree.fromstring(xml)
    world = root.find("worldbody")
    for geom in world.find("body[@name='torso']").iter("geom"):
        geom.set("contype", str(int(geom.get("contype", 0)) | 2))
    slide = {"type": "slide", "limited": "false", "armature": "0", "damping": "0"}
    ball = ElementTree.SubElement(world, "body", name="ball", pos=f"0 0 {BALL_RADIUS}")
    ElementTree.SubElement(ball, "joint", name="ball_x", axis="1 0 0", **slide)
    ElementTree.SubElement(ball, "joint", name="ball_y", axis="0 1 0", **slide)
    ElementTree.SubElement(ball, "geom", name="ball", type="sphere", size=str(BALL_RADIUS), conaffinity="3")
    # the spring physics ignores the damping of slides; a servo towards velocity 0 is the same
    for joint in ("ball_x", "ball_y"):
        ElementTree.SubElement(root.find("actuator"), "velocity", joint=joint, kv=str(BALL_DAMPING))
    start = root.find("custom/numeric[@name='init_qpos']")
    start.set("data", start.get("data") + " 0 0")
    return ElementTree.tostring(root, encoding="unicode")


def _push_model(blocks: Maze) -> mujoco.MjModel:
    """brax's ant among blocks, with a box on slides.

    Bits of contype and conaffinity (see `_with_ball`): 1 is that of the floor, the feet, blocks and box, 2 that between
    the torso, blocks and box, 4 that between blocks and the box's corners: four spheres inside it, which are enough
    where blocks are wider than the box, and much cheaper than boxes that touch boxes.
    """
    root = ElementTree.fromstring(spring.asset("ant.xml"))
    world = root.find("worldbody")
    world.find("body[@name='torso']/geom[@name='torso_geom']").set("conaffinity", "2")
    blocks.add_walls(world)
    for block in world.findall("geom[@type='box']"):
        block.set("contype", "6")
    box = ElementTree.SubElement(world, "body", name="box", pos=f"0 0 {BOX_HEIGHT / 2}")
    slide = {"type": "slide", "limited": "false", "armature": "0", "damping": str(BOX_DAMPING)}
    ElementTree.SubElement(box, "joint", name="box_x", axis="1 0 0", **slide)
    ElementTree.SubElement(box, "joint", name="box_y", axis="0 1 0", **slide)
    size = f"{BOX_HALF} {BOX_HALF} {BOX_HEIGHT / 2}"
    ElementTree.SubElement(
        box, "geom", name="box", type="box", size=size, mass=str(BOX_MASS), contype="2", conaffinity="1"
    )
    offset = BOX_HALF - CORNER_RADIUS
    corner = {
        "type": "sphere",
        "size": str(CORNER_RADIUS),
        "mass": "0",
        "rgba": "0 0 0 0",
        "condim": "1",
        "priority": "1",
    }
    for x in (-offset, offset):
        for y in (-offset, offset):
            ElementTree.SubElement(box, "geom", pos=f"{x} {y} 0", conaffinity="4", **corner)
    # at the front, for mjx reads the number from there
    root.find("custom").insert(0, ElementTree.Element("numeric", name="max_contact_points", data=str(CONTACTS)))
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    model.opt.timestep = PUSH_TIMESTEP
    model.opt.iterations, model.opt.ls_iterations = ITERATIONS, LS_ITERATIONS
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    return model
