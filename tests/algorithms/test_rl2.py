"""rl2.py: golden numbers of the fact sheet (metaworld_and_metarl, section 11), trials, and resumed runs."""

import dataclasses
import inspect
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import check_repeats_its_end, metrics

import envs
from algorithms import rl2
from envs.point import PointGoal
from shared import run

CONFIG = rl2.settle(
    rl2.Config(episode_length=5, num_episodes=3, num_trials=6, num_minibatches=3, update_epochs=2, width=8),
    PointGoal(),
)


def rows_of(**fields):
    """Rows of which only these fields are known."""
    return rl2.Rows(*(fields.get(name) for name in rl2.Rows._fields))


# ---- golden numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_episode", "gae_lambda", "expected"),
    [
        (True, 0.95, (1.9878125, 0.6875, 2.5, 0.3345, 3.9, 0)),
        (False, 0.95, (3.5127288224, 2.4710278625, 4.5859975, 0.3345, 3.9, 0)),
        (True, 1.0, (2.12, 0.8, 2.5, 0.51, 3.9, 0)),
        (False, 1.0, (3.94979, 2.8331, 4.759, 0.51, 3.9, 0)),
    ],
)
def test_advantages_are_those_of_the_sheet(per_episode, gae_lambda, expected):
    """Two episodes of three steps. With steps that count nowhere between them, nothing changes."""
    reward, value = np.array([1.0, 0, 2, -1, 3, 1]), np.array([0.5, 1, -0.5, 2, 0, 1])
    config = rl2.Config(
        episode_length=3, reward_scale=0.5, discount=0.9, gae_lambda=gae_lambda, per_episode=per_episode
    )
    rows = rows_of(reward=jnp.array(2 * reward)[:, None], valid=jnp.ones((6, 1), bool))
    found = rl2.advantages(config, rows, jnp.array(value)[:, None])
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)

    at = np.array([0, 1, 2, 5, 6, 7])  # episodes of five steps, whose robots fall after the third
    longer = np.full((2, 10, 1), 7.0)
    longer[:, at, 0] = 2 * reward, value
    rows = rows_of(reward=jnp.array(longer[0]), valid=jnp.array(np.isin(np.arange(10), at))[:, None])
    found = rl2.advantages(dataclasses.replace(config, episode_length=5), rows, jnp.array(longer[1]))
    np.testing.assert_allclose(found[at, 0], expected, atol=1e-6)
    assert (np.delete(found[:, 0], at) == 0).all()


def test_ppo_loss_is_that_of_the_sheet(monkeypatch):
    """With a fifth step that counts nowhere."""
    old, new = ([*x, 9.0] for x in ((-1.2, -0.7, -2, -0.3), (-1, -1.1, -1.9, -0.25)))
    column = lambda x: jnp.array(x, jnp.float32)[:, None]
    monkeypatch.setattr(rl2, "log_prob", lambda agent, mean, action: column(new))
    rows = rows_of(log_prob=column(old), valid=column([1, 1, 1, 1, 0]).astype(bool))
    network = SimpleNamespace(whole=lambda inputs, valid: jnp.array([1.0, 2, 3, 4, 99])[:, None, None])
    agent = rl2.Agent(network, jnp.zeros(4), network)
    advantage, returns = column([1, -2, 0.5, -1, 50]), column([0, 2, 1, 4, 0])
    config = rl2.Config(entropy_weight=0.1)
    loss, info = inspect.unwrap(rl2.ppo_loss)(agent, rows, advantage, returns, config)
    np.testing.assert_allclose(info["train/policy_loss"], 0.22467141, rtol=1e-5)
    np.testing.assert_allclose(info["train/kl"], 0.0245412, rtol=1e-4)
    np.testing.assert_allclose(info["train/clipped"], 0.5)
    np.testing.assert_allclose(info["train/value_loss"], 0.5 * (1 + 0 + 4 + 0) / 4)
    np.testing.assert_allclose(info["train/entropy"], 5.6757541328, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.22467141 + 0.5 * 0.625 - 0.1 * 5.6757541328, rtol=1e-5)


