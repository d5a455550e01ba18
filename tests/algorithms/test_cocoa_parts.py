"""What surrounds the losses of cocoa.py: who meets which task with which z, what is kept, how an agent is tested."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algorithms import cocoa
from envs import TaskFamily, TaskState
from shared import run

EPISODE = 8


class Counting(TaskFamily):
    """Observation: the step in the episode and a random number drawn at its start. Reward: the task, whole numbers.

    In tasks from 10 on the environment ends an episode after 3 steps.
    """

    name = "counting"
    observation_size, action_size, task_size, oracle_size = 2, 1, 1, 1
    num_train_tasks, num_test_tasks = 6, 4

    def tasks(self, key, num_train, num_test):
        tasks = jnp.arange(float(num_train + num_test))[:, None] + 7  # 7, 8, ...
        return tasks[:num_train], tasks[num_train:]

    def sample_task(self, key):
        return jnp.full(1, -1.0)

    def reset(self, key):
        observation = jnp.stack([jnp.zeros(()), jax.random.uniform(key)])
        return TaskState((), observation, self.sample_task(key), jnp.zeros(()), jnp.zeros((), bool))

    def step(self, state, action):
        step = state.observation[0] + 1
        observation = state.observation.at[0].set(step)
        ended = (state.task[0] >= 10) & (step >= 3)
        return TaskState((), observation, state.task, state.task[0], ended)

    def oracle(self, task):
        return task // 2

    def training_reward(self, state):
        return 2 * state.reward

    def render(self, states, stem):
        raise NotImplementedError


def small(**options):
    settings = dict(
        episode_length=EPISODE,
        initial_steps=EPISODE,
        tasks_per_iteration=4,
        prior_steps=EPISODE + 1,  # two episodes
        posterior_steps=EPISODE,
        extra_steps=2 * EPISODE,
        meta_batch=3,
        batch_size=4,
        context_size=6,
        num_trajectories=4,
        window=3,
        latent_size=2,
        width=8,
        encoder_width=8,
        replay_size=6 * 200,
        updates_per_iteration=2,
        total_env_steps=10_000,
    )
    return cocoa.settle(cocoa.Config(**settings | options), Counting())


@pytest.fixture(scope="module")
def family():
    return Counting()


def test_an_unroll_restarts_episodes_in_the_same_task_with_a_new_z(family):
    config = small(episode_length=20)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    tasks = jnp.array([[7.0], [12.0], [9.0]])
    rows, last, _ = cocoa.unroll(config, family, agent, cocoa.prior(3, 2), tasks, jax.random.key(1))
    np.testing.assert_array_equal(rows.reward, np.broadcast_to(tasks, (3, 20)))
    np.testing.assert_array_equal(rows.training_reward, 2 * rows.reward)
    steps = np.asarray(rows.observation[..., 0])
    np.testing.assert_array_equal(steps[0], np.arange(20))
    np.testing.assert_array_equal(steps[1], np.arange(20) % 3)
    np.testing.assert_array_equal(last[1], np.arange(20) % 3 == 2)
    np.testing.assert_array_equal(rows.terminated, last)
    assert not last[0].any() and not last[2].any(), "a time limit is no end that the critics see"
    np.testing.assert_array_equal(rows.next_observation[..., 0], steps + 1), "also where an episode ends"
    starts = np.asarray(rows.observation[..., 1])
    assert len(np.unique(starts[1])) == 7 and len(np.unique(starts[0])) == 1, "each episode starts anew"


def test_z_is_kept_for_an_episode_and_drawn_from_the_posterior_for_the_next(family, monkeypatch):
    """The actions of a policy that returns z itself."""
    monkeypatch.setattr(cocoa, "policy", lambda agent, observation, z: Echo(z))
    posterior = cocoa.Gaussian(jnp.full((400, 1), 3.0), jnp.full((400, 1), 0.25))
    config = small(episode_length=9, latent_size=1)
    tasks = jnp.full((400, 1), 11.0)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    rows, *_ = cocoa.unroll(config, family, agent, posterior, tasks, jax.random.key(0))
    z = np.asarray(rows.action[..., 0]).reshape(400, 3, 3)  # episodes of 3 steps
    assert (z == z[:, :, :1]).all()
    assert abs(z[:, 0, 0].mean() - 3) < 0.1 and abs(z[..., 0].std() - 0.5) < 0.05
    assert np.abs(np.corrcoef(z[..., 0].T)[np.triu_indices(3, 1)]).max() < 0.2
    config = dataclasses.replace(config, context="oracle")
    rows, *_ = cocoa.unroll(config, family, agent, posterior, tasks, jax.random.key(0))
    np.testing.assert_array_equal(rows.action, 5, "the oracle is told half of the task, rounded down")


def filled(config, family):
    """A state after its first data."""
    begin = lambda key: cocoa.fill(config, family, cocoa.init(config, family, key))
    return jax.jit(begin)(jax.random.key(0))


class Echo:
    def __init__(self, z):
        self.z = z

    def sample_and_log_prob(self, key):
        return self.z, jnp.zeros(len(self.z))

    def mode(self):
        return self.z


def test_an_iteration_visits_tasks_and_keeps_what_it_should(family):
    config = small()
    state = filled(config, family)
    np.testing.assert_array_equal(state.replay.count, EPISODE)
    np.testing.assert_array_equal(state.replay.context_end - state.replay.context_start, EPISODE)
    collect = jax.jit(lambda state: cocoa.collect(config, family, state))
    after = collect(state)
    gained = np.asarray(after.replay.count - state.replay.count)
    assert sorted(gained) == [0, 0] + [5 * EPISODE] * 4, "four tasks, each once: 2 + 1 + 2 episodes"
    for task in range(6):
        start, end = int(after.replay.context_start[task]), int(after.replay.context_end[task])
        if gained[task]:
            assert (start, end) == (EPISODE, EPISODE + 3 * EPISODE), "prior and posterior steps, without the first data"
        else:
            assert (start, end) == (0, EPISODE), "the context of other tasks stays"
        rewards = np.asarray(after.replay.data.reward[task, : int(after.replay.count[task])])
        np.testing.assert_array_equal(rewards, task + 7.0)
    assert int(after.replay.count.sum()) == 6 * EPISODE + 4 * 5 * EPISODE
    for done in (state, after, collect(collect(after))):
        assert int(done.env_steps) == int(done.replay.count.sum()), "what is counted is what was stepped"
    assert int(done.env_steps) == 6 * EPISODE + 3 * 4 * 5 * EPISODE and int(done.gradient_steps) == 0


def test_with_more_visits_than_tasks_each_gets_its_share(family):
    config = small(tasks_per_iteration=5, num_train_tasks=2)
    state = filled(config, family)
    collect, seen = jax.jit(lambda state: cocoa.collect(config, family, state)), Counter()
    for seed in range(6):
        after = collect(state._replace(key=jax.random.key(seed)))
        gained = np.asarray(after.replay.count - state.replay.count) // (5 * EPISODE)
        assert sorted(gained) == [2, 3]
        seen[int(gained[0])] += 1
        context = np.asarray(after.replay.context_end - after.replay.context_start)
        np.testing.assert_array_equal(context, gained * 3 * EPISODE)
    assert set(seen) == {2, 3}, "which task gets more is drawn"


def test_posterior_phases_act_on_the_posterior_of_the_recent_context(family, monkeypatch):
    """With an encoder whose factors are (reward, 1e-6), z is the task: 7, 8, ..."""
    monkeypatch.setattr(cocoa, "policy", lambda agent, observation, z: Echo(z[:, :1]))

    def embed(encoder, context, valid=None):
        reward = context[..., 3]  # after two of the observation and an action
        valid = jnp.ones(reward.shape, bool) if valid is None else valid
        mean = (reward * valid).sum(-1) / valid.sum(-1)
        return cocoa.Gaussian(jnp.repeat(mean[:, None], 2, 1), jnp.full((len(mean), 2), 1e-12))

    monkeypatch.setattr(cocoa, "embed", embed)
    config = small()
    state = filled(config, family)
    state = jax.jit(lambda state: cocoa.collect(config, family, state))(state)
    for task in np.flatnonzero(np.asarray(state.replay.count) > EPISODE):
        actions = np.asarray(state.replay.data.action[task, : 6 * EPISODE, 0]).reshape(6, EPISODE)
        assert np.abs(actions[:3]).max() < 6, "first data and prior phase: z from N(0, 1)"
        np.testing.assert_allclose(actions[3:], task + 7.0, atol=1e-3)


def test_adaptation_uses_the_prior_first_and_then_exactly_the_steps_so_far(family, monkeypatch):
    used = []

    def embed(encoder, context, valid):
        jax.debug.callback(lambda n: used.append(np.asarray(n)), valid.sum(-1))
        reward = (context[..., 3] * valid).sum(-1) / valid.sum(-1)
        return cocoa.Gaussian(jnp.repeat(reward[:, None], 2, 1), jnp.full((len(reward), 2), 1e-12))

    monkeypatch.setattr(cocoa, "embed", embed)
    config = small(exploration_episodes=2, eval_episodes=4)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    tasks = jnp.array([[7.0], [12.0]])  # the second falls after 3 steps
    returns, posterior, _ = cocoa.adapt(config, family, agent, tasks, jax.random.key(0))
    jax.effects_barrier()
    np.testing.assert_array_equal(returns, np.tile([7.0 * EPISODE, 12.0 * 3], (4, 1)))
    np.testing.assert_array_equal(used, [[2 * EPISODE, 6], [3 * EPISODE, 9]])
    np.testing.assert_allclose(posterior.mean, [[7.0, 7.0], [12.0, 12.0]], rtol=1e-5)


def test_evaluation_scores_the_first_and_the_last_episode(family, monkeypatch):
    config = small(exploration_episodes=1, eval_episodes=3, eval_repeats=2)
    tasks = jnp.array([[7.0], [8.0], [12.0]])
    returns = jnp.arange(18.0).reshape(3, 6)
    seen = []

    def adapt(config, family, agent, tasks, key):
        seen.append(np.asarray(tasks)[:, 0])
        return returns, cocoa.prior(6, 2), None

    monkeypatch.setattr(cocoa, "adapt", adapt)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    info = cocoa.evaluate(config, family, agent, tasks, jax.random.key(0))
    assert info == {"eval/return_prior": 2.5, "eval/return_adapted": 14.5}
    np.testing.assert_array_equal(seen[0], [7, 8, 12, 7, 8, 12])


def test_the_oracle_is_told_the_task(family, monkeypatch):
    monkeypatch.setattr(cocoa, "policy", lambda agent, observation, z: Echo(z))
    config = small(context="oracle", eval_repeats=2)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    assert agent.model.encoder is None and agent.key_encoder is None
    assert agent.actor.layers[0].weight.shape == (8, 3), "observation and the task"
    tasks = jnp.array([[7.0], [12.0]])
    info = cocoa.evaluate(config, family, agent, tasks, jax.random.key(0))
    assert info == {"eval/return_oracle": (7.0 * EPISODE + 12 * 3) / 2}
    state = filled(config, family)
    for task in range(6):
        np.testing.assert_array_equal(state.replay.data.action[task, :EPISODE, 0], (task + 7) // 2)


def test_batches_are_of_tasks_drawn_alike_and_say_whose_they_are(family):
    config = small(meta_batch=3, num_trajectories=8)
    state = filled(config, family)
    batch = jax.jit(lambda key: cocoa.sample(config, state, key))
    counts = Counter()
    for seed in range(200):
        got = batch(jax.random.key(seed))
        counts.update(np.asarray(got.task).tolist())
        np.testing.assert_array_equal(got.transitions.reward, np.broadcast_to(got.task[:, None] + 7.0, (3, 4)))
        np.testing.assert_array_equal(got.context[..., 3], np.broadcast_to(got.task[:, None] + 7.0, (3, 6)))
        assert len(got.crops.task) == 9, "8 trajectories, rounded up to 3 for each task"
        rewards = np.where(got.crops.valid, got.crops.rows[..., 3], got.crops.task[:, None] + 7.0)
        np.testing.assert_array_equal(rewards, np.broadcast_to(got.crops.task[:, None] + 7.0, rewards.shape))
        np.testing.assert_array_equal(got.crops.task, np.repeat(got.task, 3))
    assert min(counts.values()) > 60 and len(counts) == 6


def test_recipes_are_those_of_the_fact_sheet():
    """Section 2: tasks, meta-batch, steps initial/prior/posterior/extra, visits, updates, context, KL, evaluations."""
    sheet = {
        "half_cheetah_dir": (4, 2000, 1000, 0, 1000, 5, 2000, 256, 0.1, False, 4, 5_004_000),
        "half_cheetah_vel": (16, 2000, 400, 0, 600, 5, 2000, 100, 0.1, False, 1, 2_700_000),
        "ant_dir": (4, 2000, 400, 0, 600, 5, 4000, 256, 0.1, False, 4, 2_504_000),
        "ant_goal": (10, 2000, 400, 0, 600, 5, 4000, 256, 1.0, False, 1, 2_800_000),
        "humanoid_dir": (16, 2000, 400, 0, 600, 5, 4000, 256, 0.1, False, 1, 2_700_000),
        "walker_params": (10, 2000, 400, 0, 600, 5, 4000, 100, 0.1, True, 2, 2_580_000),
    }
    names = "meta_batch initial_steps prior_steps posterior_steps extra_steps tasks_per_iteration"
    names += " updates_per_iteration context_size kl_weight next_observation_in_context eval_repeats total_env_steps"
    for env, expected in sheet.items():
        given = run.configure(cocoa.Config, cocoa.RECIPES, "", ["cocoa.py", f"--env={env}"])
        config = cocoa.settle(given, envs.make(env))
        assert tuple(getattr(config, name) for name in names.split()) == expected, env
        common = config.episode_length, config.batch_size, config.reward_scale, config.discount, config.target_rate
        assert common == (200, 256, 5.0, 0.99, 0.005)
        assert config.contrastive_kl_weight == config.kl_weight
        assert (config.exploration_episodes, config.eval_episodes, config.latent_size) == (2, 3, 5)
        assert (config.width, config.encoder_width, config.learning_rate) == (300, 200, 3e-4)
        steps = config.num_train_tasks * config.initial_steps
        iterations = (config.total_env_steps - steps) / (5 * cocoa.visit_steps(config))
        assert iterations == 500 == cocoa.total_updates(config) / config.updates_per_iteration, env
