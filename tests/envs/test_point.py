import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import envs
from envs import mazes, point

TRAINING_LAYOUTS = [name for name in mazes.DRAWINGS if not name.endswith("_eval")]
"""The others have the same walls (test_mazes.py)."""


def gap(cells: tuple[str, ...], positions: np.ndarray) -> np.ndarray:
    """Distance from each position to the nearest wall cell, a unit square; negative inside one."""
    nearest = np.full(positions.shape[:-1], np.inf)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell == "#":
                outside = np.abs(positions.astype(np.float64) - (i, j)) - 0.5
                distance = np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(-1), 0)
                nearest = np.minimum(nearest, distance)
    return nearest


def at(state: envs.GoalState, position) -> envs.GoalState:
    position = jnp.asarray(position, jnp.float32)
    return state._replace(physics=position, observation=position)


def rollout(env: point.PointMaze, starts, actions, goal=(1.0, 1.0)) -> envs.GoalState:
    """States after each action: `starts` (robots, 2), `actions` (robots, time, 2)."""
    template = env.reset(jax.random.key(0))._replace(goal=jnp.array(goal))

    def one(start, sequence):
        def step(state, action):
            state = env.step(state, action)
            return state, state

        return jax.lax.scan(step, at(template, start), sequence)[1]

    starts, actions = jnp.asarray(starts, jnp.float32), jnp.asarray(actions, jnp.float32)
    return jax.device_get(jax.jit(jax.vmap(one))(starts, actions))


def resets(env: point.PointMaze, count: int) -> envs.GoalState:
    return jax.device_get(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), count)))


