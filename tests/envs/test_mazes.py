import re
from collections import deque

import jax
import numpy as np
import pytest
from scipy import stats

import envs
from envs import mazes

# The published layouts, copied as they stand in the reference sheet: a line of names, and the drawings under them.
PUBLISHED = """
u_maze      u_maze_eval  u_maze_single_eval   big_maze   big_maze_eval     big_maze_jaxgcrl_eval
#####       #####        #####                ########   ########          ########
#RGG#       #R..#        #R..#                #RG##GG#   #R.##GG#          #R.##GG#
###G#       ###.#        ###.#                #GG#GGG#   #..#..G#          #..#.GG#
#GGG#       #GGG#        #G..#                ##GGG###   ##...###          ##...###
#####       #####        #####                #GG#GGG#   #..#...#          #..#...#
                                              #G#GG#G#   #.#G.#G#          #.#G.#G#
                                              #GGG#GG#   #.GG#GG#          #.GG#GG#
                                              ########   ########          ########
u4_maze     u4_maze_eval   u5_maze    u5_maze_eval   u5_maze_single_eval   hardest_maze
#####       #####          ########   ########       ########              ############
#GGG#       #...#          #GGGGGG#   #......#       #......#              #RGGG#GGGGG#
#R#G#       #R#.#          #R####G#   #R####.#       #R####.#              #G##G#G#G#G#
###G#       ###.#          ######G#   ######.#       ######.#              #GGGGGG#GGG#
#G#G#       #G#.#          #G####G#   #G####G#       #G####.#              #G####G###G#
#GGG#       #GGG#          #GGGGGG#   #GGGGGG#       #......#              #GG#G#GGGGG#
#####       #####          ########   ########       ########              ##G#G#G#G###
                                                                           #GG#GGG#GGG#
                                                                           ############
u2_maze   u2_maze_eval  u3_maze   u3_maze_eval  u3_maze_single_eval  u6_maze   u6_maze_eval  u7_maze  u7_maze_eval
######    ######        #######   #######       #######              #######   #######       ######   ######
#RGGG#    #R...#        #RGGGG#   #R....#       #R....#              #GGGGG#   #.....#       #GGGG#   #....#
####G#    ####.#        #####G#   #####.#       #####.#              #R###G#   #R###.#       #R##G#   #R##.#
#GGGG#    #GGGG#        #GGGGG#   #GGGGG#       #G....#              #####G#   #####.#       ####G#   ####.#
######    ######        #######   #######       #######              #G###G#   #G###G#       #G##G#   #G##G#
                                                                     #GGGGG#   #GGGGG#       #GGGG#   #GGGG#
                                                                     #######   #######       ######   ######
"""


def published() -> dict[str, tuple[str, ...]]:
    layouts, columns = {}, {}
    for line in PUBLISHED.strip("\n").split("\n"):
        words = {word.start(): word.group() for word in re.finditer(r"\S+", line)}
        if "_maze" in line:
            columns = words
            layouts |= {name: () for name in words.values()}
        else:
            for column, row in words.items():
                layouts[columns[column]] += (row,)
    return layouts


def find(cells: tuple[str, ...], kinds: str) -> set[tuple[int, int]]:
    return {(i, j) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell in kinds}


def path_lengths(cells: tuple[str, ...]) -> dict[tuple[int, int], int]:
    """Cells that can be reached from a start, with the number of moves to a neighbouring cell this takes."""
    lengths = dict.fromkeys(find(cells, "R"), 0)
    queue = deque(lengths)
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cells[cell[0]][cell[1]] != "#" and cell not in lengths:
                lengths[cell] = lengths[i, j] + 1
                queue.append(cell)
    return lengths


def as_cells(points: np.ndarray, cell_size: float) -> set[tuple[int, int]]:
    return {tuple(np.round(point / cell_size).astype(int).tolist()) for point in points}


def test_published_layouts_are_all_here():
    layouts = published()
    assert len(layouts) == 21
    assert {name: mazes.load(name, 1.0).cells for name in layouts} == layouts


@pytest.mark.parametrize(
    "name, goals",
    [
        ("u_maze", 6),
        ("u4_maze", 10),
        ("u5_maze", 16),
        ("big_maze", 25),
        ("hardest_maze", 45),
        ("u_maze_eval", 3),
        ("u4_maze_eval", 4),
        ("u5_maze_eval", 8),
        ("big_maze_eval", 9),
    ],
)
def test_number_of_goals(name, goals):
    assert mazes.load(name, 4.0).positions("G").shape == (goals, 2)


@pytest.mark.parametrize(
    "name, boxes, at_most_when_merged",
    [("u_maze", 18, 6), ("u4_maze", 24, 6), ("u5_maze", 39, 6), ("big_maze", 38, 12), ("hardest_maze", 62, 16)],
)
def test_number_of_wall_boxes(name, boxes, at_most_when_merged):
    maze = mazes.load(name, 4.0)
    assert maze.wall_boxes(merged=False).shape == (boxes, 4)
    assert len(maze.wall_boxes(merged=True)) <= at_most_when_merged


