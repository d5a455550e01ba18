"""What ppo_ad.py learns, against known answers: small probes, and minicraft with and without distillation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import figures
from algorithms import ppo_ad
from envs import AchievementEnv, AchievementState, minicraft
from shared import run

SMALL = dict(dense_size=16, latent_size=16, learning_rate=3e-3, num_minibatches=2, num_envs=16, discount=0.9)


def trained(config, env, rollouts):
    """The state of all seeds after so many rollouts, auxiliary phases included."""
    vector, batched = env.vectorise(config.num_envs, config.episode_length), partial(run.over_seeds, config.num_seeds)

    def rollout(state):
        return ppo_ad.learn(config, state, *ppo_ad.collect(config, vector, state))[0]

    rollout = jax.jit(batched(rollout), donate_argnums=0)
    seeds = jax.vmap(jax.random.key)(jnp.arange(config.num_seeds))
    state = jax.jit(batched(partial(ppo_ad.init, config, vector)))(seeds)
    distils = bool(ppo_ad.auxiliary_losses(config))
    programs = distils and ppo_ad.compile_phase(config, lambda name, jitted, *shapes: jitted, run.one_seed(state, 0))
    for i in range(1, rollouts + 1):
        state = rollout(state)
        if distils and i % config.auxiliary_every == 0:
            seeds = [run.one_seed(state, seed) for seed in range(config.num_seeds)]
            after = [ppo_ad.distil(config, programs, lambda line: None, seed)[0] for seed in seeds]
            state = jax.tree.map(lambda *x: jnp.stack(x), *after)._replace(window=state.window)
    return state


class Probe(AchievementEnv):
    """A cue of two kinds is seen once, and the action `blank` steps after the start is rewarded if it names the cue.

    Without blank steps the cue is seen at the start, else after the first step; that is an achievement for each kind.
    """

    name = "probe"
    observation_shape = (4,)
    num_actions = 2
    achievement_names = ("one", "other")

    def __init__(self, blank):
        self.blank = blank

    def reset(self, key):
        return self._state(jax.random.bernoulli(key).astype(jnp.int32), jnp.array(0), jnp.zeros(()))

    def step(self, state, action):
        cue, time = state.physics
        last = time == self.blank
        return self._state(cue, time + 1, (last & (action == cue)).astype(jnp.float32))

    def _state(self, cue, time, reward):
        seen = jnp.where(time == min(self.blank, 1), 2.0 * cue - 1, 0.0)
        observation = jnp.stack([seen, time == 0, time == 1, time >= 2]).astype(jnp.float32)
        unlocked = (time > 0) & (jnp.arange(2) == cue)
        return AchievementState((cue, time), observation, reward, time > self.blank, unlocked)

    def render(self, states, stem):
        raise NotImplementedError


def reward_at_the_end(config, env, agent):
    vector = env.vectorise(256, 50)
    return float(jax.jit(partial(ppo_ad.evaluate, config, vector))(agent, jax.random.key(7))["eval/return"])


def test_ppo_learns_the_best_action_and_its_value():
    """One-step episodes: reward 1 for naming the cue, so the return is 1 and so is the value of both cues."""
    config = ppo_ad.Config(distill=False, unroll_length=16, entropy_weight=0.0, **SMALL)
    env = Probe(blank=0)
    state = run.one_seed(trained(config, env, 40))
    assert reward_at_the_end(config, env, state.agent) > 0.98
    observation = jnp.array([[1.0, 1, 0, 0], [-1.0, 1, 0, 0]])
    value = state.normaliser.denormalise(
        ppo_ad.act(state.agent, ppo_ad.encode(state.agent, observation), jnp.zeros((2, 0)))[1]
    )
    np.testing.assert_allclose(value, 1, atol=0.1)


@pytest.mark.parametrize(("memory", "lowest", "highest"), [(True, 0.85, 1.0), (False, 0.4, 0.6)])
def test_the_memory_tells_what_was_unlocked_before(memory, lowest, highest):
    """Four steps after the cue the observation is the same for both: without memory the known best is a coin."""
    config = ppo_ad.Config(memory=memory, matching=False, prediction=False, unroll_length=20, gae_lambda=0.95, **SMALL)
    env = Probe(blank=4)
    state = run.one_seed(trained(config, env, 150))
    assert lowest <= reward_at_the_end(config, env, state.agent) <= highest


# ---- minicraft ----------------------------------------------------------------------------------------------------


CONFIG = run.configure(ppo_ad.Config, ppo_ad.RECIPES, "", ["ppo_ad.py", "--num_seeds=2"])
ROLLOUTS = -(-CONFIG.total_env_steps // ppo_ad.rollout_steps(CONFIG))


@pytest.fixture(scope="module")
def distilled(optimisations):
    with optimisations():
        return trained(CONFIG, minicraft.Minicraft(), ROLLOUTS)


def rate_of_the_deepest(config, agent):
    """Of 256 fresh episodes of each seed, the share that unlocks the last achievement of the chain; mean over seeds."""
    vector = minicraft.Minicraft().vectorise(256, config.episode_length)
    keys = jax.random.split(jax.random.key(9), config.num_seeds)
    scores = jax.jit(jax.vmap(partial(ppo_ad.evaluate, config, vector)))(agent, keys)
    return float(scores["eval/success/collect_iron"].mean())


def fresh_steps(config, agent):
    """Steps of 64 whole episodes of one agent, (time, envs, ...), and the achievement unlocked at each, or -1."""
    vector = minicraft.Minicraft().vectorise(64, config.episode_length)
    acting = ppo_ad.start_acting(config, vector, agent, jax.random.key(5))
    normaliser = ppo_ad.Normaliser(*jnp.zeros(3))
    step = partial(ppo_ad.step, config, vector, agent, normaliser)
    keys = jax.random.split(jax.random.key(6), config.episode_length)
    _, steps = jax.jit(lambda a: jax.lax.scan(step, a, keys))(acting)
    bits = np.concatenate([np.zeros_like(steps.achievements[:1]), steps.achievements])
    new = np.diff(bits.astype(int), axis=0) == 1
    return steps, np.where(new.any(-1), new.argmax(-1), -1)[:-1]  # the last step ends the episode


def labels(config, agent):
    """How well one agent tells achievements apart on fresh episodes, by labels that training never sees.

    Half of the episodes give the mean nu of each achievement. In the other half: by how much, on average, the cosine of
    an achievement's nu with its own mean exceeds the largest with another's; how often psi of a step is nearest to the
    mean of the achievement that comes next; how often the commonest guess would be right about that.
    """
    steps, unlocked = fresh_steps(config, agent)
    latent = np.asarray(jax.jit(jax.vmap(partial(ppo_ad.encode, agent)))(steps.observation))
    kinds = [k for k in range(6) if (unlocked[:, :32] == k).sum() >= 5]
    nu = latent[1:] - latent[:-1]
    nu = nu / np.linalg.norm(nu, axis=-1, keepdims=True)
    means = np.stack([nu[:, :32][unlocked[:, :32] == k].mean(axis=0) for k in kinds])
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    name = lambda vectors: np.array(kinds)[(vectors @ means.T).argmax(-1)]

    held_out = np.isin(unlocked[:, 32:], kinds)
    cosine = nu[:, 32:][held_out] @ means.T
    own = unlocked[:, 32:][held_out][:, None] == np.array(kinds)
    apart = (cosine[own] - np.where(own, -1, cosine).max(axis=1)).mean()
    following, label = np.full(unlocked.shape, -1), np.full(64, -1)
    for t in reversed(range(len(unlocked))):
        label = np.where(unlocked[t] >= 0, unlocked[t], label)
        following[t] = label
    psi = jax.jit(jax.vmap(partial(ppo_ad.predict, agent)))(jnp.array(latent), steps.action, steps.memory)[:-1]
    known = np.isin(following[:, 32:], kinds)
    truth = following[:, 32:][known]
    predicted = (name(np.asarray(psi)[:, 32:][known]) == truth).mean()
    return apart, predicted, np.bincount(truth).max() / len(truth)


# Margins lie between what was measured with the whole method and what is left with a broken loss: five seeds unlock
# iron in 0.21 of the episodes, with neither loss in 0.11, with plain PPO in 0.08 (results/minicraft*.csv).


@pytest.mark.slow
def test_distillation_unlocks_the_deepest_achievement_more_often(distilled):
    """Than plain PPO did in the published runs, which are not repeated here."""
    ours = rate_of_the_deepest(CONFIG, distilled.agent)
    theirs = figures.last(figures.read("minicraft_plain"), "eval/success/collect_iron").mean()
    print(f"deepest achievement: {ours:.3f}, plain PPO {theirs:.3f}")
    assert ours > theirs + 0.05 and ours > 1.5 * theirs


@pytest.mark.slow
def test_both_losses_taught_the_encoder_what_they_are_for(distilled):
    """Without matching, achievements are apart by 0.52 instead of 0.66; without prediction, 0.2 of the steps know what
    comes next instead of 0.999."""
    agents = [jax.tree.map(partial(jnp.take, indices=i, axis=0), distilled.agent) for i in range(CONFIG.num_seeds)]
    each = [labels(CONFIG, agent) for agent in agents]
    apart, predicted, commonest = np.mean(each, axis=0)
    print(f"apart by {apart:.3f}, next achievement known {predicted:.3f}, commonest {commonest:.3f}")
    assert apart > 0.6
    assert predicted > 0.95 > 1.5 * commonest
