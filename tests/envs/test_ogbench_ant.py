"""OGBench's ant in other processes: the package's own episodes, bit for bit, and crl_offline.py on its data."""

import importlib.metadata
import json
import signal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Script

import envs
from algorithms import crl_offline

pytest.importorskip("ogbench", reason="it cannot be installed on Python 3.13")  # registers its environments


@pytest.fixture(scope="module")
def env():
    env = envs.make("antmaze_medium", workers=2)
    yield env
    env.close()


@pytest.fixture(scope="module")
def episodes(env):
    """Three episodes of 30 steps: states, time first."""
    keys, actions = jax.random.split(jax.random.key(0), 3), jax.random.uniform(jax.random.key(1), (30, 3, 8), minval=-1)
    start = jax.jit(jax.vmap(env.begin))(jnp.array([4, 0, 2]), keys)

    def step(state, action):
        state = jax.vmap(env.step)(state, action)
        return state, state

    return keys, actions, start, jax.jit(lambda s: jax.lax.scan(step, s, actions)[1])(start)


def test_episodes_are_the_packages_own(env, episodes):
    keys, actions, start, states = episodes
    for i, task in enumerate((5, 1, 3)):
        own = gymnasium.make("antmaze-medium-v0").unwrapped
        seed = int(jax.random.randint(keys[i], (), 0, 2**31 - 1))
        np.random.seed(seed)
        own.action_space.seed(seed)
        observation, info = own.reset(seed=seed, options={"task_id": task})
        np.testing.assert_array_equal(start.observation[i], np.float32(observation))
        np.testing.assert_array_equal(start.goal[i], np.float32(info["goal"]))
        assert np.linalg.norm(start.goal[i, :2] - env.tasks[task - 1, 1]) < 2**0.5
        for action, seen in zip(actions[:, i], states.observation[:, i]):
            observation, *_ = own.step(np.asarray(action))
            np.testing.assert_array_equal(seen, np.float32(observation))
    assert np.abs(states.observation[-1] - start.observation)[:, :2].max() > 0.1, "they move"


def test_a_goal_is_reached_where_the_package_says_so(env, episodes):
    """At distances below and above 0.5, measured on its own environment."""
    state = jax.tree.map(lambda x: x[0], episodes[2])
    own = gymnasium.make("antmaze-medium-v0").unwrapped
    own.reset(seed=0, options={"task_id": 1})
    after = env.step(state, jnp.zeros(8))
    for angle, distance in ((0.3, 0.49), (2.0, 0.51), (4.0, 0.499), (5.0, 0.501), (1.0, 3.0)):
        place = after.observation[:2] + distance * jnp.array([np.cos(angle), np.sin(angle)])
        reached = env.step(env.with_goal(state, state.goal.at[:2].set(place)), jnp.zeros(8)).reward
        own.set_goal(goal_xy=np.asarray(place))
        own.set_xy(np.asarray(after.observation[:2]))
        assert bool(reached) == bool(own.compute_success()) == (distance < 0.5)


def test_it_goes_on_from_any_state_bit_for_bit(env, episodes):
    _, actions, _, states = episodes
    env.close()  # new processes follow
    middle = jax.tree.map(lambda x: x[9], states)
    after = jax.vmap(env.step)(middle, actions[10])
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(lambda x: x[10], states))


@pytest.mark.parametrize(
    ("options", "version", "complaint"),
    [
        ({"workers": -1}, "1.2.2", "option workers of antmaze_medium is -1; it is a whole number, 0 or more"),
        ({}, None, r"the package ogbench is not installed; pip install -e '.\[offline\]'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(monkeypatch, options, version, complaint):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(ValueError, match=complaint):
        envs.make("antmaze_medium", **options)


# ---- the command --------------------------------------------------------------------------------------------------

SCRIPT = Script(crl_offline)
TINY = [
    *("--env=antmaze_medium", "--batch_size=16", "--width=16", "--latent_size=16", "--chunk=20"),
    *("--num_eval_episodes=2", "--episode_length=20", "--eval_every=400", "--checkpoint_every=100"),
]


def test_a_file_of_ogbench_trains_is_scored_in_its_environment_and_goes_on_after_a_kill(tmp_path, cache):
    own = gymnasium.make("antmaze-medium-v0").unwrapped
    rows = {"observations": [], "actions": [], "terminals": [], "qpos": [], "qvel": []}
    for episode in range(3):
        observation, _ = own.reset(seed=episode, options={"task_id": 1})
        for t in range(51):
            action = own.action_space.sample()
            row = np.float32(observation), action, t == 50, np.float32(own.data.qpos), np.float32(own.data.qvel)
            for column, value in zip(rows.values(), row):
                column.append(np.copy(value))
            observation = own.step(action)[0]
    data = tmp_path / "antmaze-medium-navigate-v0.npz"
    np.savez(data, **{name: np.array(column) for name, column in rows.items()})

    flags = [*TINY, f"--data={data}", "--total_gradient_steps=1200"]
    done = SCRIPT.run(*flags, f"--run_dir={tmp_path / 'whole'}", cwd=tmp_path, env=cache)
    assert "crl on 150 steps of" in done.stdout
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"curve.png", "rollout.gif", "trajectories.png"}
    folder = tmp_path / "run"
    *_, code = SCRIPT.signalled(signal.SIGKILL, folder, [*flags, f"--run_dir={folder}"], tmp_path, 40, cache)
    assert code == -signal.SIGKILL
    SCRIPT.check_ends_as(tmp_path / "whole", folder, tmp_path, cache)
    config, env, agent = crl_offline.load(folder)
    assert (config.bc_weight, env.observation_size) == (0.1, 29)
    assert json.loads((folder / "config.json").read_text())["config"]["env"] == "antmaze_medium"
    assert abs(crl_offline.policy(agent, jnp.zeros(29), jnp.zeros(29)).mode()).max() <= 1
