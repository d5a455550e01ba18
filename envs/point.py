"""A point robot in pure JAX, in any maze and in the open: the story on a laptop, and tests with a known answer.

In a maze the robot is a disc of radius 0.2 in corridors one unit wide. An action is its velocity, at most 0.3 units a
step along each axis; walls push it out along their normal, so it slides along them. Observation: x, y. Goal: x, y. Or
both are images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Num, UInt8

from envs import mazes
from envs.base import GoalEnv, GoalState, TaskFamily, TaskState

ROBOT_RADIUS = 0.2
SPEED = 0.3
SUBSTEPS = 4
"""In each the robot moves less than its radius, also diagonally: its centre cannot get inside a corner."""
JITTER = 0.25
"""Starts and goals are uniform in a square of this half side around the centre of their cell."""


class PointMaze(GoalEnv):
    """The point robot in the maze `layout` (a name in `mazes.DRAWINGS`)."""

    name = "point"
    observation_size = 2
    action_size = 2
    goal_indices = (0, 1)
    success_radius = 0.25

    def __init__(self, layout: str):
        self.maze = mazes.load(layout, cell_size=1.0)
        self._walls = self.maze.wall_boxes()

    def reset(self, key: Key[Array, ""]) -> GoalState:
        (start_key, start_jitter), (goal_key, goal_jitter) = jax.vmap(jax.random.split)(jax.random.split(key))
        start, goal = self.maze.sample(start_key, goal_key)
        return self.place(start + _jitter(start_jitter), goal + _jitter(goal_jitter))

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        return GoalState(position, self.see(position), self.see(goal), jnp.zeros(()), jnp.zeros((), bool))

    def see(self, position: Float[Array, "2"]) -> Num[Array, " observation"]:
        """The observation of a robot at x, y, which is also the goal to be there."""
        return position

    def sample_goal(self, key: Key[Array, ""]) -> Num[Array, " goal"]:
        goal_key, jitter_key = jax.random.split(key)
        return self.see(self.maze.sample_goal(goal_key) + _jitter(jitter_key))

    def step(self, state: GoalState, action: Float[Array, "2"]) -> GoalState:
        position = state.physics
        for _ in range(SUBSTEPS):
            position = position + SPEED / SUBSTEPS * jnp.clip(action, -1, 1)
            # the deepest wall first; twice, for a corner between two walls
            for _ in range(2):
                position = _push_out(position, jnp.asarray(self._walls))
        return self.rewarded(state._replace(physics=position, observation=self.see(position)))

    def render(self, states: GoalState, stem: str, labels: Sequence[str] = ()) -> str:
        """A GIF of all episodes side by side in one maze: the robots, their trails and their goals (crosses). It ends
        soon after the last robot that reaches its goal has reached it."""
        states = self.until_all_arrived(states)
        draw_maze = lambda axes: mazes.draw(self.maze, axes)
        return film(states.physics, states.goal, stem, ROBOT_RADIUS, draw_maze, labels)

    def until_all_arrived(self, states: GoalState) -> GoalState:
        """Trajectories (episode, time), cut off soon after the last arrival."""
        at_goal = np.asarray(self.distance(jax.tree.map(jnp.asarray, states))) < self.success_radius
        arrivals = at_goal.argmax(axis=1)[at_goal.any(axis=1)]
        end = arrivals.max() + 5 if len(arrivals) else None
        return jax.tree.map(lambda x: np.asarray(x)[:, :end], states)


class PointMazePixels(PointMaze):
    """The same maze from above: observation and goal are images of all of it, 64 x 64 x 3 bytes, row by row.

    The robot, red, is where it is, or where it is to be; the floor is grey, walls are black. As in `mazes.draw`, x
    grows to the right and y upwards. The edge of the disc is a pixel wide, so that an image tells the position to a
    hundredth of a unit of length, which is how distances are measured.
    """

    name = "point_pixels"
    image_shape = (64, 64, 3)
    observation_size = 64 * 64 * 3
    goal_indices = tuple(range(observation_size))

    def __init__(self, layout: str):
        super().__init__(layout)
        cells = self.maze.is_wall.shape
        self._pixels = 64 / max(cells)
        """Of a unit of length."""
        right = (np.arange(64) + 0.5) / self._pixels - 0.5
        self._x, self._y = np.meshgrid(right, right[::-1])
        inside = np.pad(~self.maze.is_wall, [(0, max(cells) - n) for n in cells])  # what is beyond the maze is wall
        self._floor = inside[np.round(self._x).astype(int), np.round(self._y).astype(int)]

    def see(self, position: Float[Array, "2"]) -> UInt8[Array, " observation"]:
        distance = jnp.hypot(self._x - position[0], self._y - position[1])
        robot = jnp.clip((ROBOT_RADIUS - distance) * self._pixels + 0.5, 0, 1)[..., None]
        world = 127.0 * self._floor[..., None]
        image = world + robot * (jnp.array([255.0, 0, 0]) - world)
        return jnp.round(image).astype(jnp.uint8).reshape(-1)

    def achieved_goal(self, observation: UInt8[Array, "*batch observation"]) -> UInt8[Array, "*batch goal"]:
        return observation

    def position(self, goal: UInt8[Array, "*batch goal"]) -> Float[Array, "*batch 2"]:
        """The centre of what is redder than green."""
        image = goal.reshape(*goal.shape[:-1], *self.image_shape).astype(jnp.float32)
        robot = image[..., 0] - image[..., 1]
        centre = lambda x: jnp.sum(robot * x, axis=(-2, -1)) / jnp.sum(robot, axis=(-2, -1))
        return jnp.stack([centre(self._x), centre(self._y)], axis=-1)

    def distance(self, state: GoalState) -> Float[Array, "*batch"]:
        return jnp.linalg.norm(self.position(state.observation) - self.position(state.goal), axis=-1)

    def render(self, states: GoalState, stem: str, labels: Sequence[str] = ()) -> str:
        """A GIF of all episodes, four in a row: beside each observation its goal. It ends as in `PointMaze`."""
        from PIL import Image, ImageDraw

        states = self.until_all_arrived(states)
        episodes, time = states.reward.shape
        pairs = np.stack([states.observation, states.goal], axis=2).reshape(episodes, time, 2, *self.image_shape)
        rows, columns = -(-episodes // 4), min(episodes, 4)
        frames = np.full((time, rows * 84, columns * 138, 3), 255, np.uint8)
        for i, pair in enumerate(pairs):
            top, left = 84 * (i // 4) + 16, 138 * (i % 4) + 4
            frames[:, top : top + 64, left : left + 64] = pair[:, 0]
            frames[:, top : top + 64, left + 66 : left + 130] = pair[:, 1]
        images = [Image.fromarray(frame).resize((2 * columns * 138, 2 * rows * 84), Image.NEAREST) for frame in frames]
        for image in images:
            for i, label in enumerate(labels):
                at = 276 * (i % 4) + 8, 168 * (i // 4) + 14
                ImageDraw.Draw(image).text(at, f"{label}: now, goal", fill=(0, 0, 0))
        milliseconds = [80] * (time - 1) + [800]
        images[0].save(f"{stem}.gif", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
        return f"{stem}.gif"


class PointGoal(TaskFamily):
    """A point in the open plane goes to a goal that it is not told: the task, uniform in [-1, 1]^2.

    Observation: x, y. Action: displacement, at most 0.1 along each axis. It starts anywhere in [-1, 1]^2. Reward: minus
    the distance to the goal after the step. Nothing terminates; published episodes have 20 steps.
    """

    name = "point_goal"
    observation_size = action_size = task_size = oracle_size = 2
    num_train_tasks, num_test_tasks = 80, 20
    STEP = 0.1

    def reset(self, key: Key[Array, ""]) -> TaskState:
        start_key, task_key = jax.random.split(key)
        position = self.start(start_key)
        return TaskState(position, position, self.sample_task(task_key), jnp.zeros(()), jnp.zeros((), bool))

    def start(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)

    def step(self, state: TaskState, action: Float[Array, "2"]) -> TaskState:
        position = state.physics + self.STEP * jnp.clip(action, -1, 1)
        after = state._replace(physics=position, observation=position)
        return after._replace(reward=self.reward(after))

    def reward(self, state: TaskState) -> Float[Array, ""]:
        return -jnp.linalg.norm(state.physics - state.task)

    def render(self, states: TaskState, stem: str) -> str:
        """A GIF of all episodes side by side: the points, their trails and their goals (crosses)."""
        square = lambda axes: axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
        return film(states.physics, states.task, stem, 0.04, square)


class SparsePointGoal(PointGoal):
    """The same from the origin, with goals on the upper half of the unit circle and a reward near them only.

    Reward: 1 - distance where the distance to the goal is at most 0.2, else 0. The dense one is learned from.
    """

    name = "sparse_point_goal"
    RADIUS = 0.2

    def start(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return jnp.zeros(2)

    def sample_task(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return _on_arc(jax.random.uniform(key, maxval=np.pi))

    def tasks(self, key, num_train, num_test):
        """Evenly along the half circle, shuffled."""
        angles = jax.random.permutation(key, jnp.linspace(0, np.pi, num_train + num_test))
        goals = jax.vmap(_on_arc)(angles)
        return goals[:num_train], goals[num_train:]

    def reward(self, state: TaskState) -> Float[Array, ""]:
        dense = super().reward(state)
        return jnp.where(dense >= -self.RADIUS, 1 + dense, 0.0)

    def training_reward(self, state: TaskState) -> Float[Array, ""]:
        return super().reward(state)


def _on_arc(angle: Float[Array, ""]) -> Float[Array, "2"]:
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def film(
    path: Float[ArrayLike, "episodes time 2"],
    goals: Float[ArrayLike, "episodes time 2"],
    stem: str,
    radius: float,
    draw_background,
    labels: Sequence[str] = (),
) -> str:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    path, goals = np.asarray(path), np.asarray(goals)[:, 0]
    figure, axes = pyplot.subplots(figsize=(4, 4), dpi=72, layout="tight")
    draw_background(axes)
    colours = pyplot.get_cmap("tab10")(np.arange(len(path)) % 10)
    axes.scatter(*goals.T, c=colours, marker="x", s=60)
    trails = [axes.plot([], [], color=c, alpha=0.5, animated=True)[0] for c in colours]
    robots = [axes.add_patch(pyplot.Circle((0, 0), radius, color=c, animated=True)) for c in colours]
    kinds = list(dict.fromkeys(labels))  # the second is drawn hollow
    for robot, label in zip(robots, labels):
        robot.set_fill(label == kinds[0])
    handles = [pyplot.Line2D([], [], color="grey", marker="o", ls="", fillstyle=f) for f in ("full", "none")]
    cross = pyplot.Line2D([], [], color="grey", marker="x", ls="")
    axes.legend(
        [cross, *handles[: len(kinds)]],
        ["goal", *kinds],
        fontsize=7,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=3,
    )
    figure.canvas.draw()
    background = figure.canvas.copy_from_bbox(figure.bbox)

    def frame(t):
        figure.canvas.restore_region(background)
        for p, trail, robot in zip(path, trails, robots):
            trail.set_data(*p[: t + 1].T)
            robot.center = p[t]
            axes.draw_artist(trail)
            axes.draw_artist(robot)
        return Image.fromarray(np.array(figure.canvas.buffer_rgba())[..., :3])

    film = [frame(t) for t in range(path.shape[1])]
    milliseconds = [80] * (len(film) - 1) + [800]
    film[0].save(f"{stem}.gif", save_all=True, append_images=film[1:], duration=milliseconds, loop=0)
    pyplot.close(figure)
    return f"{stem}.gif"


def _jitter(key: Key[Array, ""]) -> Float[Array, "2"]:
    return jax.random.uniform(key, (2,), minval=-JITTER, maxval=JITTER)


def _push_out(position: Float[Array, "2"], walls: Float[Array, "boxes 4"]) -> Float[Array, "2"]:
    """Moves a disc out of the box it is deepest in; its centre must not be inside one."""
    nearest = jnp.clip(position, walls[:, :2] - walls[:, 2:], walls[:, :2] + walls[:, 2:])
    away = position - nearest
    gap = jnp.linalg.norm(away, axis=1)
    deepest = jnp.argmin(gap)
    push = jnp.maximum(ROBOT_RADIUS - gap[deepest], 0) * away[deepest] / jnp.maximum(gap[deepest], 1e-6)
    return position + push
