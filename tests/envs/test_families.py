"""Task families: rewards and observations against NumPy on C MuJoCo's states, distributions of tasks, physics."""

import copy
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from scipy import stats

import envs

ROBOTS = ("half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_goal", "humanoid_dir", "walker_params")
SIZES = {  # observation, action, task, what an oracle is told, train and test tasks
    "point_goal": (2, 2, 2, 2, 80, 20),
    "sparse_point_goal": (2, 2, 2, 2, 80, 20),
    "half_cheetah_dir": (20, 6, 1, 1, 2, 2),
    "half_cheetah_vel": (20, 6, 1, 1, 100, 30),
    "ant_dir": (27, 8, 1, 2, 2, 2),
    "ant_goal": (29, 8, 2, 2, 150, 30),
    "humanoid_dir": (292, 17, 1, 2, 100, 30),
    "walker_params": (17, 6, 65, 65, 40, 10),
}
CONTROL_STEP = {"half_cheetah": 0.05, "ant": 0.05, "humanoid": 0.015, "walker": 0.016}
NUM_ENVS, STEPS = 64, 12


class Rollout:
    """64 copies with tasks of their own, acting at random for a few steps."""

    def __init__(self, name):
        self.env = env = envs.make(name)
        step = lambda state, action: (after := jax.vmap(env.step)(state, action), after)
        self.play = jax.jit(lambda start, actions: jax.lax.scan(step, start, actions)[1])
        shape = STEPS, NUM_ENVS, env.action_size
        self.actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        start = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), NUM_ENVS))
        start, states = jax.device_get((start, self.play(start, self.actions)))
        self.states = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), start, states)


played = functools.cache(Rollout)


@pytest.fixture(params=ROBOTS)
def rollout(request):
    return played(request.param)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_fact_sheet(name):
    env = envs.make(name)
    sizes = env.observation_size, env.action_size, env.task_size, env.oracle_size
    assert (*sizes, env.num_train_tasks, env.num_test_tasks) == SIZES[name]
    state = jax.eval_shape(env.reset, jax.random.key(0))
    assert state.observation.shape == (env.observation_size,) and state.task.shape == (env.task_size,)
    assert jax.eval_shape(env.oracle, state.task).shape == (env.oracle_size,)
    for robot, seconds in CONTROL_STEP.items():
        if name.startswith(robot):
            assert env.control_step == pytest.approx(seconds)


def test_64_copies_are_reset_and_stepped(rollout):
    assert np.isfinite(rollout.states.observation).all() and np.isfinite(rollout.states.reward).all()
    assert rollout.states.observation.shape == (STEPS + 1, NUM_ENVS, rollout.env.observation_size)
    tasks = rollout.states.task
    np.testing.assert_array_equal(tasks, np.broadcast_to(tasks[0], tasks.shape))


def test_films_are_one_page_that_needs_no_network(rollout, tmp_path):
    film = jax.tree.map(lambda x: x[:2, :2].swapaxes(0, 1), rollout.states)
    page = Path(rollout.env.render(film, str(tmp_path / "film"))).read_text()
    assert rollout.env.name in page and "http" not in page and page.count('"link":') > 1


def numpy_observation(env, data, action):
    """From MuJoCo's own data, with positions of bodies up to date."""
    qpos, qvel = data.qpos, data.qvel
    if env.name.startswith("half_cheetah"):
        return np.concatenate([qpos[1:], qvel, data.body("torso").xpos])
    if env.name == "ant_dir":
        return np.concatenate([qpos[2:], qvel])
    if env.name == "ant_goal":
        return np.concatenate([qpos, qvel])
    if env.name == "walker_params":
        return np.concatenate([data.body("torso").xpos[2:], qpos[2:], np.clip(qvel, -10, 10)])
    force = np.zeros(23)
    for i in range(env.model.nu):
        force[env.model.joint(env.model.actuator_trnid[i, 0]).dofadr[0]] += (
            0.4 * action[i] * env.model.actuator_gear[i, 0]
        )
    return np.concatenate([qpos[2:], qvel, data.cinert.ravel(), data.cvel.ravel(), force])


