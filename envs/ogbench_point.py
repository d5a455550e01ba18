"""OGBench's point mazes (Park et al. 2024, arXiv 2410.20092) in pure JAX, and the scripted expert of their data.

Units, maps, tasks and the law of contacts are OGBench's. A cell is 4 units wide; the cell in row i and column j of a
map has its centre at x = 4 j - 4, y = 4 i - 4 (so a `Maze` here has the map's columns as its rows). The robot is a disc
of radius 0.7; an action moves it by at most 0.2 along each axis. Where the move ends inside a wall, 17.722 % of the
depth are left: what MuJoCo's soft contacts make of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from envs.base import GoalEnv, GoalState
from envs.mazes import Maze, draw
from envs.point import film

MAPS = {
    "medium": """
        ########
        #..##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#..#
        ########""",
    "large": """
        ############
        #....#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#...#
        ############""",
    "giant": """
        ################
        #.#......##....#
        #.#.##.#.#..##.#
        #...#..#...#...#
        #.###.######.#.#
        #...#...#....#.#
        ###.#.#..#.#.###
        #...#..#...#...#
        #.#.#.#.######.#
        #.###...#...##.#
        #.....#...#....#
        ################""",
    "teleport": """
        ############
        #.....#.#..#
        ##.#...#..##
        ##.###.....#
        #....#.#.#.#
        #.##.#.#.#.#
        #.##.#.#.#.#
        #....#...#.#
        ############""",
}
TASKS = {
    "medium": [[(1, 1), (6, 6)], [(6, 1), (1, 6)], [(5, 3), (4, 2)], [(6, 5), (6, 1)], [(2, 6), (1, 1)]],
    "large": [[(1, 1), (7, 10)], [(5, 4), (7, 1)], [(7, 4), (1, 10)], [(3, 8), (5, 4)], [(1, 1), (5, 4)]],
    "giant": [[(1, 1), (10, 14)], [(1, 14), (10, 1)], [(8, 14), (1, 1)], [(8, 3), (5, 12)], [(5, 9), (3, 8)]],
    "teleport": [[(1, 10), (7, 1)], [(1, 1), (7, 10)], [(5, 6), (7, 10)], [(7, 1), (7, 10)], [(5, 6), (7, 1)]],
}
"""Row and column of start and goal, of the five tasks that are scored."""
TELEPORTS = [(4, 6), (5, 1)], [(1, 7), (6, 1), (6, 10)]
"""Rows and columns of the cells where one vanishes, and where one appears."""
TELEPORT_RADIUS = 1.5
RADIUS, SPEED, LEFT = 0.7, 0.2, 0.17722
NOISE = 0.5
"""Standard deviation of the expert's actions, on each axis."""
STITCH = 4
"""Cells from start to goal in the data that are to be stitched."""