@pytest.mark.parametrize("name", [name for name in mazes.DRAWINGS if name.endswith("_eval")])
def test_eval_layout_differs_from_training_in_goals_only(name):
    training, evaluation = (mazes.load(n, 1.0).cells for n in (name[: name.index("_maze") + len("_maze")], name))
    assert find(evaluation, "#") == find(training, "#")
    assert find(evaluation, "R") == find(training, "R")
    assert find(evaluation, "G") != find(training, "G")


@pytest.mark.parametrize("distances", ["1f2f3f", "1f2f3f4f", "1f2f3f4f5f", "5f6f"])
def test_goals_of_partial_evals_lie_at_the_named_path_lengths(distances):
    cells = mazes.load(f"u_maze_{distances}_eval", 1.0).cells
    lengths = path_lengths(cells)
    assert sorted(lengths[goal] for goal in find(cells, "G")) == [int(d) for d in distances.split("f")[:-1]]


@pytest.mark.parametrize("name", mazes.DRAWINGS)
def test_starts_and_goals_are_free_and_connected(name):
    maze = mazes.load(name, 4.0)
    walls, starts, goals = (as_cells(maze.positions(kind), 4.0) for kind in "#RG")
    assert len(starts) >= 1 and len(goals) >= 1
    assert not walls & (starts | goals)
    assert goals <= path_lengths(maze.cells).keys()


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", mazes.DRAWINGS)
def test_boxes_cover_the_wall_cells_and_no_more(name, merged):
    maze, size, fine = mazes.load(name, 4.0), 4.0, 8
    rows, columns = len(maze.cells), len(maze.cells[0])
    # points inside fine x fine parts of every cell, and of a margin of one cell around the maze
    x = (np.arange(-fine, (rows + 1) * fine) + 0.5) / fine * size - size / 2
    y = (np.arange(-fine, (columns + 1) * fine) + 0.5) / fine * size - size / 2
    covered = np.zeros((len(x), len(y)), bool)
    for centre_x, centre_y, half_x, half_y in maze.wall_boxes(merged).tolist():
        covered |= (np.abs(x - centre_x) < half_x)[:, None] & (np.abs(y - centre_y) < half_y)[None]
    wall = np.zeros((rows + 2, columns + 2), bool)
    for i, j in find(maze.cells, "#"):
        wall[i + 1, j + 1] = True
    np.testing.assert_array_equal(covered, wall.repeat(fine, axis=0).repeat(fine, axis=1))


def test_rows_run_along_x_and_columns_along_y():
    maze = mazes.parse("##### #R.G# ##.## #####", "tee", cell_size=4.0)
    np.testing.assert_array_equal(maze.positions("R"), [[4, 4]])
    np.testing.assert_array_equal(maze.positions("G"), [[4, 12]])
    np.testing.assert_array_equal(maze.positions("."), [[4, 8], [8, 8]])
    np.testing.assert_array_equal(maze.wall_boxes(merged=False)[5], [4, 0, 2, 2])


def test_is_wall_marks_the_wall_cells():
    maze = mazes.parse("##### #R.G# ##.## #####", "tee", cell_size=4.0)
    np.testing.assert_array_equal(maze.is_wall, [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "drawing, complaint",
    [
        ("#### #RG## ####", "rows of different lengths [4, 5, 4]"),
        ("##### #RxG# #####", "unknown cells 'x'"),
        ("#### #.G# ####", "start R"),
        ("#### #R.# ####", "goal G"),
        ("##.# #RG# ####", "border is open"),
        ("#### #RG# #.##", "border is open"),
        ("#### .RG# ####", "border is open"),
        ("#### #RG. ####", "border is open"),
        ("#### #R#G ####", "border is open"),
        ("##### #R#G# #####", "no way leads from an R to a G in ##### #R#G# #####"),
        ("##### #R### ##G.# #####", "no way"),
        ("####### #RG#GR# #######", "no way"),
    ],
)
def test_bad_drawing_is_refused_in_one_line(drawing, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        mazes.parse(drawing, "mine", 1.0)
    assert "'mine'" in str(error.value)
    assert "\n" not in str(error.value)


def test_new_drawing_becomes_an_environment_of_every_robot(monkeypatch):
    drawing = """
        #####
        #RRG#
        #####"""
    assert not {"point_mine", "ant_mine"} & set(envs.names())
    monkeypatch.setitem(mazes.DRAWINGS, "mine", drawing)
    assert {"point_mine", "ant_mine"} <= set(envs.names())
    env = envs.make("point_mine")
    assert env.name == "point_mine"
    assert env.maze.cells == ("#####", "#RRG#", "#####")


U5_CORRIDOR = [(2, 1), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6)]
U5_CORRIDOR += [(5, 5), (5, 4), (5, 3), (5, 2), (5, 1), (4, 1)]


def pairs(maze: mazes.Maze, count: int) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(0), (count, 2))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: maze.sample(key[0], key[1])))(keys))


