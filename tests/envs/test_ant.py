"""The numbers are those of the published code (the golden rollouts were run on brax 0.10.1 and 0.14.2)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import envs
from envs import mazes
from envs.ant import Ant, AntRandomStart

POSE = np.float32([0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1])
FAR = np.float32([6, 8])
GOLDEN_OPEN = [0.14083, -1.11627, 0.82579, 0.88609, -0.38841, 0.07986, 0.24000]
GOLDEN_OPEN += [-0.28318, 1.50488, 0.48868, -1.39049, -0.53313, -0.54893, 0.57054, 0.30705]


def compiled(env: Ant) -> SimpleNamespace:
    return SimpleNamespace(env=env, state_at=jax.jit(env.state_at), step=jax.jit(env.step))


@pytest.fixture(scope="module")
def open_ant():
    return compiled(Ant(None))


@pytest.fixture(scope="module", params=[None, "u_maze"], ids=["open", "u_maze"])
def resets(request):
    env = Ant(request.param)
    return env, jax.device_get(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 512)))


def state(ant, x=0.0, y=0.0, z=0.55, goal=FAR):
    q = POSE.copy()
    q[:3] = x, y, z
    return ant.state_at(jnp.asarray(q), jnp.zeros(14), jnp.asarray(goal, jnp.float32))


def test_golden_rollout(open_ant):
    """Those in a maze are in test_walls.py."""
    now = state(open_ant)
    for t in range(20):
        now = open_ant.step(now, jnp.array([np.sin(0.1 * (t + 1) * (k + 1)) for k in range(8)], jnp.float32))
    np.testing.assert_allclose(now.observation[:15], GOLDEN_OPEN, atol=1e-4)


def test_observation_is_pose_and_velocities(open_ant):
    q, qd = POSE + np.arange(15) / 100, np.arange(14) / 50
    now = open_ant.state_at(jnp.asarray(q), jnp.asarray(qd, jnp.float32), jnp.asarray(FAR))
    np.testing.assert_allclose(now.observation, np.concatenate([q, qd]), atol=1e-6)
    assert open_ant.env.observation_size == now.observation.shape[0] == 29
    assert open_ant.env.action_size == 8
    assert open_ant.env.goal_indices == (0, 1)
    np.testing.assert_allclose(open_ant.env.achieved_goal(now.observation), q[:2], atol=1e-6)


@pytest.mark.parametrize("z, terminated", [(0.19, True), (0.21, False), (0.55, False), (0.99, False), (1.01, True)])
def test_ant_below_20_cm_or_above_1_m_terminates(open_ant, z, terminated):
    assert state(open_ant, z=z).terminated == terminated


def test_step_terminates_by_the_height_after_it(open_ant):
    """A freely falling ant moves by about 1 cm in the first step."""
    for z, terminated in ((1.1, True), (1.004, False)):
        before = state(open_ant, z=z)
        after = open_ant.step(before, jnp.zeros(8))
        assert before.terminated and after.observation[2] < z
        assert after.terminated == terminated


def test_reward_is_1_within_half_a_metre_of_the_goal_after_the_step(open_ant):
    assert open_ant.env.success_radius == 0.5
    start = open_ant.state_at(jnp.asarray(POSE), jnp.zeros(14).at[0].set(2.0), jnp.asarray(FAR))
    x, y = np.asarray(open_ant.step(start, jnp.zeros(8)).observation[:2])
    assert x > 0.03
    for goal, reward in (((x + 0.49, y), 1), ((x + 0.51, y), 0), ((x - 0.49, y), 1), ((x - 0.4, y + 0.4), 0)):
        after = open_ant.step(start._replace(goal=jnp.asarray(goal, jnp.float32)), jnp.zeros(8))
        assert after.reward == reward
        np.testing.assert_array_equal(after.goal, np.float32(goal))


def test_reset_noise_is_uniform_on_the_pose_and_normal_on_the_velocities(resets):
    env, states = resets
    pose = POSE.copy()
    pose[:2] = (4, 4) if env.maze else (0, 0)
    noise, qd = states.observation[:, :15] - pose, states.observation[:, 15:]
    assert np.abs(noise).max() < 0.1 + 1e-6
    for k in range(15):  # all coordinates, those of the quaternion and of x, y too
        assert stats.kstest(noise[:, k], stats.uniform(-0.1, 0.2).cdf).pvalue > 0.001
    for k in range(14):
        assert stats.kstest(qd[:, k] / 0.1, "norm").pvalue > 0.001
    np.testing.assert_array_equal(states.reward, 0)
    np.testing.assert_array_equal(states.terminated, False)


def test_reset_draws_goals_from_the_goal_distribution(resets):
    env, states = resets
    if env.maze:
        assert set(map(tuple, states.goal.tolist())) == {(4, 8), (4, 12), (8, 12), (12, 4), (12, 8), (12, 12)}
    else:
        np.testing.assert_allclose(np.linalg.norm(states.goal, axis=1), 10, atol=1e-5)


def test_open_goals_are_uniform_on_a_circle_of_10_m():
    goals = jax.vmap(Ant(None).sample_goal)(jax.random.split(jax.random.key(3), 2000))
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 10, atol=1e-5)
    angle = np.arctan2(goals[:, 1], goals[:, 0])
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 0.001


def test_maze_goals_are_uniform_over_cell_centres():
    goals = jax.vmap(Ant("big_maze").sample_goal)(jax.random.split(jax.random.key(3), 2500))
    cells, drawn = np.unique(np.asarray(goals) / 4, axis=0, return_counts=True)
    assert set(map(tuple, cells.tolist())) == {
        (i, j) for i, row in enumerate(mazes.DRAWINGS["big_maze"].split()) for j, cell in enumerate(row) if cell == "G"
    }
    assert len(drawn) == 25
    assert stats.chisquare(drawn).pvalue > 0.001


@pytest.mark.parametrize("merged, boxes", [(True, range(1, 7)), (False, [24])])
def test_walls_stand_2_m_high_on_the_wall_cells(merged, boxes):
    model = Ant("u4_maze", merged).system.mj_model
    box = model.geom_type == 6
    position, half = model.geom_pos[box], model.geom_size[box]
    assert len(position) in boxes
    np.testing.assert_array_equal(position[:, 2], 1)
    np.testing.assert_array_equal(half[:, 2], 1)
    for i, row in enumerate(["#####", "#GGG#", "#R#G#", "###G#", "#G#G#", "#GGG#", "#####"]):
        for j, cell in enumerate(row):
            inside = (np.abs((4 * i, 4 * j) - position[:, :2]) < half[:, :2]).all(axis=1)
            assert inside.any() == (cell == "#")


@pytest.mark.parametrize("layout, touching", [(None, 4), ("u_maze", 9)])
def test_torso_hips_and_feet_touch_walls_and_only_feet_the_floor(layout, touching):
    """MuJoCo's rule: two geoms collide where the contype of one meets the conaffinity of the other."""
    model = Ant(layout).system.mj_model
    # 0 is a plane, 2 a sphere, 6 a box; the aux capsules are all on the torso
    floor, sphere, box = (model.geom_type == kind for kind in (0, 2, 6))
    robot = ~floor & ~box
    with_floor = robot & (model.geom_contype == 1)
    assert with_floor.sum() == 4 and sphere[with_floor].all()
    assert model.geom_conaffinity[floor] == 1
    solid = robot & ((model.geom_contype == 1) | (model.geom_conaffinity == 1))
    assert solid.sum() == touching
    if layout:
        torso = model.body("torso").id
        assert (model.geom_bodyid[solid] == torso).sum() == 5
        assert (model.geom_contype[box] == 1).all() and (model.geom_conaffinity[box] == 1).all()
        assert sphere[solid].sum() == 5


