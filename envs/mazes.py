"""Maze layouts as drawings, and walls made from them.

`#` wall, `R` start, `G` goal, `.` free. Row i and column j are the world's x = i * cell and y = j * cell (the cell's
centre), as in JaxGCRL. To add a maze, add its drawing to `DRAWINGS`: every robot takes it, as `<robot>_<name>`. A name
that ends in `_eval` is the same walls with other goals, the far ones on which a policy is evaluated.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

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


@dataclasses.dataclass(frozen=True)
class Maze:
    """A maze in world coordinates.

    Attributes:
      name: its name in `DRAWINGS`.
      cells: the drawing, one string a row.
      cell_size: side of a cell, in metres.
    """

    name: str
    cells: tuple[str, ...]
    cell_size: float

    def positions(self, kind: str) -> Float[np.ndarray, "count 2"]:
        """Centres (x, y) of the cells of a kind ('#', 'R', 'G' or '.'), in reading order."""
        found = [(i, j) for i, row in enumerate(self.cells) for j, cell in enumerate(row) if cell == kind]
        return np.array(found, np.float32).reshape(-1, 2) * self.cell_size

    @property
    def is_wall(self) -> np.ndarray:
        """Bool (rows, columns)."""
        return np.array([[cell == "#" for cell in row] for row in self.cells])

    def wall_boxes(self, merged: bool = True) -> Float[np.ndarray, "boxes 4"]:
        """Walls as boxes (centre x, centre y, half size x, half size y), in metres.

        A box a cell is what the published environments use. Merged, the cells are covered by few large rectangles:
        the same walls, and several times fewer pairs for the physics to test.
        """
        if merged:
            rectangles = cover_by_rectangles(self.is_wall)
        else:
            rectangles = np.array([(i, j, i + 1, j + 1) for i, j in np.argwhere(self.is_wall)])
        low, high = rectangles[:, :2] - 0.5, rectangles[:, 2:] - 0.5
        return np.concatenate([(low + high) / 2, (high - low) / 2], axis=1).astype(np.float32) * self.cell_size


def parse(drawing: str, name: str, cell_size: float) -> Maze:
    """Reads a drawing; ValueError in one line if it is ragged, open, or lacks a start or a goal."""
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
    return Maze(name, cells, cell_size)


def load(name: str, cell_size: float) -> Maze:
    """The maze drawn under `name`; KeyError if there is none."""
    return parse(DRAWINGS[name], name, cell_size)


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
    rows, columns = maze.is_wall.shape
    axes.set_xlim(-0.5 * maze.cell_size, (rows - 0.5) * maze.cell_size)
    axes.set_ylim(-0.5 * maze.cell_size, (columns - 0.5) * maze.cell_size)
    axes.set_aspect("equal")


def _rectangle(*args):
    from matplotlib.patches import Rectangle  # envs run without matplotlib

    return Rectangle(*args, facecolor="0.35", edgecolor="none")
