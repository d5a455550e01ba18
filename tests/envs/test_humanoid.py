"""The numbers are those of the published code; whole observations are compared with brax's own humanoid."""

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax.envs.humanoid import Humanoid as BraxHumanoid
from scipy import stats

import envs
from envs import spring
from envs.humanoid import Humanoid, _model
from envs.mazes import DRAWINGS

GOLDEN = [0.26709, -0.05893, 1.14013, 0.93109, 0.04398, -0.24385, -0.26772]
"""observation[:7] after 20 steps in the open; those in a maze are in test_walls.py."""
GOLDEN_INERTIA = [3.06875, 0, 0.3723, 0, 3.13575, 0, 0.3723, 0, 1.067, 8.90746]
MASSES = [8.9075, 2.2619, 6.6162, 4.7518, 4.5228, 4.7518, 4.5228, 1.6611, 1.2295, 1.6611, 1.2295, 1.0]


def compiled(env: Humanoid) -> SimpleNamespace:
    programs = {name: jax.jit(getattr(env, name)) for name in ("place", "step", "with_goal", "_observe")}
    return SimpleNamespace(env=env, **programs)


@pytest.fixture(scope="module")
def humanoids():
    return {
        "open": compiled(Humanoid()),
        "open, without the goal": compiled(Humanoid(goal_in_state=False)),
        "u_maze": compiled(Humanoid("u_maze")),
    }


def action(t: int) -> jax.Array:
    return jnp.array([np.sin(0.1 * (t + 1) * (k + 1)) for k in range(17)], jnp.float32)


def placed(humanoid, start, goal):
    return humanoid.place(jnp.asarray(start, jnp.float32), jnp.asarray(goal, jnp.float32))


def test_golden_rollout(humanoids):
    now = placed(humanoids["open"], (0, 0), (3, 0))
    np.testing.assert_allclose(now.observation[51:61], GOLDEN_INERTIA, atol=1e-4)
    for t in range(20):
        now = humanoids["open"].step(now, action(t))
    np.testing.assert_allclose(now.observation[:7], GOLDEN, atol=1e-4)


@pytest.mark.parametrize(
    "where, start, goal, inertia", [("open", (0, 0), (3, 0), 110.2404), ("u_maze", (2, 2), (6, 2), 123.2627)]
)
def test_inertias_at_a_start_are_the_published_ones(humanoids, where, start, goal, inertia):
    np.testing.assert_allclose(placed(humanoids[where], start, goal).observation[51:171].sum(), inertia, atol=1e-3)


@pytest.mark.parametrize("goal_in_state", [True, False])
def test_observation_is_that_of_the_published_model(humanoids, goal_in_state):
    """brax's own formulas on a model that has the goal's marker, a body of 1 kg on two slides; and on one without."""
    root = ElementTree.fromstring(_model(None, True))
    now = placed(humanoids["open"], (0.5, -1), (3, 4))
    for t in range(12):  # lands and leans
        now = humanoids["open"].step(now, action(t))
    expected = brax_observation(root, now.physics, goal_in_state)
    assert np.abs(expected[-30:]).max() > 1
    if not goal_in_state:
        observe = humanoids["open, without the goal"]._observe
        now = now._replace(observation=observe(now.physics, now.goal, now.observation[243:266]))
    np.testing.assert_allclose(now.observation, expected, atol=2e-3, rtol=1e-5)


def brax_observation(root, physics, has_marker):
    q, qd, x, xd = physics.q, physics.qd, physics.x, physics.xd
    if has_marker:
        marker = ElementTree.SubElement(root.find("worldbody"), "body", name="target", pos="0 0 1.25")
        for axis in ("1 0 0", "0 1 0"):
            slide = {"axis": axis, "armature": "0", "damping": "0", "stiffness": "0", "range": "-20 20"}
            ElementTree.SubElement(marker, "joint", type="slide", **slide)
        ElementTree.SubElement(marker, "geom", size="0.5", mass="1", conaffinity="0", contype="0")
        q, qd = jnp.append(q, jnp.array([3.0, 4.0])), jnp.pad(qd, (0, 2))
    system = spring.load(ElementTree.tostring(root, encoding="unicode"), 0.003)
    system = system.tree_replace({"actuator.gear": jnp.array([350.0] * 11 + [100.0] * 6)})
    with pytest.warns(UserWarning):
        brax = BraxHumanoid(backend="spring", exclude_current_positions_from_observation=False)
    brax.unwrapped.sys = system

    def observe(q, qd):
        state = spring.pipeline.init(system, q, qd)
        # the links' velocities live in the physics, those from joint velocities differ a little
        links = x, xd
        if has_marker:
            links = jax.tree.map(lambda ours, all: jnp.concatenate([ours, all[-1:]]), links, (state.x, state.xd))
        return brax._get_obs(state.replace(x=links[0], xd=links[1]), 0.4 * action(11))

    return jax.jit(observe)(q, qd)


