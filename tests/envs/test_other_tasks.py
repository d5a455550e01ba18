"""Reacher, pusher, half-cheetah, ant with ball or box, point mass; the numbers are those of the published tasks."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from scipy import stats

from envs import spring, viewer
from envs.ant_objects import AntBall, AntPush
from envs.half_cheetah import HalfCheetah
from envs.pusher import Pusher, Pusher2
from envs.reacher import Reacher
from envs.simple import SimpleMaze

U_MAZE = ["#####", "#RGG#", "###G#", "#GGG#", "#####"]
BLOCKS = ["#######", "#R.####", "#...G.#", "##.#..#", "##G.###", "##..###", "#######"]
BATCH, RESETS = 16, 4096

SIZES = {  # observation, action, goal indices, radius, other radii, seconds of a step
    "reacher": (Reacher, 10, 2, (4, 5, 6), 0.05, {}, 0.02),
    "pusher_easy": (lambda: Pusher("easy"), 20, 7, (10, 11, 12), 0.1, {"hard": 0.05}, 0.05),
    "pusher_hard": (lambda: Pusher("hard"), 20, 7, (10, 11, 12), 0.1, {"hard": 0.05}, 0.05),
    "pusher2": (Pusher2, 23, 7, (10, 11, 12, 13, 14, 15), 0.1, {"hard": 0.05}, 0.05),
    "half_cheetah": (HalfCheetah, 18, 6, (0,), 0.5, {}, 0.05),
    "ant_ball": (AntBall, 31, 8, (29, 30), 0.5, {"easy": 2.0}, 0.05),
    "ant_ball_u_maze": (lambda: AntBall("u_maze"), 31, 8, (29, 30), 0.5, {"easy": 2.0}, 0.05),
    "ant_push": (AntPush, 31, 8, (0, 1), 0.5, {"easy": 2.0}, 0.05),
    "simple_u_maze": (lambda: SimpleMaze("u_maze"), 4, 2, (0, 1), 0.5, {}, 0.05),
}


@pytest.fixture(scope="module")
def task():
    """Environments by name, each made and compiled once; every call takes and gives BATCH robots, `reset` RESETS."""
    made = {}

    def get(name):
        if name not in made:
            env = SIZES[name][0]()
            made[name] = SimpleNamespace(
                env=env,
                reset=functools.cache(
                    lambda: jax.device_get(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), RESETS)))
                ),
                state_at=jax.jit(jax.vmap(env.state_at)),
                step=jax.jit(jax.vmap(env.step)),
            )
        return made[name]

    return get


def start(task, q, qd, goal=None):
    """A state of each row of q and qd; the rest of the batch repeats them."""
    rows = np.arange(BATCH) % len(q)
    goal = np.zeros(len(task.env.goal_indices)) if goal is None else np.asarray(goal)
    arrays = np.asarray(q)[rows], np.broadcast_to(qd, np.shape(q)[:1] + np.shape(qd)[-1:])[rows]
    return task.state_at(*(jnp.asarray(a, jnp.float32) for a in (*arrays, np.tile(goal, (BATCH, 1)))))


def rollout(task, state, actions):
    """Observations (time, batch, ...) after each of the `actions` (time, ...), the same for all."""
    observations = []
    for action in actions:
        rows = jnp.asarray(np.resize(action, (BATCH, task.env.action_size)), jnp.float32)
        state = task.step(state, rows)
        observations.append(np.asarray(state.observation))
    return np.array(observations)


def first_reset(task):
    """One start of the environment, in all the batch."""
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x[:1]), BATCH, 0), task.reset())


def uniform(sample, low, high):
    return stats.kstest(np.ravel(sample), stats.uniform(low, high - low).cdf).pvalue > 0.001


def gap_to_walls(drawing, xy):
    """Distance of points (..., 2) from the nearest wall cell of 4 m, 0 in one."""
    cells = np.argwhere([[cell == "#" for cell in row] for row in drawing]) * 4
    outside = np.maximum(np.abs(np.asarray(xy)[..., None, :] - cells) - 2, 0)
    return np.linalg.norm(outside, axis=-1).min(axis=-1)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    """Those of the states are in test_tasks.py."""
    make, observation, action, goal_indices, radius, others, seconds = SIZES[name]
    env = make()
    assert env.observation_size == observation
    assert env.action_size == action
    assert env.goal_indices == goal_indices
    assert env.success_radius == radius and dict(env.other_radii) == others
    assert env.control_step == pytest.approx(seconds)
    assert (env.maze is not None) == name.endswith("maze")
    assert env.name == (name.removesuffix("_u_maze"))
    if env.maze:
        assert list(env.maze.cells) == U_MAZE and env.maze.cell_size == 4


NEVER_TERMINATES = ["reacher", "pusher_hard", "half_cheetah", "simple_u_maze"]


@pytest.mark.parametrize("name", [*NEVER_TERMINATES, "ant_ball_u_maze", "ant_push"])
def test_reward_is_1_where_the_goal_is_within_the_radius_after_the_step(task, name):
    env, radius = task(name).env, SIZES[name][4]
    before = first_reset(task(name))
    achieved = np.asarray(task(name).step(before, jnp.zeros((BATCH, env.action_size))).observation)[
        0, list(SIZES[name][3])
    ]
    offsets = np.zeros((BATCH, len(achieved)))
    offsets[:, 0] = np.resize([radius - 0.005, radius + 0.005, 0.005 - radius, -radius - 0.005], BATCH)
    if len(achieved) > 1:  # Euclidean
        offsets[4:6, :2] = np.array([[0.69], [0.72]]) * radius
    goal = jnp.asarray(achieved + offsets, jnp.float32)
    after = task(name).step(before._replace(goal=goal), jnp.zeros((BATCH, env.action_size)))
    np.testing.assert_array_equal(after.reward, np.resize([1, 0], BATCH))
    np.testing.assert_array_equal(before.reward, 0)
    np.testing.assert_array_equal(after.goal, goal)
    np.testing.assert_array_equal(after.terminated, False)


@pytest.mark.parametrize("name", ["reacher", "pusher2", "half_cheetah", "ant_ball_u_maze", "ant_push", "simple_u_maze"])
def test_every_robot_is_rendered_to_one_page_that_needs_no_network(task, name, tmp_path):
    env = task(name).env
    path = env.render(jax.tree.map(lambda x: x[:1, None], task(name).reset()), str(tmp_path / name))
    page = Path(path).read_text()
    assert path == str(tmp_path / f"{name}.html") and len(page) > 10_000
    assert env.name in page and "http" not in page and page.count('"link":') >= len(env.shapes) - 1 > 1


@pytest.mark.parametrize("name", ["ant_ball_u_maze", "ant_push"])
def test_ant_with_an_object_terminates_below_20_cm_and_above_1_m(task, name):
    q = np.tile(first_q(task(name)), (4, 1))
    q[:, 2] = 0.19, 0.21, 0.99, 1.01
    assert start(task(name), q, np.zeros(16)).terminated[:4].tolist() == [True, False, False, True]
    q[:, 2] = 1.1, 1.0, 0.5, 0.6
    after = task(name).step(start(task(name), q, np.zeros(16)), jnp.zeros((BATCH, 8)))
    assert after.terminated[:4].tolist() == [True, False, False, False]


def first_q(task):
    """The ant at rest in its cell, without noise; the object at (8, 8) or (4, 6)."""
    xy = (8, 8) if task.env.name == "ant_push" else (4, 6)
    return np.array([4, 4, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1, *xy], float)


# ---- reacher ------------------------------------------------------------------------------------------------------


def reacher_tip(q):
    """Links of 10 and 11 cm in a plane 1 cm above the table."""
    one, both = q[..., 0], q[..., 0] + q[..., 1]
    x, y = 0.1 * np.cos(one) + 0.11 * np.cos(both), 0.1 * np.sin(one) + 0.11 * np.sin(both)
    return np.stack([x, y, np.full_like(x, 0.01)], axis=-1)


def test_reacher_observes_cosines_sines_and_the_motion_of_its_tip(task):
    rng = np.random.default_rng(0)
    q, qd = rng.uniform(-2.9, 2.9, (BATCH, 2)), rng.uniform(-5, 5, (BATCH, 2))
    velocity = (reacher_tip(q + 1e-6 * qd) - reacher_tip(q - 1e-6 * qd)) / 2e-6
    observation = start(task("reacher"), q, qd).observation
    expected = np.concatenate([np.cos(q), np.sin(q), reacher_tip(q), velocity], axis=1)
    np.testing.assert_allclose(observation, expected, atol=2e-5)


def test_reacher_moves_as_it_says_it_does(task):
    """The observed velocity is the change of the observed position, and each action turns its own joint."""
    before = start(task("reacher"), [[0.3, 0.5]], np.zeros(2))
    for action, joint, sign in (((1, 0), 0, 1), ((-1, 0), 0, -1), ((0, 1), 1, 1), ((0, -1), 1, -1)):
        path = rollout(task("reacher"), before, [action] * 3)[:, 0]
        angles = np.arctan2(path[:, 2:4], path[:, :2])
        assert sign * (angles[0] - (0.3, 0.5))[joint] > 0.001
        moved = (path[2, 4:6] - path[0, 4:6]) / 0.04
        np.testing.assert_allclose(path[1, 7:9], moved, atol=0.1 * np.linalg.norm(moved))
        np.testing.assert_allclose(path[:, 4:7], reacher_tip(angles), atol=2e-3)


def test_reacher_starts_and_goals(task):
    states = task("reacher").reset()
    radius, angle = np.linalg.norm(states.goal[:, :2], axis=1), np.arctan2(states.goal[:, 1], states.goal[:, 0])
    assert uniform(radius, 0, 0.2) and uniform(angle, -np.pi, np.pi)
    np.testing.assert_allclose(states.goal[:, 2], 0.01, atol=1e-6)
    for joint in range(2):
        assert uniform(np.arctan2(states.observation[:, 2 + joint], states.observation[:, joint]), -0.1, 0.1)
        assert uniform(states.physics.qd[:, joint], -0.005, 0.005)


# ---- pusher -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_pusher():
    """brax's file in MuJoCo; its object and its goal slide along y, then x, from (0.45, -0.05)."""
    model = mujoco.MjModel.from_xml_string(spring.asset("pusher.xml"))
    return model, mujoco.MjData(model)


