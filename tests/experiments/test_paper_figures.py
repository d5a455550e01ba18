"""The programs of the paper's side experiments: collector and learners, residual norms, the path of an embedding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stubs import Fixed, Line

import collectors
import embedding_path
import residual_norms
from algorithms import crl
from shared.networks import ResidualMLP

TINY = dict(
    num_envs=8, episode_length=9, unroll_length=30, min_replay_size=30, max_replay_size=30, batch_size=32, width=8,
    updates_per_chunk=3, total_env_steps=100_000, representation_size=4,
)  # fmt: skip


def equal(one, other):
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


# ---- collector and learners ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun():
    """Three agents of depth 4 with experience: settings and state."""
    config = collectors.Config(depth=4, deep_depth=4, shallow_depth=4, **TINY)
    chunk = lambda key: collectors.collect(config, Line(), collectors.init(config, Line(), key))
    return config, jax.jit(chunk)(jax.random.key(0))


def test_the_collectors_buffer_feeds_all_agents_with_the_same_rows(begun):
    """Of the same depth, and so with the same weights, all three are the agent of crl.py after the same chunk."""
    config, state = begun
    learned, metrics = jax.jit(partial(collectors.learn, config, Line()))(state)
    alone, info = jax.jit(partial(crl.learn, config, Line()))(collectors.apart(state)[0])
    assert not equal(state.agent[0], learned.agent[0])
    for agent, name in zip(learned.agent, collectors.AGENTS):
        for ours, theirs in zip(jax.tree.leaves(agent), jax.tree.leaves(alone.agent)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(metrics[f"train/{name}/critic_loss"], info["train/critic_loss"], rtol=1e-3)
    assert int(learned.gradient_steps) == config.updates_per_chunk


def test_a_learner_never_acts(begun):
    config, state = begun
    other = lambda agent: jax.tree.map(lambda x: x + 1.0, agent)
    collector, deep, shallow = state.agent
    collect = jax.jit(partial(collectors.collect, config, Line()))
    data = lambda *agents: collect(state._replace(agent=agents)).replay.data
    assert equal(data(*state.agent), data(collector, other(deep), other(shallow)))
    assert not equal(data(*state.agent), data(other(collector), deep, shallow))


def test_depths_are_those_of_the_flags_and_learning_changes_all():
    config = collectors.Config(depth=4, deep_depth=8, shallow_depth=4, **TINY)
    state = jax.eval_shape(partial(collectors.init, config, Line()), jax.random.key(0))
    assert [agent.actor.blocks.layers.dense.weight.shape[0] for agent in state.agent] == [1, 2, 1]
    scores = jax.eval_shape(partial(collectors.evaluate, config, Line(), None), state.agent, jax.random.key(0))
    assert {"eval/collector/time_at_goal", "eval/deep/success_any", "eval/shallow/sampled/distance"} <= set(scores)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--critic_depth=8", "the depths are --depth, --deep_depth and --shallow_depth"),
        ("--checkpoint_replay=false", "checkpoints hold the replay here"),
        ("--deep_depth=6", "deep_depth is 6"),
    ],
)
def test_flags_without_effect_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit):
        collectors.main(["collectors.py", flag])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# ---- residual norms and embeddings ---------------------------------------------------------------------------------


def test_branch_norms_equal_numpy():
    network = ResidualMLP(3, 6, 8, 2, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(5, 3))

    def layer(weights, x, index=()):
        dense, norm = weights.dense, weights.norm
        x = np.asarray(dense.weight, float)[index] @ x + np.asarray(dense.bias, float)[index]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        x = x * np.asarray(norm.weight)[index] + np.asarray(norm.bias)[index]
        return x / (1 + np.exp(-x))

    norms = np.zeros((5, 2))
    for row, example in enumerate(x):
        stream = layer(network.stem, example)
        for block in range(2):
            branch = stream
            for i in range(4):
                branch = layer(network.blocks.layers, branch, (block, i))
            norms[row, block] = np.linalg.norm(branch)
            stream = stream + branch
    np.testing.assert_allclose(residual_norms.branch_norms(network, jnp.array(x)), norms, rtol=1e-4)


class Towards(Fixed):
    def mode(self):
        return self.action


def test_a_path_is_phi_until_the_robot_arrives(monkeypatch):
    """A robot that goes 0.12 a step is within 0.2 of its goal, at -1 or 1, after the seventh."""
    config = crl.Config(**TINY)
    agent = crl.make_agent(config, Line(), jax.random.key(0))
    monkeypatch.setattr(crl, "policy", lambda agent, observation, goal: Towards(None, 0.48 * goal))
    phi, at_goal = map(np.asarray, embedding_path.played(config, Line(), None, agent, jax.random.key(0)))
    np.testing.assert_array_equal(at_goal[:, 0], np.arange(1, 10) >= 7)
    monkeypatch.setattr(embedding_path, "SHORTEST", 6)
    found = embedding_path.until_the_goal(phi, at_goal)
    assert len(found) == embedding_path.EPISODES
    at = lambda sign: [agent.critic.phi(jnp.array([sign * 0.12 * i, sign * 0.48], jnp.float32)) for i in range(1, 8)]
    exact = [np.stack(at(sign)) for sign in (-1, 1)]
    for path in found:
        assert len(path) == 7 and any(np.allclose(path, each, rtol=1e-3, atol=1e-4) for each in exact)
    monkeypatch.setattr(embedding_path, "SHORTEST", 7)
    assert embedding_path.until_the_goal(phi, at_goal) == []
    assert embedding_path.until_the_goal(phi, np.zeros_like(at_goal)) == []


@pytest.mark.parametrize("points", [11, 12, 14, 21])
def test_the_share_of_a_straight_path_is_a_fifth_and_of_a_late_one_all(points):
    even = np.outer(np.arange(points), [3.0, 4.0])
    assert embedding_path.late_share(even) == pytest.approx(0.2)
    late = np.zeros((points, 2))
    late[-1] = 1
    assert embedding_path.late_share(late) == 1
    assert embedding_path.late_share(late[::-1]) == pytest.approx(0)


class Falls(Line):
    """The robot goes 1 a step and falls at its third; there it stays."""

    def step(self, state, action):
        moved = state._replace(physics=state.physics + 1.0, observation=state.physics + 1.0)
        return moved._replace(terminated=moved.observation[0] >= 3)


def test_residual_norms_are_those_of_the_states_until_a_fall():
    """Positions 1, 2 and 3, and the goal, in each episode."""
    config = crl.Config(**TINY)
    agent = crl.make_agent(config, Line(), jax.random.key(0))
    norms = residual_norms.of_seed(config, Falls(), agent, jax.random.key(1))
    goals = jax.vmap(Line().sample_goal)(
        jax.random.split(jax.random.split(jax.random.key(1), 3)[0], residual_norms.EPISODES)
    )
    rows = jnp.array([[position, *goal] for position in (1.0, 2.0, 3.0) for goal in np.asarray(goals)])
    actor = residual_norms.branch_norms(agent.actor, rows).mean(axis=0)
    psi = residual_norms.branch_norms(agent.critic.psi, rows[:, 1:]).mean(axis=0)
    np.testing.assert_allclose(norms["actor"], actor, rtol=1e-4)
    np.testing.assert_allclose(norms["psi"], psi, rtol=1e-4)
    assert norms["phi"].shape == (1,) and abs(norms["phi"] - norms["actor"]) > 1e-3


def test_programs_name_what_is_no_run(tmp_path, capsys):
    for program in (residual_norms, embedding_path):
        for argv, message in (([], "name run folders"), ([str(tmp_path)], "is not a run folder")):
            with pytest.raises(SystemExit):
                program.main(["program.py", *argv])
            assert message in capsys.readouterr().err


def test_residual_norms_of_a_run_are_means_over_its_seeds(tmp_path, capsys, monkeypatch):
    flags = ["--num_envs=8", "--episode_length=9", "--unroll_length=9", "--min_replay_size=18", "--max_replay_size=27"]
    flags += ["--batch_size=8", "--updates_per_chunk=1", "--width=8", "--num_eval_envs=2", "--total_env_steps=160"]
    crl.main(["crl.py", *flags, "--depth=8", "--num_seeds=2", f"--run_dir={tmp_path / 'run'}"])
    agents = [crl.load(tmp_path / "run", seed)[2] for seed in (0, 1)]
    capsys.readouterr()
    first = lambda config, env, agent, key: {"psi": agent.critic.psi.head.weight[0, :2]}
    monkeypatch.setattr(residual_norms, "of_seed", first)
    residual_norms.main(["residual_norms.py", str(tmp_path / "run")])
    folder, network, *values = capsys.readouterr().out.split()
    assert (folder, network) == (str(tmp_path / "run"), "psi")
    expected = np.mean([agent.critic.psi.head.weight[0, :2] for agent in agents], axis=0)
    np.testing.assert_allclose([float(x) for x in values], expected, rtol=1e-2)