def test_without_the_goal_in_the_state_all_that_tells_it_is_gone(humanoids):
    without = humanoids["open, without the goal"]
    here, there = (placed(without, (1, 1), goal) for goal in ((3, 0), (-1, 4)))
    assert without.env.observation_size == here.observation.shape[0] == 24 + 23 + 11 * 10 + 11 * 6 + 23 == 246
    np.testing.assert_array_equal(here.observation, there.observation)
    assert not np.array_equal(here.goal, there.goal)
    with_goal = placed(humanoids["open"], (1, 1), (3, 0)).observation
    np.testing.assert_array_equal(here.observation[:24], with_goal[:24])
    np.testing.assert_array_equal(here.observation[24:47], with_goal[26:49])


@pytest.mark.parametrize("goal_in_state", [True, False])
def test_a_new_goal_changes_the_state_as_if_it_had_been_there(humanoids, goal_in_state):
    humanoid = humanoids["open" if goal_in_state else "open, without the goal"]
    now = placed(humanoid, (0, 0), (3, 0))
    force = np.arange(23.0)
    start = 243 if goal_in_state else 223
    observed = now.observation.at[start : start + 23].set(force)
    switched = humanoid.with_goal(now._replace(observation=observed), jnp.array([-2.0, 1.0, 1.25]))
    expected = placed(humanoid, (0, 0), (-2, 1)).observation.at[start : start + 23].set(force)
    np.testing.assert_allclose(switched.observation, expected, atol=1e-5)
    np.testing.assert_array_equal(switched.goal, [-2, 1, 1.25])


def test_sizes_and_masses(humanoids):
    env = humanoids["open"].env
    now = placed(humanoids["open"], (1, 2), (3, 4))
    assert env.observation_size == now.observation.shape[0] == 268
    assert env.action_size == 17
    np.testing.assert_allclose(now.observation[51:171].reshape(12, 10)[:, 9], MASSES, atol=1e-4)
    np.testing.assert_allclose(now.observation[:7], [1, 2, 1.4, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(now.observation[7:24], 0)
    np.testing.assert_array_equal(now.observation[24:26], [3, 4])
    np.testing.assert_array_equal(now.observation[26:51], 0)
    np.testing.assert_array_equal(now.observation[243:], 0)
    np.testing.assert_array_equal(now.goal, np.float32([3, 4, 1.25]))
    np.testing.assert_allclose(env.achieved_goal(now.observation), [1, 2, 1.4], atol=1e-6)


def test_torques_are_140_nm_at_waist_and_legs_and_40_at_the_arms(humanoids):
    after = humanoids["open"].step(placed(humanoids["open"], (0, 0), (3, 0)), jnp.ones(17))
    torque = np.asarray(after.observation[243:])
    np.testing.assert_array_equal(torque[[*range(6), 23, 24]], 0)
    np.testing.assert_allclose(torque[6:17], 140)
    np.testing.assert_allclose(torque[17:23], 40)


def test_actuators_drive_the_joints_in_the_published_order(humanoids):
    """The waist's first two actuators are not in the order of the joints."""
    legs = "right_hip_x right_hip_z right_hip_y right_knee left_hip_x left_hip_z left_hip_y left_knee"
    arms = "right_shoulder1 right_shoulder2 right_elbow left_shoulder1 left_shoulder2 left_elbow"
    order = f"abdomen_y abdomen_z abdomen_x {legs} {arms}"
    joints = f"abdomen_z abdomen_y abdomen_x {legs} {arms}"
    one_each = jnp.arange(1, 18) / 20
    after = humanoids["open"].step(placed(humanoids["open"], (0, 0), (3, 0)), one_each)
    strength = dict(zip(order.split(), np.asarray(one_each) * ([140] * 11 + [40] * 6)))
    np.testing.assert_allclose(after.observation[249:266], [strength[j] for j in joints.split()], rtol=1e-5)


def test_humanoid_below_1_m_or_above_2_m_terminates(humanoids):
    env = humanoids["open"].env
    at = lambda z: env.state_at(env.system.init_q.at[2].set(z), jnp.zeros(23), jnp.array([3.0, 0, 1.25]))
    terminated = jax.jit(jax.vmap(lambda z: at(z).terminated))(jnp.array([0.99, 1.01, 1.99, 2.01]))
    assert terminated.tolist() == [True, False, False, True]


def test_reward_is_1_within_half_a_metre_of_the_goal_in_3_d(humanoids):
    start = placed(humanoids["open"], (0, 0), (0, 0))
    x, y, z = np.asarray(humanoids["open"].step(start, jnp.zeros(17)).observation[:3])
    outside = (x + 0.51, y, z), (x, y, z - 0.51), (x, y - 0.4, z + 0.4)
    for goal, reward in (((x + 0.49, y, z), 1), *((goal, 0) for goal in outside)):
        after = humanoids["open"].step(start._replace(goal=jnp.asarray(goal, jnp.float32)), jnp.zeros(17))
        assert after.reward == reward


@pytest.mark.parametrize("name, seconds", [("humanoid", 0.03), ("humanoid_jaxgcrl", 0.015), ("humanoid_u_maze", 0.015)])
def test_control_step(name, seconds):
    env = envs.make(name)
    assert env.name == name
    np.testing.assert_allclose(env.control_step, seconds)
    np.testing.assert_allclose(10 * env.system.opt.timestep, seconds, rtol=1e-5)


def resets(humanoid):
    """Of 4096: what their observations say first, as the rest takes seconds to compile, and the goals."""

    def draw(key):
        state = humanoid.env.reset(key)
        return state.observation[:26], state.goal

    return jax.device_get(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4096)))


