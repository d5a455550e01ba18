"""crl_offline.py: laws of goals, losses against NumPy and the fact sheet's numbers, data files, the command."""

import dataclasses
import signal
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Script

from algorithms import crl_offline
from envs.ogbench_point import PointMaze
from shared import offline, run

GIVEN = crl_offline.Config(width=16, latent_size=16, batch_size=12, data_rows=2000)
SMALL = crl_offline.settle(GIVEN)
ENV = PointMaze("medium")


@pytest.fixture(scope="module")
def data():
    return offline.demonstrate(ENV, "stitch", 2000, jax.random.key(0))


def agent_of(name, **options):
    config = crl_offline.settle(dataclasses.replace(GIVEN, agent=name, **options))
    return config, crl_offline.make_agent(config, ENV, jax.random.key(1))


@pytest.fixture(scope="module")
def batch(data):
    return crl_offline.sample(SMALL, data, jax.random.key(2))


# ---- data ---------------------------------------------------------------------------------------------------------


def test_the_experts_episodes_are_those_of_its_file(data, tmp_path):
    """What is made here and what is read from a file with the same rows are one thing."""
    terminals = np.zeros(len(data.action), bool)
    terminals[200::201] = True
    path = tmp_path / "a.npz"
    np.savez(path, observations=data.observation, actions=data.action, terminals=terminals)
    jax.tree.map(np.testing.assert_array_equal, offline.load(str(path), ENV), jax.device_get(data))
    assert len(data.rows) == 2000 and len(data.observation) == 10 * 201
    last = np.arange(10) * 201 + 200
    assert not set(last.tolist()) & set(np.asarray(data.rows).tolist())
    np.testing.assert_array_equal(data.final, np.repeat(last - 1, 201))


def episodes(lengths):
    """Data of one number a row, its own; episodes of so many transitions."""
    ends = np.cumsum(np.array(lengths) + 1) - 1
    rows = np.setdiff1d(np.arange(ends[-1] + 1), ends)
    number = jnp.arange(ends[-1] + 1.0)[:, None]
    return offline.Data(number, number, jnp.int32(rows), jnp.int32(np.repeat(ends - 1, np.array(lengths) + 1)))


def test_goals_at_a_geometric_distance_gather_at_the_end_of_the_episode():
    data, many = episodes([5, 3]), 40_000
    rows = jnp.ones(many, jnp.int32)
    future = offline.geometric_future(data, rows, jax.random.key(0), 0.9)
    counts = np.bincount(future, minlength=10) / many
    np.testing.assert_allclose(counts[2:5], [0.1, 0.09, 0.81], atol=0.01)
    assert counts[2:5].sum() == pytest.approx(1)
    at_the_end = offline.geometric_future(data, jnp.array([4, 8]), jax.random.key(1), 0.9)
    np.testing.assert_array_equal(at_the_end, [4, 8])


@pytest.mark.parametrize(("i", "u", "future"), [(3, 0.0, 9), (3, 0.5, 6), (9, 0.5, 9)])
def test_uniform_goals_are_the_fact_sheets(monkeypatch, i, u, future):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, u))
    assert offline.uniform_future(episodes([10]), jnp.array([i]), jax.random.key(0)) == future


def test_uniform_goals_are_later_in_the_episode_and_not_its_last_state():
    data, many = episodes([6, 4]), 30_000
    future = offline.uniform_future(data, jnp.full(many, 7 + 0), jax.random.key(0))
    counts = np.bincount(future, minlength=11) / many  # of 8, 9 and 10, the inner one has twice the share of the others
    np.testing.assert_allclose(counts[8:11], [0.25, 0.5, 0.25], atol=0.02)


