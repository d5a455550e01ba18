"""How much the encoder of a run of ppo_ad.py tells about the achievement that comes next (paper, section 5.4).

    python experiments/probe_achievements.py RUN_FOLDER...     a line for each run and seed

A linear classifier of the next achievement is fitted to phi(o) on fresh episodes, the encoder frozen, and tested in
other environments. The confidence is the median probability that it gives to the true achievement. On Crafter the paper
reports an accuracy of 44.9 % and a confidence of 0.240 for PPO, 73.6 % and 0.752 with distillation. Its data and its
optimiser are not published; these are ours.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from algorithms import ppo_ad
from envs import VectorEnv
from shared import run

STEPS, UPDATES = 500, 500
"""Steps of each environment; updates of the classifier, each on all of its data."""


def measure(folder: str | Path) -> dict[int, tuple[float, float]]:
    """Seed -> accuracy and confidence, on `num_eval_envs` environments; UserError if there are fewer than two."""
    config = run.load_config(ppo_ad.Config, folder)
    envs = config.num_eval_envs
    run.need(envs > 1, f"the run in {folder} has num_eval_envs 1; the probe is tested in another one, so it needs 2")
    run.use_precision(config)
    results = {}
    for seed in range(config.seed, config.seed + config.num_seeds):
        config, env, agent = ppo_ad.load(folder, seed)
        vector = env.vectorise(envs, config.episode_length)
        recorded = jax.jit(partial(record, config, vector))(agent, run.evaluation_key(jax.random.key(seed)))
        vector.close()
        latent, unlocked, done = map(np.asarray, recorded)
        following = label(unlocked, done)
        halves = [
            (latent[:, half].reshape(-1, latent.shape[-1]), following[:, half].ravel())
            for half in (slice(envs // 2), slice(envs // 2, None))
        ]
        (x, y), (test_x, test_y) = ((x[y >= 0], y[y >= 0]) for x, y in halves)
        probabilities = np.asarray(classify(x, jnp.array(y), test_x, len(env.achievement_names)))
        right = probabilities.argmax(axis=1) == test_y
        results[seed] = right.mean(), np.median(probabilities[np.arange(len(test_y)), test_y])
    return results


def record(config: ppo_ad.Config, vector: VectorEnv, agent: ppo_ad.Agent, key: Key[Array, ""]):
    """phi of each step's observation (time, envs, latent); what the step unlocked, or -1; if it ended the episode."""
    start_key, key = jax.random.split(key)

    def body(acting, key):
        before = acting.envs.env.achievements
        after, taken = ppo_ad.step(config, vector, agent, ppo_ad.Normaliser(*jnp.zeros(3)), acting, key)
        new = taken.achievements & ~before
        return after, (acting.latent, jnp.where(new.any(axis=1), jnp.argmax(new, axis=1), -1), taken.done)

    acting = ppo_ad.start_acting(config, vector, agent, start_key)
    return jax.lax.scan(body, acting, jax.random.split(key, STEPS))[1]


def label(unlocked: Int[np.ndarray, "time envs"], done: Bool[np.ndarray, "time envs"]) -> Int[np.ndarray, "time envs"]:
    """The achievement that is unlocked next at each step; -1 if the episode or the recording ends before."""
    labels, following = np.full(unlocked.shape, -1), np.full(unlocked.shape[1], -1)
    for t in reversed(range(len(unlocked))):
        following = np.where(unlocked[t] >= 0, unlocked[t], np.where(done[t], -1, following))
        labels[t] = following
    return labels


@partial(jax.jit, static_argnames="classes")
def classify(
    x: Float[Array, "train latent"], y: Int[Array, " train"], test_x: Float[Array, "test latent"], classes: int
) -> Float[Array, "test classes"]:
    """Probabilities by logistic regression on standardised latents, fitted by Adam."""
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    inputs = lambda x: jnp.concatenate([(x - centre) / spread, jnp.ones((len(x), 1))], axis=1)
    loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(inputs(x) @ w, y).mean()
    optimizer, weights = optax.adam(0.01), jnp.zeros((x.shape[1] + 1, classes))

    def fit(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(fit, (weights, optimizer.init(weights)), None, length=UPDATES)
    return jax.nn.softmax(inputs(test_x) @ weights)


@run.command
def main(argv: list[str] | None = None) -> None:
    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders: python experiments/probe_achievements.py RUN_FOLDER...")
    for folder in folders:
        for seed, (accuracy, confidence) in measure(folder).items():
            print(f"{folder}  seed {seed}  accuracy {accuracy:.1%}  confidence {confidence:.3f}", flush=True)


if __name__ == "__main__":
    main()
