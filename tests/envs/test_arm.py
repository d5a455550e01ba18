"""The numbers are those of the published tasks; motion and layout are checked against plain MuJoCo."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from scipy import stats

from envs import mjx_physics
from envs.arm import TASKS, Arm
from envs.base import GoalState
from envs.mjx_physics import Physics, mjx

START = np.array([1.571, 0.742, 0, -1.571, 0, 3.054, 1.449])
AT_REST = np.array([1.571, 0.752, 0, -0.903, 0, 1.526, 0.724])
"""Where the arm settles under the action 0."""
FULL = dict(
    push_easy=(8, 28, 118), push_hard=(8, 28, 118), binpick_easy=(40, 140, 566), binpick_hard=(40, 140, 566)
)  # fmt: skip
MASSES = dict(
    cube=0.216, link1=4.970684, link2=0.646926, link3=3.228604, link4=3.587895, link5=1.225946, link6=1.666555,
    link7=0.735522, left_finger=0.015, right_finger=0.015,
)  # fmt: skip
INERTIAS = dict(
    link1=(0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169),
    link2=(0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704),
    link3=(0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805),
    link4=(0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641),
    link5=(0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229),
    link6=(0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341),
    link7=(0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741),
    left_finger=(2.375e-6, 2.375e-6, 7.5e-7, 0, 0, 0),
    right_finger=(2.375e-6, 2.375e-6, 7.5e-7, 0, 0, 0),
)
CENTRES = dict(
    link1=(0.003875, 0.002081, -0.04762), link2=(-0.003141, -0.02872, 0.003495), link3=(0.027518, 0.039252, -0.066502),
    link4=(-0.05317, 0.104419, 0.027454), link5=(-0.011953, 0.041065, -0.038437),
    link6=(0.060149, -0.014117, -0.010517), link7=(0.010517, -0.004252, 0.061597),
)  # fmt: skip
GAINS = [(4500, 4500), (4500, 4500), (2000, 3500), (2000, 3500)] + 3 * [(1000, 2000)] + 2 * [(0.15686, 500)]
REGIONS = dict(
    # cube x, y and half width; goal x, y, z and half widths
    push_easy=((-0.1, 0.6, 0.1), (0.1, 0.6, 0.03), (0.1, 0.1, 0)),
    push_hard=((-0.25, 0.65, 0.25), (0.25, 0.65, 0.03), (0.25, 0.25, 0)),
    binpick_easy=((-0.15, 0.6, 0.09), (0.17, 0.6, 0.03), (0.09, 0.09, 0)),
    binpick_hard=((-0.3, 0.6, 0.15), (0.3, 0.6, 0.03), (0.15, 0.15, 0)),
    reach=(None, (0, 0.5, 0.3), (0.2, 0.2, 0.2)),
    grasp=((-0.1, 0.6, 0.1), None, None),
    binpick_easy_EEF=((-0.15, 0.6, 0.09), (0.17, 0.6, 0.03), (0.09, 0.09, 0)),
)
ABOVE, DOWN = (0, 0.3, 0, 1), (0, 0.85, 0.45, 1)
"""Arm actions that bring the gripper, pointing downwards, to (0, 0.79): 16 cm above the table, and 2 cm."""


def pose(cube=(1.0, 1.0, 0.03), arm=START, fingers=0.04) -> np.ndarray:
    return np.array([*cube, 1, 0, 0, 0, *arm, fingers, fingers], np.float32)


def rollout(env: Arm):
    """A function of positions (cases, ...), velocities and actions (cases, time, ...): states after each action."""

    def one(qpos, qvel, actions):
        def step(state, action):
            state = env.step(state, action)
            return state, state

        goal = jnp.zeros(len(env.goal_indices))
        return jax.lax.scan(step, env.state_at(qpos, qvel, goal), actions)[1]

    compiled = jax.jit(jax.vmap(one))

    def run(qpos, actions, qvel=None):
        qpos, actions = np.asarray(qpos, np.float32), np.asarray(actions, np.float32)
        qvel = np.zeros((len(qpos), env.model.nv)) if qvel is None else qvel
        return jax.device_get(compiled(qpos, np.asarray(qvel, np.float32), actions))

    return run


def held(*phases) -> np.ndarray:
    """Actions over time from (action, steps)."""
    return np.concatenate([np.tile(action, (steps, 1)) for action, steps in phases])


def pushed(env: Arm, qpos, qvel, actions) -> np.ndarray:
    """Positions (cases, time, ...) after each action, by plain MuJoCo."""
    data, physics, seen = mujoco.MjData(env.model), Physics(*[jnp.zeros(1)] * 3), []
    for position, velocity, targets in zip(qpos, qvel, actions):
        mujoco.mj_resetData(env.model, data)
        data.qpos, data.qvel = position, velocity
        for action in targets:
            data.ctrl = env._control(physics, jnp.asarray(action, jnp.float32))
            mujoco.mj_step(env.model, data, 25)
            seen.append(data.qpos.copy())
    return np.reshape(seen, (*actions.shape[:2], -1))


def touching(env: Arm, qpos) -> int:
    """The most contacts that plain MuJoCo counts in any of these positions."""
    data, most = mujoco.MjData(env.model), 0
    for data.qpos in qpos.reshape(-1, env.model.nq):
        mujoco.mj_forward(env.model, data)
        most = max(most, sum(contact.dist < 0 for contact in data.contact))
    return most


@pytest.fixture(scope="module")
def envs():
    return {task: Arm(task) for task in TASKS}


@pytest.fixture(scope="module")
def pushing(envs):
    """Cases of push_easy, by name, in one compiled rollout."""
    slow = np.arange(1, 106)[:, None] * (0.006, 0.006, 0.006, 0.005, 0)
    slow[30:32, 4] = 1
    cases = dict(
        nothing=(pose((0.1, 0.6, 0.07)), held(((0,) * 5, 105))),
        slow=(pose(arm=AT_REST, fingers=0.08), slow),
        lift=(pose((0, 0.79, 0.03)), held(((*ABOVE, -1), 30), ((*DOWN, -1), 30), ((*DOWN, 1), 15), ((*ABOVE, 1), 30))),
        open=(pose((0, 0.79, 0.03)), held(((*ABOVE, -1), 30), ((*DOWN, -1), 45), ((*ABOVE, -1), 30))),
    )
    qpos, actions = (np.stack(column) for column in zip(*cases.values()))
    states = rollout(envs["push_easy"])(qpos, actions)
    by_name = {name: jax.tree.map(lambda leaf, i=i: leaf[i], states) for i, name in enumerate(cases)}
    return SimpleNamespace(env=envs["push_easy"], cases=cases, all=states, **by_name)


@pytest.fixture(scope="module")
def throws(envs):
    """A cube slides at 3 m/s from the middle of each bin of binpick_hard towards each of its walls, 8 cases; and the
    arm pushes at random at bins, cube and table, 8 cases."""
    env = envs["binpick_hard"]
    centres = np.repeat([(-0.3, 0.6), (0.3, 0.6)], 4, axis=0)
    directions = np.tile([(1, 0), (-1, 0), (0, 1), (0, -1)], (2, 1))
    qpos = np.stack([pose((*centre, 0.03)) for centre in centres])
    qvel = np.zeros((8, env.model.nv))
    qvel[:, :2] = 3 * directions
    # low targets, each for 6 steps; MuJoCo goes on with them
    random = np.random.default_rng(0).uniform((-1, 0.6, 0.1, 0.5, -1), (1, 1, 0.6, 1, 1), (8, 5, 5)).repeat(6, axis=1)
    actions = np.concatenate([np.zeros((8, 10, 5)), random[:, :10]])
    qpos, qvel = (np.concatenate([x, x]) for x in (qpos, qvel))
    states = rollout(env)(qpos, actions, qvel)
    along = ((states.observation[:8, :, :2] - centres[:, None]) * directions[:, None]).sum(-1)
    further = pushed(env, qpos[8:], qvel[8:], random)
    return SimpleNamespace(env=env, qpos=qpos, qvel=qvel, actions=actions, states=states, along=along, further=further)


def test_action_0_settles_where_the_published_arm_does(pushing):
    after = pushing.nothing.observation[39]
    np.testing.assert_allclose(after[3:10], AT_REST, atol=1e-3)
    np.testing.assert_allclose(after[10:13], (0, 0.753, 0.546), atol=1e-3)
    np.testing.assert_allclose(pushing.nothing.physics.qpos[39, -2:], 0.08, atol=1e-3)
    np.testing.assert_allclose(after[16], 0.16, atol=1e-3)


def test_cube_drops_from_7_cm_and_comes_to_rest_on_the_table(pushing):
    np.testing.assert_allclose(pushing.nothing.observation[39, :3], (0.1, 0.6, 0.03), atol=1e-3)
    assert pushing.nothing.observation[0, 2] > 0.05  # it fell g / 2 * (0.05 s)^2 = 1.2 cm in the first step


def test_gripper_lifts_a_cube_only_if_it_closes(pushing):
    lifted, left = pushing.lift.observation, pushing.open.observation
    assert lifted[-1, 2] > 0.15 and abs(lifted[74, 2] - 0.03) < 2e-3
    np.testing.assert_allclose(lifted[-1, 16], 0.06 - 0.001, atol=2e-3)  # pads stand 0.5 mm from the fingers' origins
    np.testing.assert_allclose(left[:, :3], np.broadcast_to((0, 0.79, 0.03), (105, 3)), atol=2e-3)
    np.testing.assert_allclose(lifted[:, 10:13], left[:, 10:13], atol=0.03)  # the same movement, and a cube's weight


def test_motion_agrees_with_plain_mujoco(pushing):
    """60 steps of the arm, the gripper closing for a moment, and a cube that rests far away.

    So slow that no servo reaches its limit, where mujoco.mjx (as published) and plain MuJoCo (since) integrate
    differently.
    """
    env, (qpos, actions) = pushing.env, pushing.cases["slow"]
    data, low_and_high = (
        mujoco.MjData(env.model),
        [(0.3491, 2.7925), (0, 1.48353), (-3.0718, -0.0698), (2.3562, 3.7525)],
    )
    data.qpos = qpos
    low, high = np.array(low_and_high).T
    load = 0
    for action in actions[:60]:
        joint1, joint2, joint4, joint6 = (low + high) / 2 + action[:4] * (high - low) / 2
        finger = 0 if action[4] > 0 else 255
        data.ctrl = joint1, joint2, 0, joint4, 0, joint6, 1.4487, finger, finger
        for _ in range(25):
            mujoco.mj_step(env.model, data)
            load = max(load, (np.abs(data.actuator_force) / env.model.actuator_forcerange[:, 1]).max())
    assert load < 1
    physics = jax.tree.map(lambda leaf: leaf[59], pushing.slow.physics)
    assert (np.abs(data.qpos - qpos)[[7, 8, 10, 12]] > (0.3, 0.2, 0.2, 0.07)).all()  # it does move
    assert pushing.slow.physics.qpos[31, -1] < 0.07
    np.testing.assert_allclose(physics.qpos, data.qpos, atol=1e-4)
    np.testing.assert_allclose(physics.qvel, data.qvel, atol=1e-3)


@pytest.mark.slow
def test_a_step_is_that_of_mjx(pushing):
    """Of a cube between the closing fingers; mjx's own step is slow."""
    env = pushing.env
    stages = jax.tree.map(lambda leaf: jnp.asarray(leaf[60:62]), pushing.lift.physics)
    control = jnp.array([1.6, 1.3, 0, -0.9, 0, 3.8, 1.4, 0, 0])

    def substep(step):
        def one(physics):
            data = env._data.replace(
                qpos=physics.qpos, qvel=physics.qvel, qacc_warmstart=physics.warmstart, ctrl=control
            )
            data = step(data)
            return data.qpos, data.qvel, data.qacc

        return jax.jit(jax.vmap(one))(stages)

    ours = substep(lambda data: mjx_physics._step(env.model, env.mjx_model, data))
    theirs = substep(lambda data: mjx_physics.mjx.step(env.mjx_model, data))
    for a, b, tolerance in zip(ours, theirs, (1e-6, 1e-4, 0.05)):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-4)