def test_a_batch_follows_the_laws():
    data = episodes([5, 3])
    config = dataclasses.replace(SMALL, batch_size=4000, discount=0.5, random_goals=0.5)
    batch = jax.tree.map(lambda x: np.asarray(x[:, 0]).astype(int), crl_offline.sample(config, data, jax.random.key(0)))
    rows, final = np.asarray(data.rows), np.asarray(data.final)
    assert set(batch.observation) == set(batch.anywhere) == set(rows)
    np.testing.assert_array_equal(batch.action, batch.observation)
    np.testing.assert_array_equal(batch.next_observation, batch.observation + 1)
    last = final[batch.observation]
    assert ((batch.future > batch.observation) | (batch.observation == last)).all() and (batch.future <= last).all()
    later = (batch.actor_goal >= batch.observation) & (batch.actor_goal <= last)
    share = later.mean()
    assert 0.5 + 0.1 < share < 0.95, "half of them are later ones, and some of the others by chance"
    only = dataclasses.replace(config, random_goals=0.0)
    batch = jax.tree.map(lambda x: np.asarray(x[:, 0]).astype(int), crl_offline.sample(only, data, jax.random.key(0)))
    assert ((batch.actor_goal >= batch.observation) & (batch.actor_goal <= final[batch.observation])).all()