def forward(env, physics, t, i):
    data = mujoco.MjData(env.model)
    data.qpos, data.qvel = physics.qpos[t, i], physics.qvel[t, i]
    mujoco.mj_forward(env.model, data)
    return data


def test_observations_equal_those_of_mujoco(rollout):
    env, states = rollout.env, rollout.states
    for t, i in ((0, 0), (1, 5), (7, 63), (STEPS, 31)):
        data = forward(env, states.physics, t, i)
        action = np.zeros(env.action_size) if t == 0 else rollout.actions[t - 1, i]
        expected = numpy_observation(env, data, action)
        np.testing.assert_allclose(states.observation[t, i], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def numpy_reward(name, before, after, action, task, seconds):
    """From displacements of named bodies."""
    velocity = (after.body("torso").xpos - before.body("torso").xpos) / seconds
    effort = np.sum(np.square(action.astype(float)))
    if name == "half_cheetah_dir":
        return task[0] * velocity[0] - 0.05 * effort
    if name == "half_cheetah_vel":
        return -abs(velocity[0] - task[0]) - 0.05 * effort
    if name == "ant_dir":
        return velocity[0] * np.cos(task[0]) + velocity[1] * np.sin(task[0]) - 0.5 * effort + 1
    if name == "ant_goal":
        x, y, _ = after.body("torso").xpos
        return -abs(x - task[0]) - abs(y - task[1]) - 0.1 * effort
    if name == "walker_params":
        return velocity[0] + 1 - 0.001 * effort
    mass = before.model.body_mass[:, None]
    centre = [(mass * data.xipos).sum(0) / mass.sum() for data in (before, after)]
    speed = (centre[1] - centre[0]) / seconds
    return 1.25 * (speed[0] * np.cos(task[0]) + speed[1] * np.sin(task[0])) - 0.1 * 0.16 * effort + 5


def test_rewards_equal_numpy_on_recorded_states(rollout):
    env, states = rollout.env, rollout.states
    for t in (1, 4, STEPS):
        for i in range(0, NUM_ENVS, 9):
            before, after = (forward(env, states.physics, s, i) for s in (t - 1, t))
            args = before, after, rollout.actions[t - 1, i], states.task[t, i], env.control_step
            expected = numpy_reward(env.name, *args)
            np.testing.assert_allclose(states.reward[t, i], expected, rtol=2e-4, atol=2e-3)


def test_episodes_end_where_the_fact_sheet_says():
    def ended(name, height, pitch=0.0):
        physics = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), played(name).states.physics)
        qpos = np.array(physics.qpos)
        if name == "walker_params":
            qpos[1], qpos[2] = height - 1.25, pitch
        else:
            qpos[2] = height
        return bool(played(name).env.fallen(physics._replace(qpos=jnp.asarray(qpos))))

    assert [ended("ant_dir", z) for z in (0.19, 0.21, 0.99, 1.01)] == [True, False, False, True]
    assert [ended("ant_goal", z) for z in (0.1, 1.2)] == [False, False]
    assert [ended("humanoid_dir", z) for z in (0.99, 1.01, 1.99, 2.01)] == [True, False, False, True]
    assert [ended("walker_params", z) for z in (0.79, 0.81, 1.99, 2.01)] == [True, False, False, True]
    assert [ended("walker_params", 1.25, pitch) for pitch in (-1.01, -0.99, 0.99, 1.01)] == [True, False, False, True]
    assert [ended(name, z) for name in ("half_cheetah_dir", "half_cheetah_vel") for z in (-5.0, 5.0)] == [False] * 4


# ---- tasks


def drawn(name, number=4000, **options):
    env = envs.make(name, **options)
    return np.asarray(jax.vmap(env.sample_task)(jax.random.split(jax.random.key(1), number)))