def test_open_resets_stand_at_the_origin_with_goals_1_to_5_m_away(humanoids):
    observation, goal = resets(humanoids["open"])
    np.testing.assert_array_equal(observation[:, :24], np.tile([0, 0, 1.4, 1] + [0] * 20, (4096, 1)).astype(np.float32))
    np.testing.assert_array_equal(goal[:, 2], 1.25)
    np.testing.assert_array_equal(observation[:, 24:26], goal[:, :2])
    assert stats.kstest(np.linalg.norm(goal[:, :2], axis=1), stats.uniform(1, 4).cdf).pvalue > 0.001
    assert stats.kstest(np.arctan2(goal[:, 1], goal[:, 0]), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 0.001


def test_maze_resets_stand_exactly_on_the_start_with_goals_on_goal_cells(humanoids):
    observation, goal = resets(humanoids["u_maze"])
    np.testing.assert_array_equal(observation[:, :2], 2)
    cells, drawn = np.unique(goal, axis=0, return_counts=True)
    expected = {(2, 4, 1.25), (2, 6, 1.25), (4, 6, 1.25), (6, 2, 1.25), (6, 4, 1.25), (6, 6, 1.25)}
    assert set(map(tuple, cells.tolist())) == expected
    assert stats.chisquare(drawn).pvalue > 0.001


def test_every_geom_of_the_body_collides_with_the_floor_and_nothing_else_of_the_body():
    model = Humanoid().system.mj_model
    body = model.geom_bodyid > 0
    assert (model.geom_contype[body] == 1).all() and (model.geom_conaffinity[body] == 0).all()
    assert model.geom_conaffinity[~body] == 1


def test_big_maze_eval_has_jaxgcrls_goals():
    goals = {tuple(cell) for cell in (Humanoid("big_maze_eval").maze.positions("G") / 2).astype(int).tolist()}
    assert goals == {
        (i, j)
        for i, row in enumerate(DRAWINGS["big_maze_jaxgcrl_eval"].split())
        for j, cell in enumerate(row)
        if cell == "G"
    }
    assert (2, 5) in goals


def test_it_is_rendered_to_one_page_that_needs_no_network(humanoids, tmp_path):
    env, state = humanoids["u_maze"].env, placed(humanoids["u_maze"], (2, 2), (6, 2))
    page = Path(env.render(jax.tree.map(lambda x: x[None, None], state), str(tmp_path / "film"))).read_text()
    assert env.name in page and "http" not in page and page.count('"link":') >= len(env.shapes) - 1 > 1


def test_walls_are_1_m_high():
    model = Humanoid("u_maze").system.mj_model
    box = model.geom_type == 6
    np.testing.assert_array_equal(model.geom_pos[box][:, 2] + model.geom_size[box][:, 2], 1)
    np.testing.assert_array_equal(model.geom_pos[box][:, 2] - model.geom_size[box][:, 2], 0)