GOOD = {
    "observations": np.zeros((4, 2), np.float32),
    "actions": np.zeros((4, 2), np.float32),
    "terminals": np.array([0, 1, 0, 1]),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"terminals": None}, "a.npz has no terminals; a file of OGBench has observations, actions, terminals"),
        ({"observations": np.zeros((4, 29))}, r"observations of a.npz are float64 \(4, 29\); .* in 2 columns"),
        ({"actions": np.zeros(4)}, r"actions of a.npz are float64 \(4,\)"),
        ({"actions": np.array([["a", "b"]] * 4)}, r"actions of a.npz are <U1 \(4, 2\); those of .* are numbers"),
        ({"observations": np.full((4, 2), 500.0)}, "a.npz is of another maze than pointmaze_medium"),
        ({"observations": np.full((4, 2), 16.0)}, "a.npz is of another maze than pointmaze_medium"),
        ({"actions": np.full((4, 2), np.nan)}, "actions of a.npz are not all finite"),
        ({"actions": np.zeros((3, 2))}, r"a.npz has \(4, 3, 4\) observations, actions and terminals"),
        ({"terminals": np.zeros(4)}, "a.npz has no terminals; each episode's last row has one"),
        ({"terminals": np.array([0, 1, 0, 0])}, "the last row of a.npz is no terminal"),
        ({"terminals": np.array([1, 0, 0, 1])}, "a.npz has an episode of one row"),
    ],
)
def test_a_file_that_is_no_data_is_refused_in_one_line(tmp_path, changes, said):
    path = tmp_path / "a.npz"
    np.savez(path, **{key: array for key, array in (GOOD | changes).items() if array is not None})
    with pytest.raises(run.UserError, match=said) as error:
        offline.load(str(path), ENV)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(run.UserError, match=r"neither navigate, stitch nor a file; .*download_datasets"):
        offline.load("pointmaze-medium-navigate-v0.npz", ENV)
    np.savez(tmp_path / "whole.npz", **GOOD)
    np.save(tmp_path / "array.npy", GOOD["actions"])
    cut = (tmp_path / "whole.npz").read_bytes()[:-100]
    for content in (b"no", b"", cut, (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(run.UserError, match=r"b.npz is no npz file of arrays"):
            offline.load(str(tmp_path / "b.npz"), ENV)


# ---- losses -------------------------------------------------------------------------------------------------------


def test_binary_nce_is_the_fact_sheets(monkeypatch):
    pairs = jnp.array([[1, -0.5, 0.2], [0.3, 0.8, -1], [-0.2, 0.4, 1.5]])
    monkeypatch.setattr(crl_offline, "logits", lambda *_: jnp.stack([pairs, pairs]))
    loss, info = crl_offline.contrastive_loss(agent_of("crl")[1], crl_offline.Batch(*[jnp.zeros((3, 2))] * 6))
    assert loss == pytest.approx(0.537418, abs=1e-6) and info["train/accuracy"] == 1
    assert info["train/logits_pos"] == pytest.approx(1.1) and info["train/logits_neg"] == pytest.approx(-0.8 / 6)


def test_logits_are_inner_products_of_both_critics(batch):
    config, agent = agent_of("crl")
    pairs = crl_offline.logits(agent, batch.observation, batch.action, batch.future)
    for k in range(2):
        phi, psi = (jax.tree.map(lambda x, k=k: x[k], network) for network in (agent.phi, agent.psi))
        for i, j in ((0, 0), (3, 1), (5, 11)):
            wanted = phi(jnp.append(batch.observation[i], batch.action[i])) @ psi(batch.future[j]) / 4
            assert pairs[k, i, j] == pytest.approx(float(wanted), abs=1e-5)
    q = crl_offline.q_value(config, agent, batch.observation, batch.action, batch.future)
    np.testing.assert_allclose(q, np.diagonal(pairs, axis1=1, axis2=2).min(axis=0), atol=1e-5)


def test_the_policys_density_is_the_fact_sheets():
    density = crl_offline.UnitGaussian(jnp.array([0.2, -0.5])).log_prob(jnp.array([0.6, -0.9]))
    assert density == pytest.approx(-1.997877, abs=1e-6)
    assert (crl_offline.UnitGaussian(jnp.array([3.0, -0.5])).mode() == jnp.array([1.0, -0.5])).all()


@pytest.mark.parametrize(("options", "wanted"), [({"bc_weight": 0.1}, -0.564285), ({"mixed_loss": True}, -1.508333)])
def test_the_actors_losses_are_the_fact_sheets(monkeypatch, options, wanted):
    config = dataclasses.replace(SMALL, **{"bc_weight": 0.05} | options)
    chosen = SimpleNamespace(log_prob=lambda _: jnp.array([-1.0, -2.0, -1.5]), mode=lambda: jnp.zeros((3, 2)))
    monkeypatch.setattr(crl_offline, "policy", lambda *_: chosen)
    monkeypatch.setattr(crl_offline, "q_value", lambda *_: jnp.array([2.0, -1.0, 4.0]))
    batch = crl_offline.Batch(*[jnp.zeros((3, 2))] * 6)
    _, agent = agent_of("crl")
    assert crl_offline.actor_loss(agent.actor, agent, batch, config)[0] == pytest.approx(wanted, abs=2e-6)


def test_cloning_is_minus_the_log_density_alone(batch):
    config, agent = agent_of("gcbc")
    loss, _ = crl_offline.actor_loss(agent.actor, agent, batch, config)
    mean = jax.vmap(agent.actor)(jnp.concatenate([batch.observation, batch.actor_goal], axis=1))
    wanted = 0.5 * np.sum((np.asarray(batch.action) - np.asarray(mean)) ** 2, axis=1) + np.log(2 * np.pi)
    assert loss == pytest.approx(wanted.mean(), rel=1e-5)


def union_length(x, y):
    """Of the intervals [x_k, y_k] with x_k < y_k, by a fine grid of all their ends."""
    ends = np.unique(np.concatenate([x, y]))
    middles = (ends[1:] + ends[:-1]) / 2
    covered = [(any(a < m < b for a, b in zip(x, y))) for m in middles]
    return np.sum(np.diff(ends)[covered])


def test_the_quasimetric_is_the_fact_sheets_and_that_of_a_grid():
    _, agent = agent_of("qrl")
    pad = lambda a, b: jnp.array([*a, *[0] * 6, *b, *[0] * 6], jnp.float32)
    x, y = pad((0, 0.5), (2, -1)), pad((1, 1.2), (1, 0.5))
    assert crl_offline.distance(agent, x, y) == pytest.approx(1.425, abs=1e-6)
    assert crl_offline.distance(agent, y, x) == pytest.approx(0.75, abs=1e-6)
    x, y = np.random.default_rng(0).normal(size=(2, 20, 24)).astype(np.float32)
    found = crl_offline.distance(agent, jnp.array(x), jnp.array(y))
    for a, b, d in zip(x.reshape(20, 3, 8), y.reshape(20, 3, 8), np.asarray(found)):
        parts = [union_length(*group) for group in zip(a, b)]
        assert d == pytest.approx(0.5 * np.mean(parts) + 0.5 * max(parts), abs=1e-5)


def test_quasimetric_losses_are_the_fact_sheets(monkeypatch):
    _, agent = agent_of("qrl")
    agent = agent._replace(scalars=jnp.array([0.0, np.log(3.0)]))
    distances = iter([jnp.array([10.0, 600.0]), jnp.array([0.8, 1.5]), jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0])])
    monkeypatch.setattr(crl_offline, "distance", lambda *_: next(distances))
    batch = crl_offline.Batch(*[jnp.zeros((2, 2))] * 6)
    loss, info = crl_offline.quasimetric_loss(agent, batch)
    excess = 0.125 - 0.05
    assert info["train/step_excess"] == pytest.approx(excess) and info["train/lambda"] == pytest.approx(3)
    assert info["train/dynamics_loss"] == pytest.approx(1.5)
    assert info["train/critic_loss"] == pytest.approx(261.034034 + 3 * excess, rel=1e-6)
    assert loss == pytest.approx(
        261.034034 + 1.5, rel=1e-6
    )  # the multiplier's two terms cancel, but not their gradients