def test_distributions_of_tasks():
    uniform = lambda x, low, high: stats.kstest(x, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    velocity = drawn("half_cheetah_vel")[:, 0]
    assert uniform(velocity, 0, 3)
    assert uniform(drawn("humanoid_dir")[:, 0], 0, 2 * np.pi)
    assert uniform(drawn("ant_dir", forward_backward=False)[:, 0], 0, 2 * np.pi)
    for name, pair in (("half_cheetah_dir", (-1, 1)), ("ant_dir", (0, np.pi))):
        tasks = drawn(name)[:, 0]
        assert set(np.round(tasks, 5)) == set(np.round(pair, 5).astype(np.float32))
        assert stats.binomtest(int((tasks == tasks.max()).sum()), len(tasks)).pvalue > 1e-3
    goals = drawn("ant_goal")
    assert uniform(np.sum(goals**2, axis=1), 0, 9), "uniform in the disc: squared radii are"
    assert uniform(np.arctan2(goals[:, 1], goals[:, 0]), -np.pi, np.pi)
    exponents = drawn("walker_params")
    assert all(uniform(exponents[:, i], -3, 3) for i in (0, 7, 8, 31, 32, 40, 41, 64))
    correlation = np.corrcoef(exponents.T) - np.eye(65)
    assert np.abs(correlation).max() < 0.08, "entries are independent"
    goals = drawn("point_goal")
    assert uniform(goals[:, 0], -1, 1) and uniform(goals[:, 1], -1, 1)
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.06


@pytest.mark.parametrize("name", SIZES)
def test_train_and_test_tasks(name):
    env = envs.make(name)
    number = env.num_train_tasks, env.num_test_tasks
    train, test = map(np.asarray, env.tasks(jax.random.key(0), *number))
    assert (len(train), len(test)) == number
    if number == (2, 2):
        np.testing.assert_array_equal(train, test)
        with pytest.raises(ValueError, match="there are 2 tasks"):
            env.tasks(jax.random.key(0), 3, 2)
    else:
        assert len(np.unique(np.concatenate([train, test]), axis=0)) == sum(number), "held-out tasks are others"
        again = np.asarray(env.tasks(jax.random.key(1), *number)[0])
        assert (again != train).any()


def test_sparse_goals_lie_evenly_on_a_half_circle():
    env = envs.make("sparse_point_goal")
    goals = np.concatenate(env.tasks(jax.random.key(0), 80, 20))
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 1, rtol=1e-5)
    angles = np.sort(np.arctan2(np.maximum(goals[:, 1], 0), goals[:, 0]))
    np.testing.assert_allclose(angles, np.linspace(0, np.pi, 100), atol=1e-3)


def test_points_move_by_a_tenth_of_the_action_and_are_paid_for_being_near():
    rng = np.random.default_rng(0)
    for name in ("point_goal", "sparse_point_goal"):
        env = envs.make(name)
        step = jax.jit(env.step)
        near = 0
        for i in range(200):
            state = env.reset(jax.random.key(i))
            if name == "sparse_point_goal":
                np.testing.assert_array_equal(state.observation, 0)
                goal = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
                state = env.with_task(state, jnp.asarray(goal))
            action = rng.uniform(-2, 2, 2).astype(np.float32)
            after = step(state, jnp.asarray(action))
            expected = np.asarray(state.observation) + 0.1 * np.clip(action, -1, 1)
            np.testing.assert_allclose(after.observation, expected, rtol=1e-5, atol=1e-6)
            distance = np.linalg.norm(expected - np.asarray(state.task))
            np.testing.assert_allclose(env.training_reward(after), -distance, rtol=1e-4)
            sparse = 1 - distance if distance <= 0.2 else 0.0
            near += distance <= 0.2
            expected = sparse if name == "sparse_point_goal" else -distance
            np.testing.assert_allclose(after.reward, expected, rtol=1e-4, atol=1e-6)
            assert not bool(after.terminated)
        assert name == "point_goal" or 30 < near < 190


