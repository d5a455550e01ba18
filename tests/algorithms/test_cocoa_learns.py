"""What cocoa.py learns, against known answers: a probe of the contrastive loss, and point_goal on held-out goals."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from algorithms import cocoa
from envs import TaskFamily, TaskState
from envs.point import PointGoal
from shared import run


def trained(config, family, number=None):
    """The state of the first seed after so many iterations; by default the whole run."""
    state = jax.jit(partial(cocoa.init, config, family))(jax.random.key(config.seed))
    state = jax.jit(partial(cocoa.fill, config, family), donate_argnums=0)(state)

    iteration = lambda state: cocoa.learn(config, family, cocoa.collect(config, family, state))[0]
    iteration = jax.jit(iteration, donate_argnums=0).lower(state).compile()
    for _ in range(number or cocoa.total_updates(config) // config.updates_per_iteration):
        state = iteration(state)
    return state


# ---- the contrastive loss alone -----------------------------------------------------------------------------------


class Silent(TaskFamily):
    """Observations are the task's number and a second one, under noise. Nothing is ever rewarded.

    The critics need no embedding here, and the bottleneck asks for none: what the posterior tells comes from contrast.
    """

    name = "silent"
    observation_size, action_size, task_size, oracle_size = 2, 1, 1, 1
    num_train_tasks, num_test_tasks = 32, 16

    def sample_task(self, key):
        return jax.random.uniform(key, (1,), minval=-1.0, maxval=1.0)

    def reset(self, key):
        return TaskState(key, jnp.zeros(2), self.sample_task(key), jnp.zeros(()), jnp.zeros((), bool))

    def step(self, state, action):
        key, noise_key = jax.random.split(state.physics)
        noise = jax.random.normal(noise_key, (2,))
        observation = jnp.stack([state.task[0] + 0.1 * noise[0], noise[1]])
        return state._replace(physics=key, observation=observation)

    def render(self, states, stem):
        raise NotImplementedError


def held_out_info_nce(config, family, agent, tasks):
    """By NumPy and SciPy: the loss of telling which of two trajectories in each test task are of one task."""
    prior = cocoa.prior(len(tasks), config.latent_size)
    play = jax.jit(partial(cocoa.unroll, config, family))
    halves = []
    for seed in (1, 2):
        transitions, *_ = play(agent, prior, tasks, jax.random.key(seed))
        context = cocoa.context_row(config, transitions)[:, : config.window]
        halves.append(jax.tree.map(np.asarray, cocoa.embed(agent.model.encoder, context)))
    (m1, v1), (m2, v2) = halves
    variance = (v1[:, None] + v2) / 2 + 1e-3
    logits = -np.sum((m1[:, None] - m2) ** 2 / variance, axis=-1) / config.temperature
    losses = scipy.special.logsumexp(logits, axis=1) - np.diag(logits)
    return float(losses.mean())


def test_contrast_embeds_what_the_rewards_do_not_ask_for():
    family = Silent()
    config = cocoa.Config(
        env="silent",
        episode_length=20,
        initial_steps=40,
        tasks_per_iteration=16,
        prior_steps=20,
        extra_steps=0,
        updates_per_iteration=500,
        batch_size=8,
        context_size=20,
        window=10,
        latent_size=2,
        kl_weight=0.01,
        learning_rate=2e-3,
        width=16,
        encoder_width=32,
        replay_size=32 * 400,
    )

    def loss(config):
        config = cocoa.settle(config, family)
        state = trained(config, family, 3)
        return held_out_info_nce(config, family, state.agent, state.test_tasks)

    chance = np.log(family.num_test_tasks)
    assert loss(config) < 0.6 * chance
    assert loss(dataclasses.replace(config, contrastive=False)) > 0.98 * chance


# ---- point_goal ---------------------------------------------------------------------------------------------------


def returns_of(policy, starts, goals, steps=20):
    """Mean return of a policy (position, goal) -> move within 0.1 along each axis, by NumPy."""
    position, total = starts.copy(), 0.0
    for _ in range(steps):
        position = position + np.clip(policy(position, goals), -0.1, 0.1)
        total -= np.linalg.norm(position - goals, axis=1)
    return total.mean()


@pytest.mark.slow
def test_an_agent_finds_held_out_goals_after_it_has_met_them(optimised):
    """0 is a random policy and 1 the best one, which goes straight at the goal.

    Measured: 0.84 adapted, 0.26 before (the whole run of an agent that is told the goals: 0.99). PEARL passes too: what
    the contrastive loss is for is tested above.
    """
    family = PointGoal()
    argv = ["cocoa.py", "--total_env_steps=30_000", "--eval_repeats=20"]
    config = cocoa.settle(run.configure(cocoa.Config, cocoa.RECIPES, "", argv), family)
    state = trained(config, family)
    info = jax.jit(partial(cocoa.evaluate, config, family))(state.agent, state.test_tasks, jax.random.key(3))

    rng = np.random.default_rng(0)
    goals = np.tile(np.asarray(state.test_tasks), (500, 1))
    starts = rng.uniform(-1, 1, goals.shape)
    best = returns_of(lambda position, goal: goal - position, starts, goals)
    worst = returns_of(lambda position, goal: rng.uniform(-0.1, 0.1, position.shape), starts, goals)
    score = {name: (float(value) - worst) / (best - worst) for name, value in info.items()}
    print(score)
    assert score["eval/return_adapted"] > 0.7
    assert score["eval/return_prior"] < 0.4
