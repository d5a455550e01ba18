"""Figure 17 of '1000 Layer Networks': how much each residual block adds to its input, along the depth.

    python experiments/residual_norms.py RUN_FOLDER...      a line for each run, network and block

The L2 norm of a block's branch, that is of its output before the input is added, in the actor and the critic's two
encoders of a run of crl.py. Means over the states that the trained agent visits in 16 episodes, and over seeds.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms import crl
from envs import GoalEnv
from shared import evaluation, run
from shared.networks import ResidualMLP

EPISODES = 16


def branch_norms(network: ResidualMLP, x: Float[Array, "batch in"]) -> Float[Array, "batch blocks"]:
    """Of each example and block."""

    def block(x, block):
        y = block(x)
        return y, jnp.linalg.norm(y - x)

    return jax.vmap(lambda x: jax.lax.scan(block, network.stem(x), network.blocks)[1])(x)


@partial(jax.jit, static_argnums=(0, 1))
def of_seed(config: crl.Config, env: GoalEnv, agent: crl.Agent, key: Key[Array, ""]) -> dict:
    """Network -> norms (blocks,), means over the steps of 16 episodes with sampled actions, each until a fall."""
    reset_key, play_key, action_key = jax.random.split(key, 3)
    start = jax.vmap(env.reset)(jax.random.split(reset_key, EPISODES))
    record = lambda state: (state.observation, state.goal, state.terminated)
    play = partial(evaluation.play, env, partial(crl.policy, agent), start, jnp.ones(EPISODES, bool))
    observation, goal, fallen = play(config.episode_length, play_key, record)
    alive = (jnp.cumsum(fallen, axis=0) - fallen == 0).reshape(-1, 1)
    observation, goal = (x.reshape(-1, x.shape[-1]) for x in (observation, goal))
    action = crl.policy(agent, observation, goal).sample(action_key)
    inputs = {
        "actor": (agent.actor, jnp.concatenate([observation, goal], axis=1)),
        "phi": (agent.critic.phi, jnp.concatenate([observation, action], axis=1)),
        "psi": (agent.critic.psi, goal),
    }
    return {name: jnp.sum(alive * branch_norms(*each), axis=0) / alive.sum() for name, each in inputs.items()}


def measure(folder: str | Path) -> dict[str, Float[Array, " blocks"]]:
    """Network -> norms of a run, means over its seeds."""
    config = run.load_config(crl.Config, folder)
    run.need(config.residual, f"the blocks of the run in {folder} add nothing to an input: --residual=false")
    run.use_precision(config)
    env, _ = evaluation.make_envs(config)
    seeds = range(config.seed, config.seed + config.num_seeds)
    keys = [run.evaluation_key(jax.random.key(seed)) for seed in seeds]
    found = [of_seed(config, env, crl.load(folder, seed)[2], key) for seed, key in zip(seeds, keys)]
    return jax.tree.map(lambda *x: jnp.stack(x).mean(axis=0), *found)


def show(folders: list[str]) -> None:
    for folder in folders:
        for network, norms in measure(folder).items():
            print(f"{folder}  {network:5}  {' '.join(f'{x:.3g}' for x in norms)}", flush=True)


@run.command
def main(argv: list[str] | None = None) -> None:
    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders of crl.py: python experiments/residual_norms.py RUN_FOLDER...")
    show(folders)


if __name__ == "__main__":
    main()
