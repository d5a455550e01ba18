"""OGBench's point mazes: physics against MuJoCo, maps, tasks, and the scripted expert against other measurements."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import ogbench_point
from envs.ogbench_point import PointMaze

ROLLOUTS, STEPS = 200, 40


def mujoco_model(maze) -> mujoco.MjModel:
    """A sphere on two slides, and a box for each cell of wall, by the fact sheet."""
    walls = "".join(
        f'<geom type="box" size="2 2 2" pos="{x} {y} 2" conaffinity="1"/>'
        for x, y in maze.at(np.argwhere(maze.is_wall))
    )
    return mujoco.MjModel.from_xml_string(f"""
        <mujoco>
          <option timestep="0.02" integrator="RK4"/>
          <default><geom condim="3" conaffinity="0" friction="1 0.5 0.5" density="100"/></default>
          <worldbody>
            <geom type="plane" size="100 100 .2" conaffinity="1"/>{walls}
            <body>
              <geom type="sphere" size="0.7" pos="0 0 0.7"/>
              <joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 1 0"/>
            </body>
          </worldbody>
        </mujoco>""")


@pytest.fixture(scope="module")
def medium():
    return PointMaze("medium")


def one_step(env):
    return jax.jit(jax.vmap(lambda position, action: env.step(env.place(position, jnp.zeros(2)), action).observation))


def test_a_wall_gives_way_as_in_an_independent_measurement(medium):
    step, position = one_step(medium), jnp.array([[5.0, 0.0]])
    pushed, let_go = [5.2, 5.317722, 5.338584, 5.342281, 5.342936, 5.343052], [5.307629, 5.301352, 5.300240]
    for wanted in pushed:
        position = step(position, jnp.array([[1.0, 0.0]]))
        assert position[0, 0] == pytest.approx(wanted, abs=1e-5)
    for _ in range(20):
        position = step(position, jnp.array([[1.0, 0.0]]))
    assert position[0, 0] == pytest.approx(5.343077, abs=1e-5)
    for wanted in let_go:
        position = step(position, jnp.zeros((1, 2)))
        assert position[0, 0] == pytest.approx(wanted, abs=1e-5)


def test_steps_are_mujocos_in_the_open_and_at_one_box_and_near_it_at_several(medium):
    """From MuJoCo's own states. Where the robot touches several boxes at once MuJoCo has several contacts, each with
    friction: at the seam of two cells and in corners it differs by up to 7 cm."""
    model = mujoco_model(medium.maze)
    data, random = mujoco.MjData(model), np.random.default_rng(0)
    positions = medium.centres[random.integers(len(medium.centres), size=ROLLOUTS)]
    positions, step = positions + random.uniform(-1, 1, (ROLLOUTS, 2)), one_step(medium)
    cells = medium.maze.at(np.argwhere(medium.maze.is_wall))
    errors = {"open": [], "one face": [], "one end": [], "several": []}
    for t in range(STEPS):
        if t % 10 == 0:
            heading = random.normal(size=(ROLLOUTS, 2))
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        actions = np.clip(heading + 0.5 * random.normal(size=(ROLLOUTS, 2)), -1, 1)
        ours = np.asarray(step(jnp.float32(positions), jnp.float32(actions)))
        for i in range(ROLLOUTS):
            data.qpos[:], data.qvel[:] = positions[i] + 0.2 * actions[i], 0
            away = data.qpos - np.clip(data.qpos, cells - 2, cells + 2)
            away = away[np.linalg.norm(away, axis=1) < 0.7]
            mujoco.mj_step(model, data, 5)
            kind = ("open", "one face", "several")[min(len(away), 2)]
            if len(away) == 1 and (np.abs(away) > 1e-9).all():
                kind = "one end"
            errors[kind].append(np.abs(ours[i] - data.qpos).max())
            positions[i] = data.qpos
    counts = {kind: len(found) for kind, found in errors.items()}
    assert counts["one face"] > 500 and counts["several"] > 100 and counts["one end"] > 10, counts
    largest = {kind: max(found) for kind, found in errors.items()}
    assert max(largest[kind] for kind in ("open", "one face", "one end")) < 2e-5, largest
    assert largest["several"] < 0.1, largest


@pytest.mark.parametrize(
    ("layout", "free", "vertices"), [("medium", 26, 21), ("large", 46, 22), ("giant", 86, 46), ("teleport", 45, 24)]
)
def test_maps_tasks_and_ways(layout, free, vertices):
    env = envs.make(f"pointmaze_{layout}")
    rows = ogbench_point.MAPS[layout].split()
    assert (len(env.centres), len(env.vertices)) == (free, vertices)
    cells = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell == "."]
    at = lambda cell: (4 * cell[1] - 4, 4 * cell[0] - 4)
    number = {tuple(xy): n for n, xy in enumerate(env.centres.tolist())}
    assert set(number) == set(map(at, cells))
    for start in cells:
        found, queue = {start: 0}, deque([start])
        while queue:
            i, j = queue.popleft()
            for after in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if rows[after[0]][after[1]] == "." and after not in found:
                    found[after] = found[i, j] + 1
                    queue.append(after)
        for end, length in found.items():
            assert env.distances[number[at(start)], number[at(end)]] == length
    for task, (start, goal) in enumerate(ogbench_point.TASKS[layout]):
        state = env.begin(jnp.int32(task), jax.random.key(task))
        assert np.abs(state.observation - np.array(at(start))).max() <= 1
        assert np.abs(state.goal - np.array(at(goal))).max() <= 1
        assert rows[start[0]][start[1]] == rows[goal[0]][goal[1]] == "."


def test_a_goal_is_reached_within_1_of_it(medium):
    for x, reward in ((0.9, 1), (1.3, 0)):
        state = medium.step(medium.place(jnp.array([x, 0.0]), jnp.zeros(2)), jnp.zeros(2))
        assert state.reward == reward and not state.terminated


def test_a_teleport_leads_to_each_exit_as_often():
    env = PointMaze("teleport")
    entry = env._at(ogbench_point.TELEPORTS[0])[0]
    positions = entry + np.random.default_rng(0).uniform(-0.9, 0.9, (3000, 2))
    after = np.asarray(one_step(env)(jnp.float32(positions), jnp.zeros((3000, 2))))
    exits, counts = np.unique(after, axis=0, return_counts=True)
    assert {tuple(x) for x in exits} == {tuple(x) for x in env._at(ogbench_point.TELEPORTS[1])}
    assert np.abs(counts - 1000).max() < 100
    far = entry + np.array([2.0, 0])
    assert np.linalg.norm(one_step(env)(jnp.float32(far[None]), jnp.zeros((1, 2)))[0] - far) < 0.5


CONTROL = {"medium": (1000, 8.7, 103), "large": (1000, 5.2, 194), "giant": (2000, 7.1, 240)}
"""Steps of an episode, goals reached in it, steps to the first: the fact sheet's, from few episodes."""