def test_the_recurrent_cell_is_that_of_the_sheet(monkeypatch):
    """Reset after the product, as in PyTorch; where a step is not valid, the hidden state rests."""
    table = lambda rows, columns, a, b: jnp.array(
        [[((a * r + b * c) % 7 - 3) / 10 for c in range(columns)] for r in range(rows)], jnp.float32
    )
    cell = eqx.tree_at(
        lambda cell: (cell.weight_ih, cell.weight_hh, cell.bias, cell.bias_n),
        eqx.nn.GRUCell(3, 2, key=jax.random.key(0)),
        (table(6, 3, 3, 2), table(6, 2, 5, 3), jnp.array([0.1, -0.1, 0.2, 0, -0.2, 0.3]), jnp.array([0.05, -0.15])),
    )
    network = eqx.tree_at(lambda n: n.cell, rl2.Recurrent(3, 2, 1, jax.random.key(0)), cell)
    monkeypatch.setattr(jnp, "tanh", lambda x: x)  # of the first layer, which is now the identity; the cell has its own
    network = eqx.tree_at(lambda n: n.first, network, replace=lambda x: x)
    x, hidden = jnp.array([[0.5, -1, 2]]), jnp.array([[0.2, -0.4]])
    once, _ = network(hidden, x, jnp.array([True]))
    np.testing.assert_allclose(once, [[0.1534614255, -0.01809211]], rtol=1e-4)
    twice, _ = network(once, -x, jnp.array([True]))
    np.testing.assert_allclose(twice, [[-0.1120863789, -0.0607644369]], rtol=1e-4)
    rested, _ = network(once, -x, jnp.array([False]))
    np.testing.assert_array_equal(rested, once)


# ---- trials --------------------------------------------------------------------------------------------------------


class Falls(PointGoal):
    """The robot falls where it has gone to the right."""

    def step(self, state, action):
        after = super().step(state, action)
        return after._replace(terminated=after.observation[0] > 0.12)


@pytest.fixture(scope="module", params=[PointGoal, Falls])
def trials(request):
    """An agent, and trials that it has played."""
    family = request.param()
    agent = rl2.make_agent(CONFIG, family, jax.random.key(0))
    tasks = jax.vmap(family.sample_task)(jax.random.split(jax.random.key(1), 6))
    play = jax.jit(partial(rl2.play, CONFIG, family), static_argnames=("sampled", "record"))
    states = play(agent, tasks, key=jax.random.key(2), sampled=True, record=lambda before, after: before)
    return family, agent, tasks, states


def test_the_hidden_state_is_carried_over_a_trial_and_zero_before_it(trials):
    """Else running through a whole trial again would not give the actions' probabilities."""
    _, agent, _, (rows, *_) = trials
    mean = agent.actor.whole(rows.inputs, rows.valid)
    np.testing.assert_allclose(rl2.log_prob(agent, mean, rows.action)[rows.valid], rows.log_prob[rows.valid], rtol=1e-4)
    episode = jax.tree.map(lambda x: x[5:10], rows)
    alone = agent.actor.whole(episode.inputs, episode.valid)
    assert np.abs(alone[0] - mean[5]).min() > 1e-4, "a second episode does not begin like a first one"


def test_inputs_are_what_led_to_an_observation_and_nothing_at_the_start_of_an_episode(trials):
    family, _, tasks, (rows, broken, states) = trials
    inputs, n = np.asarray(rows.inputs), family.observation_size
    assert int(broken) == 0
    recorded = np.asarray(states.observation).reshape(15, 6, n)
    valid = np.asarray(rows.valid)
    np.testing.assert_allclose(inputs[..., :n][valid], recorded[valid], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(states.task).reshape(15, 6, -1), np.broadcast_to(tasks, (15, 6, 2)))
    starts = np.arange(15) % 5 == 0
    assert (inputs[starts][..., n:] == 0).all()
    for t in np.flatnonzero(~starts):
        np.testing.assert_array_equal(inputs[t, valid[t], n:-2], rows.action[t - 1][valid[t]])
        np.testing.assert_allclose(inputs[t, valid[t], -2], CONFIG.reward_scale * rows.reward[t - 1][valid[t]])
        assert (inputs[t, valid[t], -1] == 0).all()
    moved = np.asarray(rows.action[0]).clip(-1, 1)
    np.testing.assert_allclose(recorded[1] - recorded[0], 0.1 * moved, atol=1e-6)