def in_reference(q):
    return np.concatenate([q[:7], [q[8] + 0.05, q[7] - 0.45, 0, 0]])


@pytest.mark.parametrize("name", ["pusher_hard", "pusher2"])
def test_pusher_observes_joints_tip_objects_and_velocities(task, reference_pusher, name):
    model, data = reference_pusher
    rng = np.random.default_rng(0)
    objects = task(name).env.objects
    low, high = model.jnt_range[:7].T
    q = np.concatenate([rng.uniform(low, high, (BATCH, 7)), rng.uniform(-0.5, 0.5, (BATCH, 2 * objects))], axis=1)
    qd = rng.normal(size=q.shape)
    observation = np.asarray(start(task(name), q, qd).observation)
    for i in range(BATCH):
        data.qpos = in_reference(q[i])
        mujoco.mj_forward(model, data)
        fingers = [data.geom(name).xpos for name in ("tip_arml", "tip_armr")]
        places = [data.body("object").xpos] + [np.append(q[i, 9:11], -0.275)] * (objects - 1)
        expected = np.concatenate([q[i, :7], np.mean(fingers, axis=0), *places, qd[i, :7]])
        np.testing.assert_allclose(observation[i], expected, atol=1e-5)


def pushing_starts(model, data):
    """Poses with an object within reach of the hand, and torques that bring some of them together."""
    rng = np.random.default_rng(0)
    low, high = model.jnt_range[:7].T
    hand = [model.geom(f"r_wrist_roll{i}").id for i in (1, 2, 3)]
    table, thing = model.geom("table").id, model.geom("object_geom").id
    starts = []
    while len(starts) < BATCH:
        q = np.concatenate([rng.uniform(low, high), [rng.uniform(0.25, 0.65), rng.uniform(-0.35, -0.05)]])
        data.qpos = in_reference(q)
        mujoco.mj_forward(model, data)
        gaps = [mujoco.mj_geomDistance(model, data, geom, thing, 1, None) for geom in hand]
        heights = [mujoco.mj_geomDistance(model, data, table, geom, 1, None) for geom in hand]
        if 0.02 < min(gaps) < 0.08 and min(heights) > 0.005:
            starts.append(q)
    return np.array(starts), rng.uniform(-1, 1, (BATCH, 7)), hand, thing