class PointMaze(GoalEnv):
    """The point robot in an OGBench maze. Observation and goal: x, y. Published episodes have 1000 steps.

    `reset` draws one of the five tasks; starts and goals are uniform within 1 of the centre of their cell.

    Attributes:
      tasks: x and y of the cells of start and goal, (5, 2, 2).
      centres: of the free cells, (cells, 2).
      distances: steps from free cell to free cell, (cells, cells).
      vertices: numbers of the free cells that are no straight corridor.
    """

    observation_size = action_size = 2
    goal_indices = (0, 1)
    success_radius = 1.0

    def __init__(self, layout: str):
        self.layout, self.name = layout, f"pointmaze_{layout}"
        rows = MAPS[layout].split()
        starts, goals = ({task[end] for task in TASKS[layout]} for end in (0, 1))
        letter = lambda i, j: "#" if rows[i][j] == "#" else "G" if (i, j) in goals else "R" if (i, j) in starts else "."
        columns = ["".join(letter(i, j) for i in range(len(rows))) for j in range(len(rows[0]))]
        self.maze = Maze(layout, tuple(columns), cell_size=4.0, origin=(-4.0, -4.0))
        self._walls = self.maze.wall_boxes()
        self.tasks = self._at(TASKS[layout])
        free = np.argwhere(~self.maze.is_wall)
        self.centres = self.maze.at(free)
        self._number = np.full(self.maze.is_wall.shape, -1)
        self._number[tuple(free.T)] = np.arange(len(free))
        neighbours = np.stack([self._number[tuple((free + side).T)] for side in SIDES], axis=1)
        self.distances = path_lengths(neighbours)
        # from the wall, the way is long
        further = np.where(neighbours >= 0, self.distances[:, neighbours], len(free))
        nearest = np.take_along_axis(neighbours[None], further.argmin(axis=2)[..., None], axis=2)[..., 0]
        self._next = np.where(self.distances == 0, np.arange(len(free)), nearest)
        """Of a goal's cell and a cell, the next cell on the way."""
        along = (neighbours >= 0).reshape(-1, 2, 2)
        straight = along.all(axis=2).any(axis=1) & ~along.any(axis=2).all(axis=1)
        self.vertices = np.flatnonzero(~straight)

    def _at(self, cells) -> Float[np.ndarray, "*batch 2"]:
        """x and y of rows and columns of the map."""
        return self.maze.at(np.array(cells)[..., ::-1])

    def reset(self, key: Key[Array, ""]) -> GoalState:
        task_key, key = jax.random.split(key)
        return self.begin(jax.random.randint(task_key, (), 0, len(self.tasks)), key)

    def begin(self, task: Int[Array, ""], key: Key[Array, ""]) -> GoalState:
        """The start of a task, 0 to 4."""
        start, goal = jnp.asarray(self.tasks)[task] + jitter(key, 2)
        return self.place(start, goal)

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        return GoalState(position, position, goal, jnp.zeros(()), jnp.zeros((), bool))

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        return self.reset(key).goal

    def step(self, state: GoalState, action: Float[Array, "2"]) -> GoalState:
        position = state.physics + SPEED * jnp.clip(action, -1, 1)
        walls = jnp.asarray(self._walls)
        away = position - jnp.clip(position, walls[:, :2] - walls[:, 2:], walls[:, :2] + walls[:, 2:])
        gap = jnp.linalg.norm(away, axis=1, keepdims=True)
        push = (1 - LEFT) * jnp.maximum(RADIUS - gap, 0) * away / jnp.maximum(gap, 1e-6)
        # of several walls that touch it, along each axis the deepest on either side
        position = position + push.max(axis=0) + push.min(axis=0)
        if self.layout == "teleport":
            position = self._teleported(position)
        return self.rewarded(self.place(position, state.goal))

    def _teleported(self, position: Float[Array, "2"]) -> Float[Array, "2"]:
        """Where a step that ends here leads: from an entry to any exit, at random by the last bits of the position."""
        entries, exits = map(self._at, TELEPORTS)
        enters = (jnp.linalg.norm(position - entries, axis=-1) < TELEPORT_RADIUS).any()
        x, y = jax.lax.bitcast_convert_type(position, jnp.uint32)
        key = jax.random.fold_in(jax.random.key(x), y)
        return jnp.where(enters, jax.random.choice(key, jnp.asarray(exits)), position)

    def render(self, states: GoalState, stem: str, labels: Sequence[str] = ()) -> str:
        """A GIF of all episodes in one maze, every fourth step."""
        path, goal = np.asarray(states.observation)[:, ::4], np.asarray(states.goal)
        return film(path, goal, stem, RADIUS, lambda axes: draw(self.maze, axes), labels)

    def in_the_open(self, positions: Shaped[np.ndarray, "rows 2"]) -> bool:
        """Whether all of these have their centre in a free cell."""
        cells = np.round((positions - self.maze.origin) / self.maze.cell_size).astype(int)
        inside = ((cells >= 0) & (cells < self.maze.is_wall.shape)).all()
        return bool(inside) and not self.maze.is_wall[tuple(cells.T)].any()

    def expert(self, position: Float[Array, "2"], goal: Int[Array, ""], key: Key[Array, ""]) -> Float[Array, "2"]:
        """Its action on the way to a free cell: towards the centre of the next one, with noise."""
        row, column = jnp.round((position - jnp.array(self.maze.origin)) / self.maze.cell_size).astype(int)
        target = jnp.asarray(self.centres)[jnp.asarray(self._next)[goal, jnp.asarray(self._number)[row, column]]]
        ahead = (target - position) / (jnp.linalg.norm(target - position) + 1e-6)
        return jnp.clip(ahead + NOISE * jax.random.normal(key, (2,)), -1, 1)

    def demonstration(
        self, kind: str, length: int, key: Key[Array, ""]
    ) -> tuple[Float[Array, "rows 2"], Float[Array, "rows 2"], Bool[Array, " rows"]]:
        """An episode of the expert: `length` + 1 positions, the actions taken there, and whether they led to its goal.

        navigate: from anywhere to a random vertex, and from there to the next. stitch: to a cell four steps away, where
        it stays.
        """
        start_key, goal_key, noise_key, key = jax.random.split(key, 4)
        vertex = lambda key: jax.random.choice(key, jnp.asarray(self.vertices))
        start, goal = jax.random.randint(start_key, (), 0, len(self.centres)), vertex(goal_key)
        if kind == "stitch":
            far = jnp.asarray(self.distances)[start] == STITCH
            goal = jnp.where(far.any(), jax.random.categorical(goal_key, jnp.where(far, 0.0, -jnp.inf)), start)
        first, last = jnp.asarray(self.centres)[jnp.stack([start, goal])] + jitter(noise_key, 2)

        def step(carry, key):
            state, goal = carry
            action_key, goal_key, noise_key = jax.random.split(key, 3)
            action = self.expert(state.observation, goal, action_key)
            after = self.step(state, action)
            arrived = after.reward > 0
            goes_on = arrived & (kind == "navigate")
            goal = jnp.where(goes_on, vertex(goal_key), goal)
            place = jnp.asarray(self.centres)[goal] + jitter(noise_key, 1)[0]
            after = self.with_goal(after, jnp.where(goes_on, place, after.goal))
            return (after, goal), (state.observation, action, arrived)

        return jax.lax.scan(step, (self.place(first, last), goal), jax.random.split(key, length + 1))[1]


SIDES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])


def jitter(key: Key[Array, ""], places: int) -> Float[Array, "places 2"]:
    return jax.random.uniform(key, (places, 2), minval=-1.0, maxval=1.0)


def path_lengths(neighbours: Int[np.ndarray, "cells 4"]) -> Int[np.ndarray, "cells cells"]:
    """Breadth-first distances from each cell to each; a neighbour -1 is a wall."""
    many = len(neighbours)
    lengths = np.where(np.eye(many, dtype=bool), 0, many)
    for _ in range(many):
        through = np.where(neighbours >= 0, lengths[:, neighbours], many).min(axis=2)
        lengths = np.minimum(lengths, through + 1)
    return lengths