def test_poses_are_those_of_the_observation(pushing):
    positions, rotations = pushing.env.poses(pushing.all)
    assert positions.shape == (4, 105, 10, 3) and rotations.shape == (4, 105, 10, 4)
    np.testing.assert_allclose(positions[:, :, 0], pushing.all.observation[..., :3], atol=1e-6)
    np.testing.assert_allclose(positions[:, :, 7], pushing.all.observation[..., 10:13], atol=1e-5)
    np.testing.assert_allclose(rotations[:, :, 0], pushing.all.physics.qpos[..., 3:7], atol=1e-5)


def test_cube_does_not_pass_the_walls_of_a_bin(throws):
    """Inside faces are 0.185 m from the middle, the cube's half is 0.03 m; friction alone stops it after 0.46 m."""
    assert throws.along.max() < 0.155 + 0.01
    assert (throws.along.max(axis=1) > 0.15).all()  # it did get there
    assert throws.states.observation[:8, :, 2].max() < 0.066


def test_contact_points_left_out_do_not_touch(pushing, throws):
    """Plain MuJoCo counts up to twice as many points between two boxes, all of them touching."""
    assert 4 < touching(pushing.env, pushing.all.physics.qpos) <= 28
    assert 4 < touching(throws.env, throws.states.physics.qpos) <= 32
    assert 4 < touching(throws.env, throws.further) <= 32