@pytest.mark.parametrize("layout", TRAINING_LAYOUTS)
def test_robot_never_overlaps_a_wall(layout):
    env, robots, length = envs.make(f"point_{layout}"), 400, 200
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, np.array(env.maze.is_wall.shape), (100 * robots, 2)).astype(np.float32)
    starts = starts[gap(env.maze.cells, starts) > point.ROBOT_RADIUS][:robots]
    assert len(starts) == robots
    # a quarter each: noise, one direction held throughout, a direction held for ten steps, full speed along both axes
    noise = rng.uniform(-2, 2, (100, length, 2))
    held = rng.uniform(-2, 2, (100, 1, 2)).repeat(length, axis=1)
    changing = rng.uniform(-2, 2, (100, length // 10, 2)).repeat(10, axis=1)
    diagonal = rng.choice([-1.0, 1.0], (100, length // 5, 2)).repeat(5, axis=1)
    path = rollout(env, starts, np.concatenate([noise, held, changing, diagonal])).observation
    assert np.isfinite(path).all()
    assert gap(env.maze.cells, path).min() > point.ROBOT_RADIUS - 1e-5


def test_full_speed_into_a_convex_corner_stays_outside():
    """Seen from a corner a diagonal step is sqrt(2) times as long as one along an axis."""
    env = envs.make("point_u_maze")
    corner = np.array([1.5, 2.5])  # of the wall cell (2, 2), which ends the wall between the two corridors
    angles = np.linspace(np.pi / 2, np.pi, 91)
    away = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    starts = corner + (point.ROBOT_RADIUS + 1e-6) * away
    assert gap(env.maze.cells, starts).min() > point.ROBOT_RADIUS - 1e-6
    for action in (-away / np.abs(away).max(axis=1, keepdims=True), np.full_like(away, [1, -1])):
        path = rollout(env, starts, action[:, None].repeat(3, axis=1)).observation
        assert gap(env.maze.cells, path).min() > point.ROBOT_RADIUS - 1e-5


def test_away_from_walls_an_action_is_a_velocity():
    env, start = envs.make("point_u_maze"), np.array([1.0, 2.0])
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 1, 2))
    path = rollout(env, start[None].repeat(50, axis=0), actions)
    moved = path.observation[:, 0] - start
    np.testing.assert_allclose(moved, point.SPEED * actions[:, 0], atol=1e-6)
    np.testing.assert_array_equal(path.terminated, False)


def test_action_is_clipped_to_the_unit_square():
    actions = np.array([[[3, -7]], [[1, -1]], [[-1.01, 0.5]], [[-1, 0.5]]])
    after = rollout(envs.make("point_u_maze"), np.full((4, 2), (1.0, 2.0)), actions).observation[:, 0]
    np.testing.assert_array_equal(after[0], after[1])
    np.testing.assert_array_equal(after[2], after[3])


@pytest.mark.parametrize("across, along", itertools.product([-1, -0.4], [0.5, 1]))
def test_robot_slides_along_a_wall(across, along):
    """The upper corridor of u_maze has its outer wall at x = 0.5; y runs along it, past the cells' borders."""
    steps = int(1.5 / (point.SPEED * along))
    touching = 0.5 + point.ROBOT_RADIUS
    path = rollout(envs.make("point_u_maze"), [[touching, 1.0]], np.full((1, steps, 2), (across, along))).observation[0]
    np.testing.assert_allclose(path[:, 0], touching, atol=1e-5)
    np.testing.assert_allclose(path[:, 1], 1 + point.SPEED * along * np.arange(1, steps + 1), atol=1e-5)


def test_robot_rests_in_an_inner_corner():
    path = rollout(envs.make("point_u_maze"), [[1.0, 1.0]], np.full((1, 20, 2), -1.0)).observation[0]
    np.testing.assert_allclose(path[-5:], 0.5 + point.ROBOT_RADIUS, atol=1e-5)


@pytest.mark.parametrize("layout", ["u_maze", "u4_maze_eval", "hardest_maze"])
def test_resets_lie_in_the_jitter_square_of_a_start_and_a_goal_cell(layout):
    env = envs.make(f"point_{layout}")
    states = resets(env, 4000)
    for points, kind in ((states.observation, "R"), (states.goal, "G")):
        centres = np.round(points)
        drawn = set(map(tuple, centres.astype(int).tolist()))
        assert drawn == set(zip(*np.nonzero(np.array([list(row) for row in env.maze.cells]) == kind)))
        offset = points - centres
        assert np.abs(offset).max() <= point.JITTER
        for axis in (0, 1):
            assert stats.kstest(offset[:, axis], stats.uniform(-point.JITTER, 2 * point.JITTER).cdf).pvalue > 0.001
    np.testing.assert_array_equal(states.reward, 0)
    np.testing.assert_array_equal(states.terminated, False)


@pytest.mark.parametrize("layout", ["u_maze", "big_maze", "hardest_maze"])
def test_goals_are_uniform_over_goal_cells(layout):
    env, count = envs.make(f"point_{layout}"), 4500
    expected = {"u_maze": 6, "big_maze": 25, "hardest_maze": 45}[layout]
    for goals in (resets(env, count).goal, jax.vmap(env.sample_goal)(jax.random.split(jax.random.key(2), count))):
        drawn = np.unique(np.round(goals), axis=0, return_counts=True)[1]
        assert len(drawn) == expected
        assert stats.chisquare(drawn).pvalue > 0.001


def test_starts_are_uniform_over_start_cells(monkeypatch):
    monkeypatch.setitem(mazes.DRAWINGS, "three_starts", "####### #RRGGR# #######")
    ys = np.round(resets(envs.make("point_three_starts"), 3000).observation[:, 1])
    values, drawn = np.unique(ys, return_counts=True)
    np.testing.assert_array_equal(values, [1, 2, 5])
    assert stats.chisquare(drawn).pvalue > 0.001


def test_start_and_goal_are_drawn_independently():
    states = resets(envs.make("point_u_maze"), 4000)
    offset = np.concatenate([states.observation - np.round(states.observation), states.goal - np.round(states.goal)], 1)
    np.testing.assert_allclose(np.corrcoef(offset.T), np.eye(4), atol=0.06)


def test_reward_is_1_exactly_within_the_success_radius():
    env, goal = envs.make("point_u_maze"), np.array([1.0, 2.0])
    rng = np.random.default_rng(0)
    angle, radius = rng.uniform(0, 2 * np.pi, 300), rng.uniform(0, 0.5, 300)
    radius[:100] = env.success_radius + np.repeat([-1e-4, 1e-4], 50)
    starts = goal + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    starts = starts.astype(np.float32)
    starts, radius = (a[gap(env.maze.cells, starts) > point.ROBOT_RADIUS + 1e-3] for a in (starts, radius))
    states = rollout(env, starts, np.zeros((len(starts), 1, 2)), goal)
    assert 50 < (radius < env.success_radius).sum() < len(radius) - 50
    np.testing.assert_array_equal(states.reward[:, 0], radius < env.success_radius)
    np.testing.assert_allclose(jax.jit(env.distance)(states)[:, 0], radius, atol=1e-6)


def test_reward_is_of_the_position_after_the_step():
    env, goal = envs.make("point_u_maze"), np.array([1.0, 2.0])
    start = goal - (0, env.success_radius + point.SPEED / 2)
    states = rollout(env, [start], [[(0, 1), (0, -1)]], goal)
    np.testing.assert_array_equal(states.reward[0], [1, 0])


def test_a_film_ends_soon_after_the_last_robot_that_arrives(tmp_path):
    env = envs.make("point_u_maze")
    up, still = [(0, 1)] * 60, [(0, 0)] * 60
    states = rollout(env, [(1, 1), (1, 2), (1, 1)], [up, still, still], goal=(1.0, 2.0))
    assert states.reward[0].argmax() == 2 and not states.reward[2].any()
    path = env.render(states, str(tmp_path / "film"), ("mean actions", "mean actions", "sampled actions"))
    with Image.open(path) as film:
        assert film.info["duration"] > 0 and 5 < film.n_frames < 20
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB")).astype(int)
    # the first two are there, filled, and the third, hollow, is where it was
    assert (np.abs(last - (31, 119, 180)).sum(axis=-1) < 30).sum() > 50
    green = np.abs(last - (44, 160, 44)).sum(axis=-1) < 60
    assert 5 < green.sum() < 100


def test_sizes_are_as_declared():
    env = envs.make("point_u_maze")
    state = env.reset(jax.random.key(0))
    assert (env.observation_size, env.action_size, env.goal_indices) == (2, 2, (0, 1))
    assert state.observation.shape == state.goal.shape == (2,)
    np.testing.assert_array_equal(env.achieved_goal(jnp.array([3.0, 4.0])), [3, 4])


def brute_force_image(env: point.PointMaze, position) -> np.ndarray:
    """A red disc on grey floor between black walls, pixel by pixel, each from 32 x 32 points in it."""
    cells = env.maze.cells
    scale = max(len(cells), len(cells[0])) / 64
    image = np.zeros((64, 64, 3))
    fine = (np.arange(32) + 0.5) / 32
    for row in range(64):
        for column in range(64):
            x, y = (column + 0.5) * scale - 0.5, (63.5 - row) * scale - 0.5
            i, j = round(x), round(y)
            floor = i < len(cells) and j < len(cells[0]) and cells[i][j] != "#"
            at = np.stack(np.meshgrid(x + (fine - 0.5) * scale, y + (fine - 0.5) * scale), axis=-1)
            covered = np.mean(np.linalg.norm(at - position, axis=-1) < point.ROBOT_RADIUS)
            image[row, column] = (1 - covered) * 127 * floor + covered * np.array([255, 0, 0])
    return image


@pytest.mark.parametrize("layout", ["u_maze", "u4_maze"])
def test_pixels_show_the_maze_the_robot_and_the_goal(layout):
    env = envs.make(f"point_{layout}_pixels")
    state = jax.jit(env.place)(jnp.array([1.1, 2.93]), jnp.array([3.0, 1.2]))
    for shown, position in ((state.observation, (1.1, 2.93)), (state.goal, (3.0, 1.2))):
        assert shown.dtype == jnp.uint8 and shown.shape == (env.observation_size,)
        image = np.asarray(shown, float).reshape(env.image_shape)
        # away from the disc's edge to the byte; there to a tenth of the contrast
        expected = brute_force_image(env, np.array(position))
        assert np.abs(image - expected).max() < 26 and np.mean(np.abs(image - expected) < 1) > 0.99


def test_pixels_are_the_same_task(tmp_path):
    """Starts, goals, steps, rewards and distances are those of the maze without images."""
    env, seen = envs.make("point_u4_maze"), envs.make("point_u4_maze_pixels")
    keys = jax.random.split(jax.random.key(2), 300)
    (reset, step), (see, act) = ([jax.jit(jax.vmap(f)) for f in (each.reset, each.step)] for each in (env, seen))
    state, image = reset(keys), see(keys)
    toward = state.goal - state.observation
    action = toward / jnp.linalg.norm(toward, axis=1, keepdims=True)
    for _ in range(3):
        np.testing.assert_allclose(seen.position(image.observation), state.observation, atol=0.007)
        np.testing.assert_allclose(seen.position(image.goal), state.goal, atol=0.007)
        np.testing.assert_allclose(jax.vmap(seen.distance)(image), jax.vmap(env.distance)(state), atol=0.014)
        state, image = step(state, action), act(image, action)
    np.testing.assert_array_equal(image.physics, state.physics)
    clear = np.abs(jax.vmap(env.distance)(state) - env.success_radius) > 0.014
    assert state.reward.sum() > 2
    np.testing.assert_array_equal(image.reward[clear], state.reward[clear])
    goal = jax.vmap(seen.sample_goal)(keys)
    np.testing.assert_allclose(seen.position(goal), jax.vmap(env.sample_goal)(keys), atol=0.007)
    assert envs.far_goals("point_u4_maze_pixels") == "point_u4_maze_eval_pixels"
    assert "point_big_maze_pixels" in envs.names()
    assert envs.make("point_u_maze_gen_1f2f3f_pixels").maze.name == "u_maze_gen_1f2f3f"


@pytest.mark.parametrize("name", ["point_goal_pixels", "point_u_maze_pixels_pixels", "point_nonsense_pixels"])
def test_there_are_no_other_pixels(name):
    with pytest.raises(ValueError, match=f"unknown environment '{name}'; did you mean"):
        envs.make_kind(name, envs.GoalEnv)


def test_a_film_of_pixels_has_the_goal_beside_the_observation(tmp_path):
    env = envs.make("point_u_maze_pixels")
    walk = jax.vmap(lambda x: env.place(jnp.stack([1 + 0 * x, 1 + x / 10]), jnp.array([1.0, 1.5])))(jnp.arange(9.0))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), walk)
    with Image.open(env.render(states, str(tmp_path / "film"), ("mean actions", "sampled actions"))) as film:
        assert film.n_frames == 8  # five after it came within the radius
        film.seek(film.n_frames - 1)
        frame = np.asarray(film.convert("RGB")).astype(int)
    assert frame.shape == (168, 552, 3)
    for left, image in ((8, walk.observation[7]), (140, walk.goal[7])):
        shown = frame[32:160:2, left : left + 128 : 2]
        assert np.abs(shown - np.asarray(image, int).reshape(64, 64, 3)).mean() < 3