def test_pusher_pushes_as_mujoco_does_and_does_not_sink_in(task, reference_pusher):
    """Constant torques for 2 s; the same motion while nothing touches, and no joint is at a limit."""
    model, data = reference_pusher
    q, actions, hand, thing = pushing_starts(model, data)
    path = rollout(task("pusher_hard"), start(task("pusher_hard"), q, np.zeros(9)), [actions] * 40)
    reference, free, depth = np.zeros((40, BATCH, 9)), np.zeros((40, BATCH), bool), 0.0
    for i in range(BATCH):
        mujoco.mj_resetData(model, data)
        data.qpos, data.ctrl = in_reference(q[i]), 2 * actions[i]
        for t in range(40):
            mujoco.mj_step(model, data, 5)
            reference[t, i] = np.concatenate([data.qpos[:7], [data.qpos[8] + 0.45, data.qpos[7] - 0.05]])
            free[t, i] = data.nefc == 0 and (t == 0 or free[t - 1, i])
        for t in range(40):
            data.qpos = in_reference(np.concatenate([path[t, i, :7], path[t, i, 10:12]]))
            mujoco.mj_kinematics(model, data)
            depth = max(depth, *(-mujoco.mj_geomDistance(model, data, geom, thing, 1, None) for geom in hand))
    ours = np.concatenate([path[..., :7], path[..., 10:12]], axis=-1)
    moved = np.abs(reference[-1, :, 7:] - q[:, 7:]).max(axis=1) > 0.02
    assert moved.sum() >= 3
    np.testing.assert_array_equal(np.abs(ours[-1, :, 7:] - q[:, 7:]).max(axis=1) > 0.02, moved)
    assert free[2].sum() >= 8
    np.testing.assert_allclose(ours[free], reference[free], atol=1e-3)
    np.testing.assert_allclose(ours[:, :, 7:], reference[:, :, 7:], atol=0.05)
    assert depth < 0.01


