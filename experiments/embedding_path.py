"""Figure 10 of '1000 Layer Networks': the path of phi(s, a) along an episode that reaches its goal.

    python experiments/embedding_path.py RUN_FOLDER...    a line for each run, and embedding_path.png

A panel for each run of crl.py: the embeddings of its longest episode that reaches the goal, of the first seed that has
one, on their three principal components, from dark to light. The number is ours: of all episodes that reach their goal
after at least ten steps, the share of the path's length in embedding space that lies in the last fifth of the steps,
mean over seeds. A uniform path has 0.2. Episodes have far goals, if the environment has some, and mean actions.
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
from envs import GoalEnv
from shared import evaluation, run

EPISODES, SHORTEST = 64, 10
"""Played for each seed; steps before the goal that an episode needs to count."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def played(config: crl.Config, env: GoalEnv, far_env: GoalEnv | None, agent: crl.Agent, key: jax.Array):
    """phi (time, episode, representation) and whether the robot is at the goal (time, episode)."""
    reset_key, play_key = jax.random.split(key)
    start = jax.vmap((far_env or env).reset)(jax.random.split(reset_key, EPISODES))

    def record(state):
        action = crl.policy(agent, state.observation, state.goal).mode()
        at_goal = env.distance(state) < env.success_radius
        return agent.critic.encode_state_action(state.observation, action), at_goal

    play = partial(evaluation.play, env, partial(crl.policy, agent), start, jnp.zeros(EPISODES, bool))
    return play(config.episode_length, play_key, record)


def until_the_goal(phi: np.ndarray, at_goal: np.ndarray) -> list[np.ndarray]:
    """phi along each episode until its robot first is at the goal, (steps, representation)."""
    arrived = at_goal.argmax(axis=0)  # 0 also where never
    return [phi[: last + 1, i] for i, last in enumerate(arrived) if last >= SHORTEST]


def late_share(path: np.ndarray) -> float:
    """The share of a path's length in the last fifth of its steps."""
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    return 1 - np.interp(0.8 * (len(path) - 1), np.arange(len(path)), travelled) / travelled[-1]


def measure(folder: str | Path) -> tuple[crl.Config, list[np.ndarray], np.ndarray]:
    """Settings of a run, the paths of the first seed that has some, and the mean share of each seed that has."""
    config = run.load_config(crl.Config, folder)
    run.use_precision(config)
    layouts = evaluation.make_envs(config)
    first, shares = [], []
    for seed in range(config.seed, config.seed + config.num_seeds):
        agent, key = crl.load(folder, seed)[2], run.evaluation_key(jax.random.key(seed))
        found = until_the_goal(*map(np.asarray, played(config, *layouts, agent, key)))
        first = first or found
        shares += [np.mean([late_share(path) for path in found])] if found else []
    run.need(bool(shares), f"no episode of the run in {folder} reaches its goal after {SHORTEST} steps or more")
    return config, first, np.array(shares)


def draw(folders: list[str]) -> None:
    from matplotlib import pyplot

    measured = [measure(folder) for folder in folders]
    columns = {"projection": "3d"}
    figure, axes = pyplot.subplots(1, len(folders), figsize=(4 * len(folders), 4), squeeze=False, subplot_kw=columns)
    for axis, folder, (config, found, shares) in zip(axes[0], folders, measured):
        path = max(found, key=len)
        centred = path - path.mean(axis=0)
        components = np.linalg.svd(centred, full_matrices=False)[2][:3]
        axis.scatter(*(centred @ components.T).T, c=np.arange(len(path)), s=12)
        share = figures.entry(shares)
        axis.set_title(f"depth {config.critic_depth or config.depth}: last fifth {share}", fontsize=9)
        print(f"{folder}  share of the path in the last fifth of the steps {share}, {len(shares)} seeds", flush=True)
    Path("embedding_path.png").write_bytes(figures.png(figure))
    print("embedding_path.png")


@run.command
def main(argv: list[str] | None = None) -> None:
    matplotlib.use("agg")
    folders = (argv or sys.argv)[1:]
    run.need(bool(folders), "name run folders of crl.py: python experiments/embedding_path.py RUN_FOLDER...")
    draw(folders)


if __name__ == "__main__":
    main()