# ---- physics


def test_a_step_is_that_of_mujoco(rollout):
    """From states with contacts, and for the walker with another body in each task."""
    env, states = rollout.env, rollout.states
    worst = []
    for i in range(8):
        for t in (0, 5, STEPS - 1):
            model = copy.copy(env.model)
            if env.name == "walker_params":
                for field, value in env.fields(jnp.asarray(states.task[0, i])).items():
                    getattr(model, field)[:] = value
            data = mujoco.MjData(model)
            data.qpos, data.qvel = states.physics.qpos[t, i], states.physics.qvel[t, i]
            data.qacc_warmstart = states.physics.warmstart[t, i]
            control = rollout.actions[t, i] * (0.4 if env.name == "humanoid_dir" else 1.0)
            data.ctrl = control
            mujoco.mj_step(model, data, round(env.control_step / model.opt.timestep))
            worst.append(np.abs(data.qpos - states.physics.qpos[t + 1, i]).max())
    assert np.median(worst) < 1e-4 and np.max(worst) < 5e-3, worst


def test_walkers_with_other_parameters_move_otherwise_and_only_the_four_fields_vary():
    env = played("walker_params").env
    tasks = jnp.stack([jnp.zeros(65), *(3.0 * jnp.eye(65)[i] for i in (1, 12, 36, 64)), jnp.full(65, -3.0)])
    bodies = [env.body(task) for task in tasks]
    plain = env.mjx_model
    changed = set()
    for body in bodies[1:]:
        for (path, new), old in zip(jax.tree.leaves_with_path(body), jax.tree.leaves(plain)):
            if not np.array_equal(new, old):
                changed.add(path[0].name if hasattr(path[0], "name") else str(path[0]))
    assert changed == {"body_mass", "body_inertia", "dof_damping", "geom_friction"}
    np.testing.assert_allclose(bodies[0].body_mass, env.model.body_mass, rtol=1e-6)
    np.testing.assert_allclose(bodies[1].body_mass[1], env.model.body_mass[1] * 1.5**3, rtol=1e-5)
    np.testing.assert_allclose(
        bodies[3].dof_damping, env.model.dof_damping * 1.3 ** (3 * (np.arange(9) == 4)), rtol=1e-5
    )
    np.testing.assert_allclose(bodies[4].geom_friction[7, 2], env.model.geom_friction[7, 2] * 1.5**3, rtol=1e-5)
    np.testing.assert_allclose(bodies[5].body_inertia, env.model.body_inertia * 1.5**-3, rtol=1e-5)
    states, actions = played("walker_params").states, played("walker_params").actions
    one = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), states)
    start = jax.vmap(env.with_task, (None, 0))(one, jnp.resize(tasks, (NUM_ENVS, 65)))
    after = played("walker_params").play(start, np.repeat(actions[:, :1], NUM_ENVS, axis=1))
    qpos = np.asarray(after.physics.qpos[9])
    assert all(np.abs(qpos[i] - qpos[0]).max() > 1e-4 for i in (1, 2, 3, 5))


def test_oracles_are_told_what_the_fact_sheet_says():
    tell = lambda name, task, **options: np.asarray(envs.make(name, **options).oracle(jnp.asarray(task, jnp.float32)))
    np.testing.assert_allclose(tell("ant_dir", [np.pi]), [-1, 0], atol=1e-6)
    np.testing.assert_allclose(tell("humanoid_dir", [0.3]), [np.cos(0.3), np.sin(0.3)], rtol=1e-5)
    np.testing.assert_allclose(tell("half_cheetah_vel", [1.7]), [1.7])
    np.testing.assert_allclose(tell("ant_goal", [1.0, -2.0]), [1, -2])
    u = np.linspace(-3, 3, 65)
    base = np.repeat([1.5, 1.5, 1.3, 1.5], [8, 24, 9, 24])
    np.testing.assert_allclose(tell("walker_params", u), np.log(base**u), rtol=1e-5, atol=1e-6)