@pytest.mark.slow
def test_leaving_out_contact_points_changes_nothing(throws):
    env = Arm("binpick_hard", all_contacts=True)
    states = rollout(env)(throws.qpos, throws.actions[:, :5], throws.qvel)
    difference = np.abs(states.observation - throws.states.observation[:, :5])
    assert difference[:8].max() < 1e-3
    # after 75 substeps rounding grows: a cube moved by a micrometre is 3 mm off at step 4
    assert difference[8:, :3].max() < 1e-4


def test_reach_rewards_the_wrist_within_10_cm_after_the_step(envs):
    env, rest = envs["reach"], np.array((0.000, 0.753, 0.546))
    offsets = np.array([(0, 0, 0.095), (0, 0, 0.105), (0, -0.095, 0), (0.105, 0, 0), (0.06, 0.06, 0.06)])
    goals = jnp.asarray(rest + offsets, jnp.float32)
    state_at = jax.jit(jax.vmap(env.state_at, (None, None, 0)))
    states = state_at(jnp.asarray(AT_REST, jnp.float32), jnp.zeros(7), goals)
    assert states.reward.tolist() == [0] * 5
    step = jax.jit(jax.vmap(env.step))
    for _ in range(5):
        states = step(states, jnp.zeros((5, 4)))
    np.testing.assert_allclose(states.observation[0, :7], AT_REST, atol=1e-3)
    np.testing.assert_allclose(states.observation[0, 7:10], rest, atol=1e-3)
    assert states.reward.tolist() == [1, 0, 1, 0, 0]
    np.testing.assert_array_equal(states.goal, goals)
    assert not states.terminated.any()