def test_objects_of_pusher2_push_each_other(task):
    q = np.tile([0.0] * 7 + [0.45, -0.2, 0.45, -0.2], (4, 1))
    q[:, 9:11] += 0.15 * np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
    qd = np.zeros((4, 11))
    qd[:, 7:9] = 3 * (q[:, 9:11] - q[:, 7:9]) / 0.15
    path = rollout(task("pusher2"), start(task("pusher2"), q, qd), np.zeros((20, 7)))[:, :4]
    first, second = path[..., 10:12], path[..., 13:15]
    assert np.linalg.norm(first - second, axis=-1).min() > 0.09
    along = np.sum((second[-1] - q[:, 9:11]) * qd[:, 7:9] / 3, axis=1)
    assert (along > 0.03).all()


@pytest.mark.parametrize(
    "name, box", [("pusher_easy", (0.4, 0.5, -0.1, 0)), ("pusher_hard", (0.25, 0.65, -0.35, -0.05))]
)
def test_pusher_starts_and_goals(task, name, box):
    states = task(name).reset()
    goals = jax.vmap(task(name).env.sample_goal)(jax.random.split(jax.random.key(5), RESETS))
    for goal in (states.goal, np.asarray(goals)):
        assert uniform(goal[:, 0], *box[:2]) and uniform(goal[:, 1], *box[2:])
        np.testing.assert_allclose(goal[:, 2], -0.275, atol=1e-6)
    x, y = states.observation[:, 10:12].T
    assert (
        0.25 <= x.min() < 0.255 and 0.645 < x.max() <= 0.65 and -0.35 <= y.min() < -0.345 and -0.055 < y.max() <= -0.05
    )
    gap = np.linalg.norm(states.observation[:, 10:13] - states.goal, axis=1)
    assert 0.17 <= gap.min() < 0.18
    # far from all goals the density is even
    low = y < -0.27
    assert name == "pusher_hard" or uniform(x[low], 0.25, 0.65)
    np.testing.assert_array_equal(states.observation[:, :7], 0)
    assert uniform(states.observation[:, 13:], -0.005, 0.005)


def test_pusher2_keeps_objects_and_goals_apart(task):
    states = task("pusher2").reset()
    first, second = states.observation[:, 10:12], states.observation[:, 13:15]
    goals = states.goal[:, 0:2], states.goal[:, 3:5]
    for a, b, gap in ((first, goals[0], 0.17), (second, goals[1], 0.17), (first, second, 0.12), (*goals, 0.12)):
        assert gap <= np.linalg.norm(a - b, axis=1).min() < gap + 0.01
    for xy in (first, second, *goals):
        assert (xy.min(axis=0) >= (0.25, -0.35)).all() and (xy.max(axis=0) <= np.float32((0.65, -0.05))).all()


# ---- half-cheetah -------------------------------------------------------------------------------------------------