def test_after_a_fall_nothing_counts_until_the_next_episode(trials):
    family, *_, (rows, _, states) = trials
    valid = np.asarray(rows.valid).reshape(3, 5, 6)
    assert valid[:, 0].all() and (valid[:, 1:] <= valid[:, :-1]).all()
    fell = (np.asarray(states.observation)[..., 0] > 0.12) & (type(family) is Falls)
    fell[:, 0] = False  # a start ends nothing
    np.testing.assert_array_equal(valid, ~np.logical_or.accumulate(fell, axis=1))
    assert valid.all() == (type(family) is PointGoal)
    assert (np.asarray(rows.reward)[~np.asarray(rows.valid)] == 0).all()


def test_without_history_the_networks_see_the_observation_alone():
    config = dataclasses.replace(CONFIG, history=False)
    family = PointGoal()
    agent = rl2.make_agent(config, family, jax.random.key(0))
    rows, *_ = rl2.play(config, family, agent, jnp.ones((2, 2)), True, jax.random.key(1))
    assert (rows.inputs[..., 2:] == 0).all() and (rows.inputs[..., :2] != 0).any()


def test_mean_actions_draw_nothing_but_starts_and_returns_are_of_the_first_and_last_episode(trials):
    family, agent, tasks, _ = trials
    rows, *_ = rl2.play(CONFIG, family, agent, tasks, False, jax.random.key(3))
    mean = agent.actor.whole(rows.inputs, rows.valid)
    np.testing.assert_allclose(rows.action[rows.valid], mean[rows.valid], atol=1e-5)
    scores = rl2.evaluate(CONFIG, family, agent, tasks, jax.random.key(3))
    returns = np.asarray(rows.reward).reshape(3, 5, 6).sum(axis=1).mean(axis=1)
    np.testing.assert_allclose(scores["eval/return_prior"], returns[0], rtol=1e-5)
    np.testing.assert_allclose(scores["eval/return_adapted"], returns[2], rtol=1e-5)


# ---- updates -------------------------------------------------------------------------------------------------------


def test_an_iteration_learns_from_whole_trials_and_begins_where_it_acted():
    family = PointGoal()
    state = rl2.init(CONFIG, family, jax.random.key(0))
    new, metrics = jax.jit(partial(rl2.learn, CONFIG, family))(state)
    assert metrics["train/kl"].shape == (2 * 3,)
    assert abs(metrics["train/kl"][0]) < 1e-5 and metrics["train/clipped"][0] == 0, "all ratios are 1 at first"
    assert abs(metrics["train/kl"][1:]).min() > 1e-7
    assert (int(new.env_steps), int(new.gradient_steps)) == (6 * 3 * 5, 6)
    for old, changed in zip(jax.tree.leaves(state.agent), jax.tree.leaves(new.agent)):
        assert (np.asarray(old) != np.asarray(changed)).any()
    np.testing.assert_array_equal(state.train_tasks, new.train_tasks)


TINY = [
    *("--episode_length=5", "--num_trials=8", "--num_minibatches=2", "--update_epochs=2", "--width=8"),
    *("--num_train_tasks=6", "--num_test_tasks=4", "--eval_every=240", "--checkpoint_every=480", "--num_seeds=2"),
    "--total_env_steps=960",
]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, capsys):
    whole = tmp_path / "whole"
    rl2.main(["rl2.py", *TINY, f"--run_dir={whole}"])
    out = capsys.readouterr().out
    assert "a trial is 3 episodes in one task" in out and out.splitlines()[-1] == str(whole)
    assert len(metrics(whole)) == 2 * 8
    check_repeats_its_end(rl2, whole)
    assert {"curve.png", "rollout.gif"} <= {path.name for path in whole.iterdir()}
    config, family, agent = rl2.load(whole, seed=1)
    key = jax.random.fold_in(run.evaluation_key(jax.random.key(1)), int(metrics(whole)[-1]["gradient_steps"]))
    test_tasks = jax.jit(partial(rl2.init, config, family))(jax.random.key(1)).test_tasks
    scores = jax.jit(partial(rl2.evaluate, config, family))(agent, test_tasks, key)
    for name, value in scores.items():
        assert float(value) == pytest.approx(float(metrics(whole)[-1][name]), rel=1e-4)
    assert isinstance(family, envs.TaskFamily)
