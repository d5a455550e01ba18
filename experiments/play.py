"""Scores and films a trained agent, in its own environment or in another one with the same observations and actions.

    python experiments/play.py RUN                                       128 fresh episodes, and a film
    python experiments/play.py RUN --env point_u4_maze --episodes 1000
    python experiments/play.py RUN --seed 3 --film films/third           another seed of the run; where the film goes

Prints the means that the script's own evaluation gives, in episodes of the run's length. A run of crl.py can play in
every maze of its robot. A run of cocoa.py adapts anew to 128 test tasks, in turns if the family has fewer.
"""

import argparse
import dataclasses
import importlib
import json
import shlex
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from envs import AchievementEnv, Env, GoalEnv, TaskFamily
from shared import evaluation, pictures, run


def play_goals(script, config, env: GoalEnv, agent, episodes: int, key, film: str) -> tuple[dict, str]:
    policy, length = partial(script.policy, agent), config.episode_length
    scores = jax.jit(partial(evaluation.evaluate, env, None, policy, episodes, length))(key)
    return scores, pictures.film(env, *pictures.eight_episodes(env, None, policy, length, key), film)


def play_achievements(script, config, env: AchievementEnv, agent, episodes: int, key, film: str) -> tuple[dict, str]:
    vector = env.vectorise(episodes, config.episode_length)
    scores = jax.block_until_ready(jax.jit(partial(script.evaluate, config, vector))(agent, key))
    states, done = jax.block_until_ready(jax.jit(partial(script.record_episodes, config, vector))(agent, key))
    vector.close()
    return scores, pictures.film_first_episodes(env, states, done, film)


def play_tasks(script, config, family: TaskFamily, agent, episodes: int, key, film: str) -> tuple[dict, str]:
    _, tasks = family.tasks(key, family.num_train_tasks, family.num_test_tasks)
    config = dataclasses.replace(config, eval_repeats=1)
    tasks = jnp.tile(tasks, (-(-episodes // len(tasks)), 1))[:episodes]
    scores = jax.jit(partial(script.evaluate, config, family))(agent, tasks, key)
    if not hasattr(script, "adapt"):
        return scores, script.film(config, family, agent, tasks, key, film)
    z = jax.vmap(family.oracle)(tasks)
    if config.context == "encoder":
        z = jax.jit(partial(script.adapt, config, family))(agent, tasks, key)[1].mean
    return scores, script.film(config, family, agent, z, tasks, key, film)


PLAY = {GoalEnv: play_goals, AchievementEnv: play_achievements, TaskFamily: play_tasks}


def load(folder: str, seed: int | None):
    """The script that made a run, and what its `load` gives."""
    try:
        made = json.loads((Path(folder) / "config.json").read_text())
        script = importlib.import_module(f"algorithms.{Path(shlex.split(made['command'])[1]).stem}")
    except (OSError, ValueError, KeyError):
        raise run.UserError(f"{folder} is not a run folder: it has no readable config.json") from None
    except ImportError as error:
        raise run.UserError(f"the script of {folder} is not in algorithms/: {error}") from None
    return script, *script.load(folder, seed)


def other_env(env: Env, kind: type[Env], name: str, options: str) -> Env:
    """The environment of this name; UserError if an agent of `env` cannot act in it."""
    other = run.make_env(name, kind, options)
    numbers = "observation_size", "action_size", "num_actions", "oracle_size"
    sizes = lambda env: [len(getattr(env, "goal_indices", ())), *(getattr(env, name, None) for name in numbers)]
    run.need(sizes(env) == sizes(other), f"{name} has other observations, actions or goals than {env.name}")
    return other


@run.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--env", help="by default the run's")
    parser.add_argument("--env_options", default="", help="options of --env")
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--seed", type=int, help="by default the run's first")
    parser.add_argument("--film", default="film", help="path without its ending")
    flags = parser.parse_args(argv and argv[1:])
    run.need(flags.episodes > 0, f"episodes is {flags.episodes}; it is at least 1")
    run.need(bool(flags.env) or not flags.env_options, "env_options belong to --env; name it too")
    script, config, env, agent = load(flags.run, flags.seed)
    run.use_precision(config)
    kind, play = next((kind, play) for kind, play in PLAY.items() if isinstance(env, kind))
    if flags.env:
        env = other_env(env, kind, flags.env, flags.env_options)
    Path(flags.film).parent.mkdir(parents=True, exist_ok=True)
    scores, film = play(script, config, env, agent, flags.episodes, jax.random.key(0), flags.film)
    for name, score in scores.items():
        print(f"{name.removeprefix('eval/'):24} {score:.4g}")
    print(film)


if __name__ == "__main__":
    main()
