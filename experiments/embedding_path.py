"""Figure 10 of '1000 Layer Networks': the path of phi(s, a) along an episode that reaches its goal.

    python experiments/embedding_path.py RUN_FOLDER...    a line for each run, and embedding_path.png

A panel for each run of crl.py: the embeddings of one episode of its first seed, on their three principal components,
from dark to light. The number is ours: of all episodes that reach their goal, over all seeds, the share of the path's
length in embedding space that lies in the last fifth of the steps before the goal is reached. A uniform path has 0.2.
Episodes are those of far goals, if the environment has some, with mean actions.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import figures
from algorithms import crl
from shared import evaluation, run

EPISODES, SHORTEST = 64, 10
"""Played for each seed; steps before the goal that an episode needs to count."""


def paths(config: crl.Config, agent: crl.Agent, key: jax.Array) -> list[np.ndarray]:
    """phi along each episode until its robot first is at the goal, (steps, representation)."""
    env, far_env = evaluation.make_envs(config)
    reset_key, play_key = jax.random.split(key)
    start = jax.vmap((far_env or env).reset)(jax.random.split(reset_key, EPISODES))

    def record(state):
        action = crl.policy(agent, state.observation, state.goal).mode()
        at_goal = env.distance(state) < env.success_radius
        return agent.critic.encode_state_action(state.observation, action), at_goal

    play = partial(evaluation.play, env, partial(crl.policy, agent), start, jnp.zeros(EPISODES, bool))
    phi, at_goal = map(np.asarray, play(config.episode_length, play_key, record))
    arrived = at_goal.argmax(axis=0)  # 0 also where never
    return [phi[: last + 1, i] for i, last in enumerate(arrived) if last >= SHORTEST]


def late_share(path: np.ndarray) -> float:
    """The share of a path's length in the last fifth of its steps."""
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    return lengths[-max(len(lengths) // 5, 1) :].sum() / lengths.sum()


def measure(folder: str | Path) -> tuple[crl.Config, list[np.ndarray], np.ndarray]:
    """Settings of a run, the paths of its first seed, and the mean share of each seed that reaches any goal."""
    config = run.load_config(crl.Config, folder)
    run.use_precision(config)
    first, shares = [], []
    for seed in range(config.seed, config.seed + config.num_seeds):
        found = paths(config, crl.load(folder, seed)[2], run.evaluation_key(jax.random.key(seed)))
        first = first or found
        shares += [np.mean([late_share(path) for path in found])] if found else []
    run.need(bool(shares), f"no episode of the run in {folder} reaches its goal after {SHORTEST} steps or more")
    return config, first, np.array(shares)


@run.command
def main(argv: list[str] | None = None) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders of crl.py: python experiments/embedding_path.py RUN_FOLDER...")
    columns = {"projection": "3d"}
    figure, axes = pyplot.subplots(1, len(folders), figsize=(4 * len(folders), 4), squeeze=False, subplot_kw=columns)
    for axis, folder in zip(axes[0], folders):
        config, found, shares = measure(folder)
        path = max(found, key=len)
        centred = path - path.mean(axis=0)
        components = np.linalg.svd(centred, full_matrices=False)[2][:3]
        axis.scatter(*(centred @ components.T).T, c=np.arange(len(path)), s=12)
        share = figures.entry(shares)
        axis.set_title(f"depth {config.critic_depth or config.depth}: last fifth {share}", fontsize=9)
        print(f"{folder}  share of the path in the last fifth of the steps {share}, {len(shares)} seeds", flush=True)
    Path("embedding_path.png").write_bytes(figures.png(figure))
    print("embedding_path.png")


if __name__ == "__main__":
    main()
