"""Maze layouts as drawings, and walls made from them.

`#` wall, `R` start, `G` goal, `.` free. Row i and column j are the world's x = i * cell and y = j * cell (the cell's
centre), as in JaxGCRL. To add a maze, add its drawing to `DRAWINGS`: every robot takes it, as `<robot>_<name>`. A name
that ends in `_eval` is the same walls with other goals, the far ones on which a policy is evaluated.
"""

import dataclasses
import difflib
import re
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Float, Int, Key, Real

DRAWINGS = {
    "u_maze": """
        #####
        #RGG#
        ###G#
        #GGG#
        #####""",
    "u_maze_eval": """
        #####
        #R..#
        ###.#
        #GGG#
        #####""",
    "u_maze_single_eval": """
        #####
        #R..#
        ###.#
        #G..#
        #####""",
    # goals at path distances 1 to 3 (to 4, to 5; 5 and 6) from the start
    "u_maze_1f2f3f_eval": """
        #####
        #RGG#
        ###G#
        #...#
        #####""",
    "u_maze_1f2f3f4f_eval": """
        #####
        #RGG#
        ###G#
        #..G#
        #####""",
    "u_maze_1f2f3f4f5f_eval": """
        #####
        #RGG#
        ###G#
        #.GG#
        #####""",
    "u_maze_5f6f_eval": """
        #####
        #R..#
        ###.#
        #GG.#
        #####""",
    "u2_maze": """
        ######
        #RGGG#
        ####G#
        #GGGG#
        ######""",
    "u2_maze_eval": """
        ######
        #R...#
        ####.#
        #GGGG#
        ######""",
    "u3_maze": """
        #######
        #RGGGG#
        #####G#
        #GGGGG#
        #######""",
    "u3_maze_eval": """
        #######
        #R....#
        #####.#
        #GGGGG#
        #######""",
    "u3_maze_single_eval": """
        #######
        #R....#
        #####.#
        #G....#
        #######""",
    "u4_maze": """
        #####
        #GGG#
        #R#G#
        ###G#
        #G#G#
        #GGG#
        #####""",
    "u4_maze_eval": """
        #####
        #...#
        #R#.#
        ###.#
        #G#.#
        #GGG#
        #####""",
    "u5_maze": """
        ########
        #GGGGGG#
        #R####G#
        ######G#
        #G####G#
        #GGGGGG#
        ########""",
    "u5_maze_eval": """
        ########
        #......#
        #R####.#
        ######.#
        #G####G#
        #GGGGGG#
        ########""",
    "u5_maze_single_eval": """
        ########
        #......#
        #R####.#
        ######.#
        #G####.#
        #......#
        ########""",
    "u6_maze": """
        #######
        #GGGGG#
        #R###G#
        #####G#
        #G###G#
        #GGGGG#
        #######""",
    "u6_maze_eval": """
        #######
        #.....#
        #R###.#
        #####.#
        #G###G#
        #GGGGG#
        #######""",
    "u7_maze": """
        ######
        #GGGG#
        #R##G#
        ####G#
        #G##G#
        #GGGG#
        ######""",
    "u7_maze_eval": """
        ######
        #....#
        #R##.#
        ####.#
        #G##G#
        #GGGG#
        ######""",
    "big_maze": """
        ########
        #RG##GG#
        #GG#GGG#
        ##GGG###
        #GG#GGG#
        #G#GG#G#
        #GGG#GG#
        ########""",
    # the ant's; JaxGCRL and the humanoids have one goal elsewhere, see the next
    "big_maze_eval": """
        ########
        #R.##GG#
        #..#..G#
        ##...###
        #..#...#
        #.#G.#G#
        #.GG#GG#
        ########""",
    "big_maze_jaxgcrl_eval": """
        ########
        #R.##GG#
        #..#.GG#
        ##...###
        #..#...#
        #.#G.#G#
        #.GG#GG#
        ########""",
    "hardest_maze": """
        ############
        #RGGG#GGGGG#
        #G##G#G#G#G#
        #GGGGGG#GGG#
        #G####G###G#
        #GG#G#GGGGG#
        ##G#G#G#G###
        #GG#GGG#GGG#
        ############""",
}


STITCHING = ("u_maze", "u2_maze", "u3_maze", "u4_maze", "u5_maze")
"""The corridors that the stitching tasks were published for; `load` takes any other corridor as well."""