def test_names_make_ants():
    assert {"ant", "ant_u_maze", "ant_hardest_maze"} <= set(envs.names())
    for name in ("ant", "ant_u4_maze_eval"):
        env = envs.make(name)
        assert isinstance(env, Ant) and env.name == name
    assert envs.make("ant").maze is None


def test_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown environment 'ant_u_mazee'; did you mean ant_u_maze or ") as error:
        envs.make("ant_u_mazee")
    assert "\n" not in str(error.value)


def test_unknown_name_is_answered_with_all_robots_and_mazes():
    with pytest.raises(ValueError, match=r"unknown environment 'xyz'; there are ant, .* point, .*: u_maze, ") as error:
        envs.make("xyz")
    assert "\n" not in str(error.value)


def test_stitching_tasks_start_exactly_at_a_cells_centre():
    env = Ant("u_maze_gen_1f2f3f")
    states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 256))
    corridor = {(4, 4), (4, 8), (4, 12), (8, 12), (12, 12), (12, 8), (12, 4)}
    starts, goals = (set(map(tuple, np.asarray(x).tolist())) for x in (states.observation[:, :2], states.goal))
    assert starts == corridor - {(12, 4)} and goals == corridor - {(4, 4)}
    assert np.ptp(states.observation[:, 2:15], axis=0).min() > 0.15  # the rest of the pose is noisy


def test_random_starts_lie_on_a_circle_of_10_m_around_the_goal():
    states = jax.jit(jax.vmap(AntRandomStart().reset))(jax.random.split(jax.random.key(0), 1000))
    goal, start = np.asarray(states.goal), np.asarray(states.observation[:, :2])
    np.testing.assert_allclose(np.linalg.norm(goal, axis=1), 10, atol=1e-5)
    assert np.abs(np.linalg.norm(start - goal, axis=1) - 10).max() < 0.15  # and the noise of a start
    for x, y in (goal.T, (start - goal).T):
        assert stats.kstest(np.arctan2(y, x), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 0.001
