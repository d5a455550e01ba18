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
from jaxtyping import Array, Float

from algorithms import crl
from shared import evaluation, run
from shared.networks import ResidualMLP

EPISODES = 16


def branch_norms(network: ResidualMLP, x: Float[Array, "batch in"]) -> Float[Array, " blocks"]:
    """Of each block, the mean over a batch."""

    def block(x, block):
        y = block(x)
        return y, jnp.linalg.norm(y - x)

    return jax.vmap(lambda x: jax.lax.scan(block, network.stem(x), network.blocks)[1])(x).mean(axis=0)


def visited(config: crl.Config, env, agent: crl.Agent, key) -> tuple[Array, Array, Array]:
    """Observations, sampled actions and commanded goals of all steps of 16 episodes."""
    reset_key, play_key, action_key = jax.random.split(key, 3)
    start = jax.vmap(env.reset)(jax.random.split(reset_key, EPISODES))
    record = lambda state: (state.observation, state.goal)
    play = partial(evaluation.play, env, partial(crl.policy, agent), start, jnp.ones(EPISODES, bool))
    observation, goal = (x.reshape(-1, x.shape[-1]) for x in play(config.episode_length, play_key, record))
    return observation, crl.policy(agent, observation, goal).sample(action_key), goal


def measure(folder: str | Path) -> dict[str, Float[Array, " blocks"]]:
    """Network -> norms of a run, means over its seeds."""
    config = run.load_config(crl.Config, folder)
    run.need(config.residual, f"the blocks of the run in {folder} add nothing to an input: --residual=false")
    run.use_precision(config)

    @jax.jit
    def of_seed(agent, key):
        observation, action, goal = visited(config, env, agent, key)
        inputs = {
            "actor": (agent.actor, jnp.concatenate([observation, goal], axis=1)),
            "phi": (agent.critic.phi, jnp.concatenate([observation, action], axis=1)),
            "psi": (agent.critic.psi, goal),
        }
        return {name: branch_norms(*each) for name, each in inputs.items()}

    found = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        _, env, agent = crl.load(folder, seed)
        found.append(of_seed(agent, run.evaluation_key(jax.random.key(seed))))
    return jax.tree.map(lambda *x: jnp.stack(x).mean(axis=0), *found)


@run.command
def main(argv: list[str] | None = None) -> None:
    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders of crl.py: python experiments/residual_norms.py RUN_FOLDER...")
    for folder in folders:
        for network, norms in measure(folder).items():
            print(f"{folder}  {network:5}  {' '.join(f'{x:.3g}' for x in norms)}", flush=True)


if __name__ == "__main__":
    main()
