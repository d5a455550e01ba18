"""Simulators that return NaN now and then: each script goes on, without what they returned."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algorithms import c_learning, cocoa, crl, gcsl, ppo_ad, sac, td3
from shared import run


def fragile(env):
    """The same environment, of whose steps about a tenth leads to an observation or a reward that is NaN."""
    step = env.step

    def fails_sometimes(state, action):
        after = step(state, action)
        chance = jnp.sin(1e4 * (state.observation.sum() + jnp.sum(action)))
        spoil = lambda x, bad: jnp.where(bad, jnp.nan, x)
        return after._replace(
            observation=spoil(after.observation, chance > 0.98), reward=spoil(after.reward, chance < -0.98)
        )

    env.step = fails_sometimes
    return env


def repeated(rows, axis):
    """How many rows equal the one before them along this axis, in all of their entries."""
    x = np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in rows], axis=-1)
    x = x.swapaxes(0, axis)
    return (x[1:] == x[:-1]).all(axis=-1).sum()


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize("script", [crl, sac, td3, gcsl, c_learning])
def test_no_row_of_a_failed_step_is_stored(script):
    flags = "--num_envs=8 --unroll_length=30 --episode_length=12 --min_replay_size=30 --max_replay_size=150 --width=16"
    argv = ["crl.py", *flags.split(), "--batch_size=16", "--updates_per_chunk=4", "--env=simple_u_maze"]
    config = run.configure(script.Config, script.RECIPES, "", argv)
    env = fragile(envs.make("simple_u_maze"))
    state = jax.jit(partial(script.init, config, env))(jax.random.key(0))
    collect = jax.jit(partial(script.collect, config, env))
    for _ in range(5):
        state = collect(state)
    broken = int(state.envs.broken.sum())
    assert 5 * 30 * 8 * 0.05 < broken < 5 * 30 * 8 * 0.3
    assert finite(state.replay) and finite(state.envs)
    zeros = (np.asarray(state.replay.data.observation[0]) == 0).all(axis=-1).sum()  # whose very first step failed
    assert repeated(state.replay.data, axis=0) == broken - zeros
    if script is not crl:  # the others learn from the same replay
        return
    state, metrics = jax.jit(partial(crl.learn, config, env))(state)
    assert finite(state.agent) and metrics["train/broken_steps"] == broken
    scores = jax.jit(partial(crl.evaluate, config, env, None))(state.agent, jax.random.key(1))
    assert finite(scores)


def test_ppo_ad_learns_nothing_from_a_failed_step():
    config = dataclasses.replace(
        run.configure(ppo_ad.Config, ppo_ad.RECIPES, "", ["ppo_ad.py"]), num_envs=8, unroll_length=30, episode_length=12
    )
    vector = fragile(envs.make("minicraft")).vectorise(config.num_envs, config.episode_length)
    state = jax.jit(partial(ppo_ad.init, config, vector))(jax.random.key(0))
    state = state._replace(normaliser=ppo_ad.Normaliser(*map(jnp.array, (0.3, 0.5, 0.6))))
    acting, steps = jax.jit(partial(ppo_ad.collect, config, vector))(state)
    broken = int(acting.envs.broken.sum())
    assert 8 * 30 * 0.05 < broken < 8 * 30 * 0.3
    assert finite(steps)
    last = ppo_ad.act(state.agent, acting.latent, acting.memory)[1]
    value = state.normaliser.denormalise(jnp.concatenate([steps.value, last[None]]))
    advantage = np.asarray(ppo_ad.advantages(steps.reward, value, steps.done, config))
    assert (np.asarray(steps.done) & (advantage == 0)).sum() == broken
    state, metrics = jax.jit(partial(ppo_ad.learn, config))(state, acting, steps)
    learned = jax.tree.map(lambda x: np.asarray(x[:, : config.unroll_length]), state.window)
    assert ((learned.advantage == 0) & learned.done).sum() == broken, "not moved by the mean of all"
    assert finite(state.agent) and metrics["train/broken_steps"] == broken


def test_cocoa_stores_no_row_of_a_failed_step_and_learns_on():
    flags = "--num_train_tasks=6 --num_test_tasks=4 --tasks_per_iteration=3 --updates_per_iteration=4 --width=8"
    flags += " --encoder_width=8 --batch_size=8 --meta_batch=4 --num_trajectories=4 --prior_steps=40 --extra_steps=40"
    config = run.configure(cocoa.Config, cocoa.RECIPES, "", ["cocoa.py", *flags.split()])
    family = fragile(envs.make("point_goal"))
    config = cocoa.settle(config, family)
    begin = lambda key: cocoa.fill(config, family, cocoa.init(config, family, key))
    state = jax.jit(begin)(jax.random.key(0))
    broken = int(state.broken)
    assert 6 * config.initial_steps * 0.05 < broken < 6 * config.initial_steps * 0.3
    written = jax.tree.map(lambda x: x[:, : config.initial_steps], state.replay.data)
    assert finite(written)
    assert abs(repeated(written, axis=1) - broken) <= 3, "a first row is stored again only after it"
    state, metrics = jax.jit(partial(cocoa.learn, config, family))(state)
    assert finite(state.agent) and (np.asarray(metrics["train/broken_steps"]) == broken).all()
    scores = jax.jit(partial(cocoa.evaluate, config, family))(state.agent, state.test_tasks, jax.random.key(1))
    assert finite(scores)