def test_half_cheetah_moves_as_in_mujoco(task, tmp_path, monkeypatch):
    """In the air, and for a moment on the ground; brax's own file, whose total mass MuJoCo sets while it reads it."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo notes that this way to set it is deprecated
    model = mujoco.MjModel.from_xml_string(spring.asset("half_cheetah.xml"))
    rng = np.random.default_rng(0)
    q, qd = rng.uniform(-0.3, 0.3, (BATCH, 9)), rng.normal(size=(BATCH, 9))
    in_air = np.arange(BATCH) < 8
    q[:, 1] = np.where(in_air, 5, 0)
    actions = rng.uniform(-1, 1, (10, BATCH, 6))
    path = rollout(task("half_cheetah"), start(task("half_cheetah"), q, qd), actions)
    touched = np.zeros(BATCH, bool)
    for i in range(BATCH):
        data = mujoco.MjData(model)
        data.qpos, data.qvel = q[i], qd[i]
        for t in range(10):
            data.ctrl = actions[t, i]
            mujoco.mj_step(model, data, 5)
            touched[i] |= data.ncon > 0
            if in_air[i] or t < 4:
                expected = np.concatenate([data.qpos, data.qvel])
                np.testing.assert_allclose(path[t, i], expected, atol=1e-3 if in_air[i] else 1e-2)
    assert not touched[in_air].any() and touched[~in_air].sum() >= 4


def test_half_cheetah_starts_and_goals(task):
    states = task("half_cheetah").reset()
    np.testing.assert_array_equal(states.goal, np.full((RESETS, 1), 5))
    for k in range(9):
        assert uniform(states.observation[:, k], -0.1, 0.1)
        assert stats.kstest(states.observation[:, 9 + k] / 0.1, "norm").pvalue > 0.001
    marker = task("half_cheetah").env.goal_position(states)
    np.testing.assert_allclose(marker, np.tile([5, 0, 0.7], (RESETS, 1)), atol=1e-6)


# ---- ant with a ball ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ant_ball_u_maze", "ant_push"])
def test_ant_with_an_object_observes_the_ant_then_the_object(task, name):
    rng = np.random.default_rng(0)
    q = first_q(task(name)) + rng.uniform(-0.05, 0.05, (4, 17))
    qd = rng.normal(size=(4, 16))
    observation = start(task(name), q, qd).observation[:4]
    np.testing.assert_allclose(observation, np.concatenate([q[:, :15], qd[:, :14], q[:, 15:]], axis=1), atol=1e-5)


def test_the_object_is_not_coloured_as_the_robot(task):
    for name in ("ant_ball_u_maze", "ant_push", "pusher2"):
        env = task(name).env
        links = max(shape.link for shape in env.shapes)
        colours = {shape.colour[:3] for shape in env.shapes if shape.link == links}
        assert len(colours) == 1 and not colours & {viewer.ROBOT, viewer.SCENE}


def ant_noise(observation, xy):
    pose = np.array([*xy, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1])
    assert all(uniform(observation[:, k] - pose[k], -0.1, 0.1) for k in range(15))
    assert all(stats.kstest(observation[:, k] / 0.1, "norm").pvalue > 0.001 for k in range(15, 29))


def test_ball_in_the_open_starts_on_the_way_to_a_goal_5_m_away(task):
    states = task("ant_ball").reset()
    np.testing.assert_allclose(np.linalg.norm(states.goal, axis=1), 5, atol=1e-5)
    assert uniform(np.arctan2(states.goal[:, 1], states.goal[:, 0]), -np.pi, np.pi)
    ball = states.observation[:, 29:]
    away = np.sum(ball * states.goal / 5, axis=1)
    assert uniform(away, 1.75, 3.5)
    np.testing.assert_allclose(ball, away[:, None] * states.goal / 5, atol=1e-5)
    ant_noise(states.observation, (0, 0))
    np.testing.assert_array_equal(states.physics.qd[:, 14:], 0)
    np.testing.assert_allclose(task("ant_ball").env.goal_position(states)[:, 2], 0.5)


def test_ball_in_a_maze_starts_towards_the_goal(task):
    states = task("ant_ball_u_maze").reset()
    cells, drawn = np.unique(states.goal, axis=0, return_counts=True)
    assert set(map(tuple, cells.tolist())) == {(4, 8), (4, 12), (8, 12), (12, 4), (12, 8), (12, 12)}
    assert stats.chisquare(drawn).pvalue > 0.001
    np.testing.assert_array_equal(states.observation[:, 29:], np.tile([4, 6], (RESETS, 1)))
    ant_noise(states.observation, (4, 4))


def test_placed_ball_is_2_m_ahead_on_the_shortest_way_and_never_in_a_wall(task):
    place = jax.jit(jax.vmap(task("ant_ball_u_maze").env.place))
    corridor = np.float32([(4, 4), (4, 8), (4, 12), (8, 12), (12, 12), (12, 8), (12, 4)])
    pairs = [(i, k) for i in range(7) for k in range(7)]
    positions, goals = (corridor[np.array(pairs)[:, side]] for side in (0, 1))
    offsets = np.random.default_rng(0).uniform(-1.4, 1.4, positions.shape)
    for offset in (np.zeros_like(positions), offsets):
        states = place(jnp.asarray(positions + offset, jnp.float32), jnp.asarray(goals))
        observation = np.asarray(states.observation)
        np.testing.assert_allclose(observation[:, :2], positions + offset, atol=1e-5)
        np.testing.assert_array_equal(states.goal, goals)
        ball = observation[:, 29:] - offset
        for (i, k), xy in zip(pairs, ball):
            step = np.sign(k - i) or (1 if i < 6 else -1)
            neighbours = [
                (corridor[i] + corridor[i + s]) / 2 for s in ([step] if i != k else [1, -1]) if 0 <= i + s < 7
            ]
            assert any(np.allclose(xy, neighbour, atol=1e-4) for neighbour in neighbours)
        assert gap_to_walls(U_MAZE, observation[:, 29:]).min() > 0.5


def test_ant_cannot_pass_the_ball_but_pushes_it(task):
    """Thrown along the corridor (y), with a leg ahead (turned by 45 degrees) or with its body between two legs."""
    task = task("ant_ball_u_maze")
    cases = [(speed, yaw, x) for speed in (5, 8, 11) for yaw in (0, np.pi / 4) for x in (4, 4.3)]
    q, qd = np.tile(first_q(task), (len(cases), 1)), np.zeros((len(cases), 16))
    for i, (speed, yaw, x) in enumerate(cases):
        q[i, [3, 6]], q[i, 15:], qd[i, 1] = (np.cos(yaw / 2), np.sin(yaw / 2)), (x, 6.0), speed
    path = rollout(task, start(task, q, qd), np.zeros((40, 8)))[:, : len(cases)]
    ant, ball = path[..., :2], path[..., 29:]
    fast = np.array([speed > 5 or yaw > 0 for speed, yaw, _ in cases])
    assert (ball[-1, fast, 1] > 6.8).all()
    assert (ball[..., 1] - ant[..., 1]).min() > 0.3
    assert np.linalg.norm(ball - ant, axis=-1).min() > 0.65  # 0.75 where two hard spheres touch
    leg_ahead = np.array([yaw > 0 and x == 4 for _, yaw, x in cases])
    assert np.linalg.norm(ball - ant, axis=-1)[:, leg_ahead].min() > 1  # stopped by the leg
    assert gap_to_walls(U_MAZE, ball).min() > 0.4


def test_ball_stays_between_walls(task):
    """Also where the ant pushes it against one."""
    task = task("ant_ball_u_maze")
    throws = [(speed * x, speed * y) for speed in (3, 8, 15) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    q, qd = np.tile(first_q(task), (14, 1)), np.zeros((14, 16))
    q[:12, :2], q[:12, 15:] = (12, 4), (4, 8)
    qd[:12, 14:] = throws
    for i, sign in ((12, 1), (13, -1)):
        q[i, :2], q[i, 15:], qd[i, 0] = (4 - 0.4 * sign, 8), (4 + 1.45 * sign, 8), 8 * sign
    path = rollout(task, start(task, q, qd), np.zeros((60, 8)))[:, :14]
    gap = gap_to_walls(U_MAZE, path[..., 29:])
    assert gap[:, :12].min() > 0.4
    # between wall and ant it gives, and comes out again, but for the weight of an ant that may come to rest against it
    assert gap.min() > 0.25 and gap[-1].min() > 0.45
    across = [i for i, (x, _) in enumerate(throws) if x]
    assert (np.abs(gap[:, across].min(axis=0) - 0.5) < 0.1).all()  # they got there
    assert (np.abs(path[:, 12:, 29] - 4) > np.abs(path[:, 12:, 0] - 4)).all()


# ---- ant and box --------------------------------------------------------------------------------------------------


def test_blocks_stand_where_they_are_drawn(task):
    model = task("ant_push").env.model
    block = (model.geom_type == 6) & (model.geom_bodyid == 0)
    position, half = model.geom_pos[block], model.geom_size[block]
    np.testing.assert_allclose(position[:, 2] + half[:, 2], 2)
    for i, row in enumerate(BLOCKS):
        for j, cell in enumerate(row):
            inside = (np.abs((4 * i, 4 * j) - position[:, :2]) < half[:, :2]).all(axis=1)
            assert inside.any() == (cell == "#")
    np.testing.assert_allclose(model.geom("box").size, (1.8, 1.8, 1))


@pytest.mark.parametrize("box, reached", [((2, 2), set()), ((3, 2), {(2, 4)}), ((2, 3), {(4, 2)})])
def test_no_goal_is_reached_before_the_box_is_pushed(box, reached):
    free = {(i, j) for i, row in enumerate(BLOCKS) for j, cell in enumerate(row) if cell != "#"} - {box}
    seen = {(1, 1)}
    for _ in free:
        seen |= {(i + x, j + y) for i, j in seen for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))} & free
    assert seen & {(2, 4), (4, 2)} == reached


def test_push_goals_are_2_by_2_m_in_two_chambers(task):
    states = task("ant_push").reset()
    goals = jax.vmap(task("ant_push").env.sample_goal)(jax.random.split(jax.random.key(5), RESETS))
    for goal in (states.goal, np.asarray(goals)):
        lower = goal[:, 0] >= 16
        assert abs(lower.mean() - 0.5) < 0.03
        assert uniform(goal[lower] - (16, 8), 0, 2) and uniform(goal[~lower] - (8, 16), 0, 2)
        assert gap_to_walls(BLOCKS, goal).min() >= 1.5
    np.testing.assert_array_equal(states.observation[:, 29:], np.full((RESETS, 2), 8))
    ant_noise(states.observation, (4, 4))


def test_ant_pushes_the_box_and_blocks_hold_as_in_mujoco(task):
    task = task("ant_push")
    cases = [(speed, *case) for speed in (2, 4, 5, 6) for case in PUSHES]
    q, qd = np.tile(first_q(task), (BATCH, 1)), np.zeros((BATCH, 16))
    for i, (speed, xy, direction, _) in enumerate(cases):
        q[i, :2], qd[i, :2] = xy, speed * np.array(direction)
    path = rollout(task, start(task, q, qd), np.zeros((30, 8)))
    ant, box = path[..., :2], path[..., 29:]
    model = task.env.model
    iterations, model.opt.iterations = model.opt.iterations, 100
    for i, (speed, _, direction, at_box) in enumerate(cases):
        data = mujoco.MjData(model)
        data.qpos, data.qvel = q[i], qd[i]
        for t in range(30):
            mujoco.mj_step(model, data, 5)
            if t < 5:
                np.testing.assert_allclose(path[t, i, :15], data.qpos[:15], atol=5e-3)
        np.testing.assert_allclose(box[-1, i], data.qpos[15:], atol=0.1)
        pushed = (box[-1, i] - 8) @ direction
        assert pushed > 0.3 if at_box and speed > 2 else pushed == pytest.approx(0, abs=1e-3)
        if at_box:
            assert ((box[:, i] - ant[:, i]) @ direction).min() > 1.8  # the torso is behind the box's face
    model.opt.iterations = iterations
    assert gap_to_walls(BLOCKS, ant).min() > 0.2
    assert gap_to_walls(BLOCKS, ant)[:, [not case[3] and case[0] == 6 for case in cases]].min() < 0.6  # they got there


PUSHES = [  # where the ant is, where it is thrown, whether the box is there
    ((5, 8), (1, 0), True),
    ((8, 5), (0, 1), True),
    ((4, 8), (-1, 0), False),
    ((4, 8), (0, 1), False),
]


def test_contacts_that_the_solver_leaves_out_do_not_touch():
    """Random actions in plain MuJoCo: no more contacts of each kind (with friction, without) than the solver takes."""
    model = AntPush().model
    random, most, seen = np.random.default_rng(0), 0, 0
    for _ in range(10):
        data = mujoco.MjData(model)
        data.qpos = [*random.uniform(3, 5, 2), 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1, 8, 8]
        for _ in range(200):
            data.ctrl = random.uniform(-1, 1, 8)
            mujoco.mj_step(model, data, 5)
            kinds = [contact.dim for contact in data.contact if contact.dist < 0]
            most, seen = max(most, kinds.count(1), kinds.count(3)), seen + len(kinds)
    assert seen > 200
    assert most <= 16


def test_box_stays_between_blocks(task):
    task = task("ant_push")
    throws = [(x, y) for x in (-6, 0, 6) for y in (-6, 0, 6)] + [
        (30, 0),
        (0, 30),
        (-30, 0),
        (0, -30),
        (2, 3),
        (3, 2),
        (20, 19),
    ]
    qd = np.zeros((BATCH, 16))
    qd[:, 14:] = throws
    box = rollout(task, start(task, np.tile(first_q(task), (BATCH, 1)), qd), np.zeros((80, 8)))[..., 29:]
    corners = box[..., None, :] + 1.8 * np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
    cells = np.array([list(row) for row in BLOCKS])
    sunk = corners - np.clip(corners, 4 * np.round(corners / 4) - 1.85, 4 * np.round(corners / 4) + 1.85)
    nearest = np.round((corners - sunk) / 4).astype(int)
    shallow = (np.abs(sunk) > 0).any(axis=-1)  # within 15 cm of the edge of a cell
    assert ((cells[tuple(np.moveaxis(nearest, -1, 0))] != "#") | shallow).all()
    ends = box[-1]
    np.testing.assert_allclose(ends[throws.index((30, 0))], (20.2, 8), atol=3)
    assert ends[throws.index((6, 0)), 0] > 10 and ends[throws.index((0, 6)), 1] > 10
    assert ends[throws.index((-30, 0)), 0] < 6


# ---- point mass ---------------------------------------------------------------------------------------------------


def test_point_mass_accelerates_by_5_m_per_s2(task):
    state = start(task("simple_u_maze"), [(4.0, 7.0)], (0.2, -0.1))
    np.testing.assert_allclose(state.observation[0], (4, 7, 0.2, -0.1), atol=1e-6)
    # ten steps of 5 ms, velocity first: 0.005^2 (1 + 2 + ... + 10) = 0.001375
    after = rollout(task("simple_u_maze"), state, [(1, -0.5)])[0, 0]
    expected = (4 + 0.01 + 5 * 0.001375, 7 - 0.005 - 2.5 * 0.001375, 0.2 + 0.25, -0.1 - 0.125)
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_point_mass_never_passes_a_wall(task):
    """Full force for 10 s in eight directions, from two cells."""
    q = np.repeat([(4.0, 4.0), (12.0, 9.0)], 8, axis=0)
    angles = np.arange(BATCH) * np.pi / 4
    actions = np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 6)
    path = rollout(task("simple_u_maze"), start(task("simple_u_maze"), q, np.zeros(2)), [np.sign(actions)] * 200)
    gap = gap_to_walls(U_MAZE, path[..., :2])
    assert gap.min() > 0.2
    np.testing.assert_allclose(gap[-1], 0.25, atol=0.03)
    # the walls that stop it: x 2 and 6 in the first corridor, 10 and 14 in the last; y 2 and 14
    for i, (x, y) in {0: (5.75, 4), 2: (4, 13.75), 4: (2.25, 4), 6: (4, 2.25), 10: (12, 13.75), 14: (12, 2.25)}.items():
        np.testing.assert_allclose(path[-1, i, :2], (x, y), atol=0.05)


def test_point_mass_starts_at_rest_at_the_start(task):
    states = task("simple_u_maze").reset()
    np.testing.assert_array_equal(states.observation, np.tile([4, 4, 0, 0], (RESETS, 1)))
    cells, drawn = np.unique(states.goal, axis=0, return_counts=True)
    assert set(map(tuple, cells.tolist())) == {(4, 8), (4, 12), (8, 12), (12, 4), (12, 8), (12, 12)}
    assert stats.chisquare(drawn).pvalue > 0.001
    placed = jax.jit(task("simple_u_maze").env.place)(jnp.array([12.5, 8.0]), jnp.array([4.0, 8.0]))
    np.testing.assert_allclose(placed.observation, (12.5, 8, 0, 0))
    np.testing.assert_allclose(placed.goal, (4, 8))
