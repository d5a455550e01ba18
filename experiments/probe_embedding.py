"""How much of the task the embedding of a run of cocoa.py tells: R2 of a linear map from it to held-out tasks.

    python experiments/probe_embedding.py RUN_FOLDER...     a line for each run and seed

The map goes from the mean of the posterior that the last episode of an evaluation acts on to what the oracle is told.
It is fitted on the train tasks and scored on the test tasks, which are met as in the run's last evaluation.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from algorithms import cocoa
from envs import TaskFamily
from shared import run


def measure(folder: str | Path) -> dict[int, float]:
    """Seed -> R2 of a run that has ended; UserError if there is none in the folder, or one that is told its tasks."""
    config = run.load_config(cocoa.Config, folder)
    run.need(config.context == "encoder", f"the run in {folder} has no embedding: it is told its tasks")
    seeds = range(config.seed, config.seed + config.num_seeds)
    configs, families, agents = zip(*(cocoa.load(folder, seed) for seed in seeds))
    try:
        steps = int(run.read_metrics(folder)["gradient_steps"][-1])
    except (OSError, IndexError):
        raise run.UserError(f"the run in {folder} has not been evaluated yet") from None
    run.use_precision(config)
    all_seeds = run.over_seeds(len(seeds), partial(r2, configs[0], families[0]))  # in one program, as in the run
    agents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    return dict(zip(seeds, jax.jit(all_seeds)(agents, keys, jnp.full(len(seeds), steps)).tolist()))


def r2(
    config: cocoa.Config, family: TaskFamily, agent: cocoa.Agent, key: Key[Array, ""], gradient_steps: Int[Array, ""]
) -> Float[Array, ""]:
    """Of the seed with this key: adapts to all tasks, to the test tasks as in the evaluation after so many steps."""
    _, task_key, _, _ = jax.random.split(key, 4)  # as in cocoa.init
    test_key, train_key = jax.random.split(jax.random.fold_in(run.evaluation_key(key), gradient_steps))
    train_tasks, test_tasks = family.tasks(task_key, config.num_train_tasks, config.num_test_tasks)
    parts = []
    for tasks, adapt_key in ((train_tasks, train_key), (test_tasks, test_key)):
        tasks = jnp.tile(tasks, (config.eval_repeats, 1))
        _, posterior, _ = cocoa.adapt(config, family, agent, tasks, adapt_key)
        parts += [posterior.mean, jax.vmap(family.oracle)(tasks)]
    return probe(*parts)


def probe(
    train_x: Float[Array, "train latent"],
    train_y: Float[Array, "train oracle"],
    test_x: Float[Array, "test latent"],
    test_y: Float[Array, "test oracle"],
) -> Float[Array, ""]:
    """R^2 on test tasks of a linear map from embeddings to tasks: ridge regression on standardised train embeddings."""
    centre, spread = train_x.mean(axis=0), train_x.std(axis=0) + 1e-6
    inputs = lambda x: jnp.concatenate([(x - centre) / spread, jnp.ones((len(x), 1))], axis=1)
    x = inputs(train_x)
    ridge = 1e-3 * len(x) * jnp.eye(x.shape[1])
    weights = jnp.linalg.solve(x.T @ x + ridge, x.T @ train_y)
    error = jnp.sum((inputs(test_x) @ weights - test_y) ** 2)
    return 1 - error / jnp.sum((test_y - test_y.mean(axis=0)) ** 2)


@run.command
def main(argv: list[str] | None = None) -> None:
    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders: python experiments/probe_embedding.py RUN_FOLDER...")
    for folder in folders:
        for seed, value in measure(folder).items():
            print(f"{folder}  seed {seed}  R2 {value:.9g}", flush=True)


if __name__ == "__main__":
    main()