@dataclasses.dataclass(frozen=True)
class Maze:
    """A maze in world coordinates.

    Attributes:
      name: its name in `DRAWINGS`, perhaps with `_gen_` and distances.
      cells: the drawing, one string a row.
      cell_size: side of a cell, in metres.
      distances: empty, or the path lengths from start to goal, in cells, of a stitching task (see `load`).
      origin: x and y of the centre of the first cell.
    """

    name: str
    cells: tuple[str, ...]
    cell_size: float
    distances: tuple[int, ...] = ()
    origin: tuple[float, float] = (0.0, 0.0)

    def at(self, cells: Real[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """x and y of rows and columns."""
        return np.asarray(cells, np.float32) * self.cell_size + np.array(self.origin, np.float32)

    def positions(self, kind: str) -> Float[np.ndarray, "count 2"]:
        """Centres (x, y) of the cells of a kind ('#', 'R', 'G' or '.'), in reading order."""
        found = [(i, j) for i, row in enumerate(self.cells) for j, cell in enumerate(row) if cell == kind]
        return self.at(np.array(found).reshape(-1, 2))

    @property
    def is_wall(self) -> np.ndarray:
        """Bool (rows, columns)."""
        return np.array([[cell == "#" for cell in row] for row in self.cells])

    def sample(
        self, start_key: Key[Array, ""], goal_key: Key[Array, ""]
    ) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
        """Cell centres of a start and a goal: uniform over R and over G; in a stitching task a uniform distance, then a
        uniform pair of cells that far apart along the corridor, the start nearer to R."""
        if not self.distances:
            return jax.random.choice(start_key, jnp.asarray(self.positions("R"))), self.sample_goal(goal_key)
        corridor = self.corridor()
        ahead = jax.random.choice(goal_key, jnp.array(self.distances))
        start = jax.random.randint(start_key, (), 0, len(corridor) - ahead)
        return jnp.asarray(corridor)[start], jnp.asarray(corridor)[start + ahead]

    def sample_goal(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        """The centre of a goal's cell, from the distribution of `sample`."""
        if self.distances:
            return self.sample(*jax.random.split(key))[1]
        return jax.random.choice(key, jnp.asarray(self.positions("G")))

    def corridor(self) -> Float[np.ndarray, "count 2"]:
        """Centres of the free cells from R to the other end; ValueError if the maze is not one corridor from R."""
        left = set(map(tuple, np.argwhere(~self.is_wall).tolist()))
        path = [cell for cell in left if self.cells[cell[0]][cell[1]] == "R"]
        left -= set(path)
        is_corridor = len(path) == 1
        while left and is_corridor:
            i, j = path[-1]
            path += left.intersection([(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)])
            left -= set(path)
            is_corridor = path[-2:-1] == [(i, j)]  # just one way on
        if not is_corridor:
            raise ValueError(f"maze {self.name!r} is not one corridor that begins at R; stitching tasks need one")
        return np.array(path, np.float32) * self.cell_size

    def wall_boxes(self, merged: bool = True) -> Float[np.ndarray, "boxes 4"]:
        """Walls as boxes (centre x, centre y, half size x, half size y), in metres.

        A box a cell is what the published environments use. Merged, the cells are covered by few large rectangles:
        the same walls, and several times fewer pairs for the physics to test.
        """
        if merged:
            rectangles = cover_by_rectangles(self.is_wall)
        else:
            rectangles = np.array([(i, j, i + 1, j + 1) for i, j in np.argwhere(self.is_wall)])
        low, high = self.at(rectangles[:, :2] - 0.5), self.at(rectangles[:, 2:] - 0.5)
        return np.concatenate([(low + high) / 2, (high - low) / 2], axis=1)

    def add_walls(self, world: ElementTree.Element, merged: bool = True) -> None:
        """Adds the walls to an MJCF worldbody: boxes half a cell high that touch what has a conaffinity or contype."""
        height = self.cell_size / 4
        for x, y, half_x, half_y in self.wall_boxes(merged):
            box = {"pos": f"{x} {y} {height}", "size": f"{half_x} {half_y} {height}"}
            ElementTree.SubElement(world, "geom", type="box", contype="1", conaffinity="1", **box)


def parse(drawing: str, name: str, cell_size: float) -> Maze:
    """Reads a drawing; ValueError in one line if it is ragged, open, lacks a start or a goal, or a way between them."""
    cells = tuple(line.strip() for line in drawing.split())
    widths = {len(row) for row in cells}
    letters = set("".join(cells))
    if len(widths) != 1:
        raise ValueError(f"maze {name!r}: rows of different lengths {[len(row) for row in cells]}; make them equal")
    if letters - set("#RG."):
        raise ValueError(f"maze {name!r}: unknown cells {''.join(sorted(letters - set('#RG.')))!r}; use # R G .")
    if "R" not in letters or "G" not in letters:
        raise ValueError(f"maze {name!r}: needs at least one start R and one goal G")
    if set(cells[0] + cells[-1] + "".join(row[0] + row[-1] for row in cells)) != {"#"}:
        raise ValueError(f"maze {name!r}: the border is open; close it with #")
    maze = Maze(name, cells, cell_size)
    areas, _ = scipy.ndimage.label(~maze.is_wall)
    if len({areas[i, j] for i, row in enumerate(cells) for j, cell in enumerate(row) if cell in "RG"}) > 1:
        raise ValueError(
            f"maze {name!r}: no way leads from an R to a G in {' '.join(cells)}; open one, of cells that share a side"
        )
    return maze


def load(name: str, cell_size: float) -> Maze:
    """The maze of this name; ValueError in one line if there is none.

    A name of `DRAWINGS`, or a stitching task on a drawing that is one corridor, `<drawing>_gen_<distances>`: in
    `u_maze_gen_1f2f3f` a goal is 1, 2 or 3 cells further along the corridor than the start, which may be any cell. What
    the names without `_gen_` ask for, from R to the far end, must then be stitched together from shorter ways.
    """
    drawing, stitching, suffix = name.partition("_gen_")
    if drawing not in DRAWINGS:
        near = difflib.get_close_matches(drawing, DRAWINGS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(DRAWINGS)}"
        raise ValueError(f"unknown maze {drawing!r}; {hint}")
    maze = parse(DRAWINGS[drawing], name, cell_size)
    if not stitching:
        return maze
    longest = len(maze.corridor()) - 1
    distances = tuple(int(number) for number in re.findall(r"(\d+)f", suffix))
    if not re.fullmatch(r"([1-9]\d*f)+", suffix) or max(distances) > longest or len(set(distances)) < len(distances):
        raise ValueError(
            f"maze {name!r}: {suffix!r} is no list of distances; write each, from 1 to {longest}, once, e.g. 1f2f3f"
        )
    return dataclasses.replace(maze, distances=distances)


def jaxgcrl(name: str | None) -> str | None:
    """JaxGCRL's maze of this name; of its mazes, `big_maze_eval` has a goal elsewhere than the ant's of the paper."""
    return "big_maze_jaxgcrl_eval" if name == "big_maze_eval" else name


def names() -> list[str]:
    """The drawings, and of the stitching tasks the published one, on each drawing that allows it."""
    return [*DRAWINGS, *(f"{name}_gen_1f2f3f" for name in STITCHING)]


def cover_by_rectangles(mask: np.ndarray) -> Int[np.ndarray, "boxes 4"]:
    """Covers the true cells of a (rows, columns) mask by few rectangles (row, column, end row, end column), ends open.

    Greedy: the rectangle with most cells not yet covered comes first; rectangles may overlap.
    """
    rows, columns = mask.shape
    full = [
        (i, j, m, n)
        for i in range(rows)
        for j in range(columns)
        for m in range(i + 1, rows + 1)
        for n in range(j + 1, columns + 1)
        if mask[i:m, j:n].all()
    ]
    left, chosen = mask.copy(), []
    while left.any():
        i, j, m, n = max(full, key=lambda r: (left[r[0] : r[2], r[1] : r[3]].sum(), (r[2] - r[0]) * (r[3] - r[1])))
        left[i:m, j:n] = False
        chosen.append((i, j, m, n))
    return np.array(chosen)


def draw(maze: Maze, axes) -> None:
    """Draws the walls on matplotlib axes, world x to the right and y upwards, equal scales."""
    for x, y, half_x, half_y in maze.wall_boxes():
        axes.add_patch(_rectangle((x - half_x, y - half_y), 2 * half_x, 2 * half_y))
    (left, bottom), (right, top) = maze.at(np.array([[0, 0], maze.is_wall.shape]) - 0.5)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")


def _rectangle(*args):
    from matplotlib.patches import Rectangle  # envs run without matplotlib

    return Rectangle(*args, facecolor="0.35", edgecolor="none")