@pytest.mark.parametrize("layout", CONTROL)
def test_the_expert_does_as_an_independent_measurement_found(layout):
    length, goals, first = CONTROL[layout]
    env = PointMaze(layout)
    demonstrate = jax.jit(jax.vmap(partial(env.demonstration, "navigate", length)))
    seen, actions, arrived = map(np.asarray, demonstrate(jax.random.split(jax.random.key(0), 128)))
    assert seen.shape == (128, length + 1, 2) and np.isfinite(seen).all()
    arrived = arrived[:, :-1]
    assert arrived.sum(axis=1).mean() == pytest.approx(goals, rel=0.1)
    assert (1 + arrived.argmax(axis=1))[arrived.any(axis=1)].mean() == pytest.approx(first, rel=0.2)
    assert actions.std(axis=(0, 1)) == pytest.approx(0.70, abs=0.02)
    assert np.abs(actions).mean() == pytest.approx(0.615, abs=0.01)
    assert (np.abs(actions) == 1).mean() == pytest.approx(0.27, abs=0.01)
    moved = np.linalg.norm(np.diff(seen, axis=1), axis=2).max()
    assert moved <= 0.2 * 2**0.5 + 0.05, "a step, and what a wall gives back"


def test_what_is_to_be_stitched_are_ways_of_four_cells(medium):
    demonstrate = jax.jit(jax.vmap(partial(medium.demonstration, "stitch", 200)))
    seen, _, arrived = map(np.asarray, demonstrate(jax.random.split(jax.random.key(0), 1024)))
    arrived = arrived[:, :-1]
    assert (1 + arrived.argmax(axis=1))[arrived.any(axis=1)].mean() == pytest.approx(78, abs=3)
    assert 1 - arrived.any(axis=1).mean() == pytest.approx(0.025, abs=0.012)
    ends = np.linalg.norm(seen[:, -1] - seen[:, -30], axis=1)
    assert np.median(ends) < 1, "it stays"