def test_the_multiplier_rises_where_steps_are_too_long_and_networks_feel_it(batch):
    _, agent = agent_of("qrl")
    far = lambda tower: eqx.tree_at(lambda x: x.layers[-1].weight, tower, 50 * tower.layers[-1].weight)
    agent = agent._replace(psi=far(agent.psi))  # steps are too long
    gradient, info = jax.grad(crl_offline.quasimetric_loss, has_aux=True)(agent, batch)
    assert gradient.scalars[1] < 0 < info["train/step_excess"]
    alone = lambda agent: info["train/lambda"] * crl_offline.quasimetric_loss(agent, batch)[1]["train/step_excess"]
    with_, without = (
        jax.grad(lambda a, w=w: crl_offline.quasimetric_loss(a, batch)[0] - w * alone(a))(agent) for w in (0, 1)
    )
    differ = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), with_.psi, without.psi)
    assert max(jax.tree.leaves(differ)) > 0


@pytest.mark.parametrize("name", ["crl", "gcbc", "qrl"])
def test_one_update_moves_each_network_by_its_own_loss_at_old_parameters(name, data, batch, monkeypatch):
    """Adam's first step by hand: minus the learning rate times the gradient's sign."""
    config, agent = agent_of(name)
    monkeypatch.setattr(crl_offline, "sample", lambda *_: batch)
    state = crl_offline.init(config, ENV, data, jax.random.key(0))._replace(agent=agent)
    after, _ = crl_offline.update(config, state, jax.random.key(0))
    actor = jax.grad(crl_offline.actor_loss, has_aux=True)(agent.actor, agent, batch, config)[0]
    losses = {"crl": crl_offline.contrastive_loss, "qrl": crl_offline.quasimetric_loss}
    wanted = agent._replace(actor=actor)
    if name in losses:
        wanted = jax.grad(losses[name], has_aux=True)(agent, batch)[0]._replace(actor=actor)

    def check(old, new, gradient):
        step = -config.learning_rate * gradient / (jnp.abs(gradient) + 1e-8)
        np.testing.assert_allclose(new - old, step, atol=1e-6)

    jax.tree.map(check, agent, after.agent, wanted)


def test_the_score_is_the_mean_of_the_last_three_evaluations(data, monkeypatch):
    config, agent = agent_of("gcbc")
    recent = crl_offline.init(config, ENV, data, jax.random.key(0)).recent
    solved = iter([0.2, 0.4, 0.6, 1.0])
    play = lambda *_: jnp.arange(5 * 50)[None] % 50 < 50 * next(solved) - 0.5
    monkeypatch.setattr(crl_offline.evaluation, "play", play)
    scores = []
    for _ in range(4):
        recent, metrics = crl_offline.evaluate(config, ENV, agent, recent, jax.random.key(0))
        scores.append(float(metrics["eval/score"]))
    np.testing.assert_allclose(scores, [0.2, 0.3, 0.4, 2 / 3], atol=1e-5)


def test_networks_are_ogbenchs_or_those_of_crl():
    _, agent = agent_of("crl")
    assert [layer.weight.shape for layer in agent.actor.layers] == [(16, 4), (16, 16), (16, 16), (2, 16)]
    assert not agent.actor.norms and len(agent.phi.norms) == 3
    weight = crl_offline.Tower(400, 400, 400, False, 0.01, jax.random.key(0)).layers
    assert weight[0].weight.std() == pytest.approx((1 / 400) ** 0.5, rel=0.02)  # variance 1 over the mean of both fans
    assert weight[3].weight.std() == pytest.approx((0.01 / 400) ** 0.5, rel=0.02)
    _, deep = agent_of("crl", depth=8)
    assert isinstance(deep.actor, crl_offline.ResidualMLP) and isinstance(deep.phi, crl_offline.ResidualMLP)