def test_floating_hand_moves_by_targets_and_lifts_the_cube(envs):
    env = envs["binpick_easy_EEF"]
    start = np.array([-0.17, 0.6, 0.03, 1, 0, 0, 0, -0.17, 0.6, 0.4, 0.04, 0.04])
    up, still, down = (0, 0, 1, 1), (0, 0, 0, -1), (0, 0, -1, -1)
    cases = [
        held((still, 40)),
        held(((0.1, 0, 0, -1), 1), (still, 39)),
        held((down, 15), ((0, 0, 0, 1), 10), (up, 15)),
        held((down, 15), (still, 10), ((0, 0, 1, -1), 15)),
        held(((1, 1, 1, -1), 40)),
    ]
    seen = rollout(env)([start] * 5, cases).observation
    np.testing.assert_allclose(seen[0, :, 3:6], [start[7:10]] * 40, atol=1e-3)  # weightless
    np.testing.assert_allclose(seen[0, -1, 9], 0.16, atol=1e-3)
    assert 0.002 < seen[1, -1, 3] - start[7] < 0.02  # towards a target 2 cm away
    assert seen[2, -1, 2] > 0.2 and seen[3, -1, 2] < 0.031
    np.testing.assert_allclose(seen[2, 14, 5], 0.25, atol=2e-3)  # no lower
    np.testing.assert_allclose(seen[4, -1, 3:6], (0.5, 0.9, 0.6), atol=2e-3)  # and no further