def test_a_corridor_runs_from_the_start_to_the_far_end():
    np.testing.assert_array_equal(mazes.load("u5_maze", 4.0).corridor() / 4, U5_CORRIDOR)
    for name in ("u_maze", "u2_maze", "u3_maze", "u4_maze"):
        maze = mazes.load(name, 1.0)
        corridor = [tuple(cell) for cell in maze.corridor().astype(int).tolist()]
        lengths = path_lengths(maze.cells)
        assert [lengths[cell] for cell in corridor] == list(range(len(lengths)))
        if f"{name}_single_eval" in mazes.DRAWINGS:
            assert {corridor[-1]} == find(mazes.load(f"{name}_single_eval", 1.0).cells, "G")


@pytest.mark.parametrize("name", ["big_maze", "hardest_maze"])
def test_a_maze_that_is_no_corridor_has_no_stitching_task(name):
    with pytest.raises(ValueError, match="not one corridor that begins at R"):
        mazes.load(f"{name}_gen_1f2f3f", 1.0)


@pytest.mark.parametrize("row", ["#GRG#", "#RRG#", "#RG#."])
def test_a_corridor_that_does_not_begin_at_the_start_is_refused(row):
    maze = mazes.parse(f"###### {row}# ######", "mine", 1.0)
    with pytest.raises(ValueError, match="'mine' is not one corridor that begins at R"):
        maze.corridor()


def test_stitching_pairs_are_uniform_over_the_distances_and_then_over_the_forward_pairs():
    start, goal = (x / 4 for x in pairs(mazes.load("u5_maze_gen_1f3f16f", 4.0), 6000))
    place = {cell: index for index, cell in enumerate(U5_CORRIDOR)}
    index = np.array([[place[tuple(cell)] for cell in x.astype(int).tolist()] for x in (start, goal)])
    distance = index[1] - index[0]
    values, counts = np.unique(distance, return_counts=True)
    assert values.tolist() == [1, 3, 16]
    assert stats.chisquare(counts).pvalue > 0.001
    for value, number_of_pairs in ((1, 16), (3, 14)):
        starts, counts = np.unique(index[0][distance == value], return_counts=True)
        assert starts.tolist() == list(range(number_of_pairs))
        assert stats.chisquare(counts).pvalue > 0.001
    assert set(index[0][distance == 16]) == {0}


def test_goals_alone_have_the_distribution_of_the_goals_of_pairs():
    maze = mazes.load("u_maze_gen_1f2f3f", 1.0)
    alone = np.asarray(jax.jit(jax.vmap(maze.sample_goal))(jax.random.split(jax.random.key(1), 4000)))
    counts = [np.unique(goals, axis=0, return_counts=True) for goals in (alone, pairs(maze, 4000)[1])]
    np.testing.assert_array_equal(counts[0][0], counts[1][0])
    assert stats.chi2_contingency([counts[0][1], counts[1][1]]).pvalue > 0.001


def test_ordinary_pairs_are_starts_and_goals_of_the_drawing():
    start, goal = pairs(mazes.parse("##### #RRG# #G.G# #####", "mine", 2.0), 4000)
    for points, cells in ((start, [(1, 1), (1, 2)]), (goal, [(1, 3), (2, 1), (2, 3)])):
        found, counts = np.unique(points / 2, axis=0, return_counts=True)
        assert found.tolist() == [list(cell) for cell in cells]
        assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("suffix", ["", "f", "1", "1f2", "0f", "7f", "1f1f", "1g", "-1f", "1f,2f"])
def test_bad_distances_are_refused_in_one_line(suffix):
    with pytest.raises(ValueError, match="is no list of distances; write each, from 1 to 6, once") as error:
        mazes.load(f"u_maze_gen_{suffix}", 1.0)
    assert "\n" not in str(error.value)


def test_unknown_maze_is_answered_with_the_nearest():
    for name in ("u44_maze", "u44_maze_gen_1f"):
        with pytest.raises(ValueError, match="unknown maze 'u44_maze'; did you mean u4_maze or ") as error:
            mazes.load(name, 1.0)
        assert "\n" not in str(error.value)


def test_stitching_tasks_are_environments_that_are_evaluated_on_the_far_goals():
    assert {"ant_u_maze_gen_1f2f3f", "point_u5_maze_gen_1f2f3f"} <= set(envs.names())
    assert envs.make("point_u_maze_gen_1f6f").maze.distances == (1, 6)  # any distances, listed or not
    assert envs.far_goals("ant_u_maze_gen_1f2f3f") == envs.far_goals("ant_u_maze") == "ant_u_maze_eval"
    assert envs.far_goals("ant") is None and envs.far_goals("ant_hardest_maze") is None