def test_who_goes_straight_to_the_goal_is_stopped_by_walls():
    config = dataclasses.replace(SMALL, num_eval_episodes=4, episode_length=400)
    straight = lambda agent, observation, goal: crl_offline.UnitGaussian(100 * (goal - observation))
    _, agent = agent_of("gcbc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_offline, "policy", straight)
        scores = jax.jit(partial(crl_offline.evaluate, config, ENV))(agent, jnp.full(3, jnp.nan), jax.random.key(0))[1]
    tasks = [float(scores[f"eval/success_task{i}"]) for i in range(1, 6)]
    assert float(scores["eval/success"]) == pytest.approx(np.mean(tasks)) and min(tasks) == 0


@pytest.mark.parametrize(
    ("agent", "env", "data", "weight", "random"),
    [
        ("crl", "pointmaze_medium", "navigate", 0.03, 0),
        ("crl", "pointmaze_medium", "stitch", 0.03, 0.5),
        ("crl", "antmaze_large", "antmaze-large-navigate-v0.npz", 0.1, 0),
        ("crl", "antmaze_large", "antmaze-large-stitch-v0.npz", 0.1, 0.5),
        ("crl", "antmaze_large", "antmaze-large-explore-v0.npz", 0.003, 1),
        ("qrl", "pointmaze_large", "navigate", 0.0003, 0),
        ("qrl", "pointmaze_giant", "pointmaze-giant-stitch-v0.npz", 0.0003, 0.5),
        ("qrl", "antmaze_giant", "antmaze-giant-navigate-v0.npz", 0.003, 0),
        ("qrl", "antmaze_medium", "antmaze-medium-explore-v0.npz", 0.001, 1),
        ("gcbc", "pointmaze_medium", "stitch", 1, 0),
        ("gcbc", "antmaze_medium", "antmaze-medium-explore-v0.npz", 1, 0),
    ],
)
def test_settings_that_are_not_given_are_ogbenchs(agent, env, data, weight, random):
    """The table of the fact sheet: section 7.4."""
    config = crl_offline.settle(dataclasses.replace(GIVEN, agent=agent, env=env, data=data))
    assert (config.bc_weight, config.random_goals) == (weight, random)
    assert crl_offline.settle(dataclasses.replace(GIVEN, bc_weight=0.0, random_goals=0.1)).bc_weight == 0


# ---- the command --------------------------------------------------------------------------------------------------

SCRIPT = Script(crl_offline)
TINY = [
    *("--data_rows=4000", "--data=stitch", "--batch_size=16", "--width=16", "--latent_size=16", "--chunk=20"),
    *("--num_eval_episodes=2", "--episode_length=40", "--eval_every=200", "--checkpoint_every=100"),
]


def test_killed_and_resumed_it_ends_with_the_same_metrics(tmp_path, cache):
    flags = [*TINY, "--agent=qrl", "--num_seeds=2", "--total_gradient_steps=2000"]
    done = SCRIPT.run(*flags, f"--run_dir={tmp_path / 'whole'}", cwd=tmp_path, env=cache)
    assert "qrl on 4,000 steps of stitch" in done.stdout and "gradient steps" in done.stdout
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files >= {"curve.png", "rollout.gif", "trajectories.png", "value_map.png"}
    folder = tmp_path / "run"
    *_, code = SCRIPT.signalled(signal.SIGKILL, folder, [*flags, f"--run_dir={folder}"], tmp_path, 40, cache)
    assert code == -signal.SIGKILL
    SCRIPT.check_ends_as(tmp_path / "whole", folder, tmp_path, cache)
    config, env, agent = crl_offline.load(folder, 1)
    assert config.num_seeds == 2 and crl_offline.policy(agent, jnp.zeros(2), jnp.zeros(2)).mode().shape == (2,)
    assert env.name == "pointmaze_medium"