@pytest.mark.parametrize("task", ["reach", "push_easy", "grasp", "binpick_easy_EEF"])
def test_observation_is_what_plain_mujoco_says(envs, task):
    """Positions from its forward kinematics, the wrist's velocity from their differences over 10 microseconds."""
    env, rng = envs[task], np.random.default_rng(0)
    model, data = env.model, mujoco.MjData(env.model)
    qpos, qvel = rng.uniform(-1, 1, (16, model.nq)), rng.uniform(-1, 1, (16, model.nv))
    cube = task != "reach"
    if cube:
        qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
        qpos[:, -2:] = rng.uniform(0, 0.08, (16, 2))
    goal = jnp.zeros(len(env.goal_indices))
    state_at = jax.jit(jax.vmap(env.state_at, (0, 0, None)))
    seen = np.asarray(state_at(jnp.asarray(qpos, jnp.float32), jnp.asarray(qvel, jnp.float32), goal).observation)
    assert seen.shape == (16, env.observation_size)
    for case in range(16):
        wrist, moved = [], qpos[case].copy()
        for seconds in (-1e-5, 2e-5):
            mujoco.mj_integratePos(model, moved, qvel[case], seconds)
            data.qpos = moved
            mujoco.mj_forward(model, data)
            wrist.append(data.body("link7").xpos.copy())
        data.qpos = qpos[case]
        mujoco.mj_forward(model, data)
        expected = [data.body("cube").xpos] if cube else []
        if task != "binpick_easy_EEF":
            expected.append(qpos[case, 7 * cube :][:7])
        expected += [data.body("link7").xpos, (wrist[1] - wrist[0]) / 2e-5]
        if cube:
            left, right = data.body("left_finger"), data.body("right_finger")
            expected.append([np.linalg.norm(left.xpos - right.xpos)])
            np.testing.assert_allclose(expected[-1], qpos[case, -2:].sum(), atol=1e-6)
        if task == "grasp":
            expected += [finger.xpos + finger.xmat.reshape(3, 3) @ (0, 0, 0.075) for finger in (left, right)]
        np.testing.assert_allclose(seen[case], np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize(
    "task, observation, action, goal",
    [("reach", 13, 4, (7, 8, 9)), ("push_hard", 17, 5, (0, 1, 2)), ("grasp", 23, 5, (17, 18, 19, 20, 21, 22, 16))],
)
def test_sizes(envs, task, observation, action, goal):
    env = envs[task]
    assert (env.observation_size, env.action_size, env.goal_indices) == (observation, action, goal)
    assert (env.success_radius, dict(env.other_radii)) == (0.1, {"easy": 0.3, "hard": 0.03})
    assert env.name == f"arm_{task}"
    assert abs(env.control_step - 0.05) < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_resets_are_uniform_over_the_published_regions(envs, task):
    env, (cube, goal, goal_range) = envs[task], REGIONS[task]
    keys = jax.random.split(jax.random.key(0), 4096)

    def draw(key):  # without the observation, which takes seconds to compile
        state = env.reset(key)
        return state.physics, state.goal, env.sample_goal(key)

    physics, goals, sampled = jax.device_get(jax.jit(jax.vmap(draw))(keys))
    np.testing.assert_array_equal(physics.qvel, 0)

    def check(values, centre, half):
        if half == 0:
            np.testing.assert_allclose(values, centre, atol=1e-6)
        else:
            assert np.abs(values - centre).max() < half + 1e-6
            assert stats.kstest(values, stats.uniform(centre - half, 2 * half).cdf).pvalue > 0.001

    if cube:
        x, y, half_width = cube
        start = [(x, half_width), (y, half_width), (0.07, 0)]
        for axis in range(3):
            check(physics.qpos[:, axis], *start[axis])
        np.testing.assert_array_equal(physics.qpos[:, 3:7], [(1, 0, 0, 0)] * 4096)
        np.testing.assert_array_equal(physics.qpos[:, -2:], np.float32(0.04))
        assert abs(np.corrcoef(physics.qpos[:, 0], physics.qpos[:, 1])[0, 1]) < 0.06
    if task != "binpick_easy_EEF":
        np.testing.assert_allclose(physics.qpos[:, 7 * bool(cube) :][:, :7], [START] * 4096, atol=1e-6)
    if goal:
        for drawn in (goals, sampled):
            for axis in range(3):
                check(drawn[:, axis], goal[axis], goal_range[axis])
        if cube:
            assert abs(np.corrcoef(physics.qpos[:, 0], goals[:, 0])[0, 1]) < 0.06
    else:
        for drawn in (goals, sampled):
            for axis in range(3):
                check((drawn[:, axis] + drawn[:, 3 + axis]) / 2, *start[axis])


def test_start_pose(envs):
    """Of the wrist: reset's observation in one task with the arm, as its layout is tested above."""
    state = jax.jit(envs["push_easy"].reset)(jax.random.key(0))
    np.testing.assert_allclose(state.observation[3:10], START, atol=1e-6)
    np.testing.assert_allclose(state.observation[10:13], (-0.0001, 0.678, 0.371), atol=1e-3)
    np.testing.assert_allclose(state.observation[13:17], (0, 0, 0, 0.08), atol=1e-6)


@pytest.mark.parametrize("task", FULL)
def test_contact_pairs_points_and_constraint_rows(envs, task):
    pairs, points, rows = FULL[task]
    for env, kept in ((Arm(task, all_contacts=True), points), (envs[task], min(points, 32))):
        assert env.model.npair == pairs
        data = mjx.make_data(env.model, impl="jax")
        assert (data._impl.ncon, data._impl.nefc) == (kept, rows - 4 * (points - kept))


def test_bodies_touch_only_in_the_published_pairs(envs):
    def pairs(task):
        model = envs[task].model
        assert not model.geom_contype.any() and not model.geom_conaffinity.any()
        np.testing.assert_array_equal(model.pair_dim, 3)
        np.testing.assert_array_equal(model.pair_friction, [(1, 1, 0.005, 1e-4, 1e-4)] * model.npair)
        np.testing.assert_array_equal(model.pair_solref, [(0.02, 1)] * model.npair)
        np.testing.assert_array_equal(model.pair_solimp, [(0.9, 0.95, 0.001, 0.5, 2)] * model.npair)
        np.testing.assert_array_equal(model.pair_margin, 0)
        return {frozenset((model.geom(a).name, model.geom(b).name)) for a, b in zip(model.pair_geom1, model.pair_geom2)}

    left, right = "left_finger", "right_finger"
    push = {("cube", "table"), ("cube", "hand"), ("cube", left), ("cube", right), ("table", "hand"), ("table", left)}
    push |= {("table", right), (left, right)}
    assert pairs("push_easy") == set(map(frozenset, push))
    assert pairs("reach") == {frozenset(("table", "hand"))}
    more = pairs("binpick_hard") - pairs("push_easy")
    walls = {side + wall for side in ("left_bin_", "right_bin_") for wall in ("front", "back", "outer", "inner")}
    assert more == {frozenset((wall, moving)) for wall in walls for moving in ("cube", "hand", left, right)}


def test_masses_and_inertias_are_the_published_ones(envs):
    model = envs["push_hard"].model
    assert {model.body(i).name for i in range(1, model.nbody)} == set(MASSES)
    for name, mass in MASSES.items():
        np.testing.assert_allclose(model.body(name).mass, mass, rtol=1e-9)
    for name, (xx, yy, zz, xy, xz, yz) in INERTIAS.items():
        axes = np.empty(9)
        mujoco.mju_quat2Mat(axes, model.body(name).iquat)
        axes = axes.reshape(3, 3)
        tensor = axes @ np.diag(model.body(name).inertia) @ axes.T
        np.testing.assert_allclose(tensor, [(xx, xy, xz), (xy, yy, yz), (xz, yz, zz)], atol=1e-9)
    for name, centre in CENTRES.items():
        np.testing.assert_allclose(model.body(name).ipos, centre, atol=1e-9)


def test_joints_servos_and_solver_are_the_published_ones(envs):
    model = envs["push_easy"].model
    limits = {model.joint(i).name: model.jnt_range[i].tolist() for i in range(model.njnt) if model.jnt_limited[i]}
    assert limits == dict(
        link2=[-1.7628, 1.7628], link4=[-3.0718, -0.0698], link6=[-0.0175, 3.7525],
        left_finger=[0, 0.08], right_finger=[0, 0.08],
    )  # fmt: skip
    np.testing.assert_array_equal(model.dof_damping, [0] * 13 + [5] * 2)
    np.testing.assert_array_equal(model.dof_armature, [0] * 13 + [0.1] * 2)
    np.testing.assert_array_equal(model.actuator_gainprm[:, 0], [gain for gain, _ in GAINS])
    np.testing.assert_array_equal(model.actuator_biasprm[:, :3], [(0, -k, -k / 10) for _, k in GAINS])
    np.testing.assert_array_equal(model.actuator_forcerange[:, 1], [87] * 4 + [12] * 3 + [500] * 2)
    np.testing.assert_array_equal(model.actuator_forcerange[:, 0], -model.actuator_forcerange[:, 1])
    fingers = [(0, 255)] * 2
    ranges = [2.8973, 1.7628, 2.8973, None, 2.8973, None, 2.8973]
    ranges = [(-limit, limit) if limit else None for limit in ranges]
    ranges[3], ranges[5] = (-3.0718, -0.0698), (-0.0175, 3.7525)
    np.testing.assert_array_equal(model.actuator_ctrlrange, ranges + fingers)
    assert model.neq == 1
    np.testing.assert_array_equal(model.eq_solref[0], (0.005, 1))
    np.testing.assert_array_equal(model.eq_solimp[0, :3], (0.95, 0.99, 0.001))
    option = model.opt
    assert (option.iterations, option.ls_iterations, option.timestep) == (6, 12, 0.002)
    assert option.integrator == mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    assert option.solver == mujoco.mjtSolver.mjSOL_NEWTON and option.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    assert {task: env.model.opt.impratio for task, env in envs.items() if env.model.opt.impratio != 1} == {
        "binpick_easy": 10, "binpick_hard": 10, "binpick_easy_EEF": 10,
    }  # fmt: skip


@pytest.mark.parametrize("task, centre, offset", [("binpick_hard", 0.3, 0.19), ("binpick_easy", 0.17, 0.14)])
def test_bins_stand_where_published(envs, task, centre, offset):
    model = envs[task].model
    walls = [i for i in range(model.ngeom) if "bin" in model.geom(i).name]
    found = {tuple(np.round([*model.geom_pos[i], *model.geom_size[i]], 6).tolist()) for i in walls}
    expected = set()
    for x in (-centre, centre):
        for side in (-offset, offset):
            expected.add((x, 0.6 + side, 0.033, offset + 0.005, 0.005, 0.033))
            expected.add((x + side, 0.6, 0.033, 0.005, offset - 0.005, 0.033))
    assert found == {tuple(np.round(wall, 6).tolist()) for wall in expected}


def test_actions_are_target_angles(envs):
    env = envs["push_easy"]
    physics = Physics(jnp.asarray(pose()), jnp.zeros(15), jnp.zeros(15))
    targets = [np.asarray(env._control(physics, jnp.full(5, a))) for a in (-1.0, 0.0, 1.0)]
    expected = [
        (0.3491, 0, 0, -3.0718, 0, 2.3562, 1.4487, 255, 255),
        (1.5708, 0.741765, 0, -1.5708, 0, 3.05435, 1.4487, 255, 255),
        (2.7925, 1.48353, 0, -0.0698, 0, 3.7525, 1.4487, 0, 0),
    ]
    np.testing.assert_allclose(targets, expected, atol=1e-5)
    np.testing.assert_allclose(envs["reach"]._control(physics, jnp.ones(4)), expected[2][:7], atol=1e-5)


def test_grasp_goal_follows_the_cube_and_is_rewarded_within_10_cm(envs, monkeypatch):
    env = Arm("grasp")
    monkeypatch.setattr(env, "advance", lambda physics, control: physics._replace(qpos=physics.qpos.at[0].add(0.1)))
    step = jax.jit(lambda qpos: env.step(env.state_at(qpos, jnp.zeros(15), jnp.zeros(7)), jnp.zeros(5)))
    after = step(pose((0.1, 0.5, 0.03)))
    left, right, opening = np.split(np.asarray(after.goal), [3, 6])
    np.testing.assert_allclose((left + right) / 2, (0.2, 0.5, 0.03), atol=1e-6)
    np.testing.assert_allclose(left - right, 0.075 * np.array([0.5, -0.2, 0]) / np.hypot(0.2, 0.5), atol=1e-6)
    np.testing.assert_allclose(opening, 0.075)
    np.testing.assert_allclose(env.goal_position(after), (0.2, 0.5, 0.03), atol=1e-6)
    assert after.reward == 0
    # a cube between the fingers, which point downwards over (0, 0.79), on the side that is the left one's
    around = step(pose((-0.1, 0.786, 0.03), (1.571, 1.384, 0, -0.517, 0, 1.875, 0.724), 0.0375))
    assert around.reward == 1
    np.testing.assert_allclose(env.achieved_goal(around.observation), around.goal, atol=0.03)


@pytest.mark.parametrize("missing", ["pickup", "push"])
def test_unknown_task_is_answered_with_all(missing):
    with pytest.raises(ValueError, match=rf"unknown task '{missing}'; there are reach, push_easy, .*grasp") as error:
        Arm(missing)
    assert "\n" not in str(error.value)


def test_drawn_arm_connects_the_origins_of_its_links(envs):
    env, data = envs["reach"], mujoco.MjData(envs["reach"].model)
    data.qpos = AT_REST
    mujoco.mj_kinematics(env.model, data)
    origins, found = data.xpos, set()
    for shape in env.shapes:
        if shape.kind == "capsule":
            body, axis, end = shape.link + 1, np.empty(9), np.array([0, 0, shape.size[1]])
            mujoco.mju_quat2Mat(axis, np.array(shape.rotation))
            ends = np.array(shape.position) + np.array([end, -end]) @ axis.reshape(3, 3).T
            ends = origins[body] + ends @ data.xmat[body].reshape(3, 3).T
            gaps = np.linalg.norm(origins[:, None] - ends, axis=-1)
            if (gaps.min(axis=0) < 1e-6).all():
                found.add(tuple(gaps.argmin(axis=0).tolist()))
    assert found == {(1, 0), (3, 1), (4, 3), (5, 4), (7, 5)}  # 0 is the base; 1 and 2, and 5 and 6, are in one place


@pytest.mark.parametrize("task", TASKS)
def test_states_are_rendered(envs, task, tmp_path):
    env = envs[task]
    for shape in env.shapes:
        np.testing.assert_allclose(np.linalg.norm(shape.rotation), 1, atol=1e-6)
    qpos, goal = jnp.asarray(env._start), jnp.full(len(env.goal_indices), 0.5)
    states = GoalState(Physics(qpos, qpos, qpos), qpos, goal, jnp.zeros(()), jnp.zeros((), bool))
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, 3, *leaf.shape)), states)
    path = env.render(states, str(tmp_path / "scene"))
    assert path.endswith(".html") and env.name in (tmp_path / "scene.html").read_text(encoding="utf-8")
