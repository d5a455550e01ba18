"""A GIF of a trained robot of crl.py in 3-D, for a page; needs EGL. The first episodes of a fixed random key.

    python experiments/film.py RUN_FOLDER OUT.gif              three episodes side by side, with mean actions
    python experiments/film.py RUN_FOLDER OUT.gif sampled      with sampled actions

An episode is shown until the robot has reached its goal and a little longer; then its picture stands still. The goal is
the red ball.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

import task_pictures  # first, for it chooses MuJoCo's renderer
from algorithms import crl
from envs.crafter import save_gif, side_by_side
from envs.robot import Robot
from shared import evaluation, run

EPISODES, FRAMES = 3, 60
SIZE = 240, 180


@run.command
def main(argv: list[str] | None = None) -> None:
    arguments = (argv or sys.argv)[1:]
    if len(arguments) not in (2, 3) or arguments[2:] not in ([], ["sampled"]):
        raise run.UserError("film.py takes a run folder, a GIF, and perhaps 'sampled'")
    config, env, agent = crl.load(arguments[0])
    run.need(isinstance(env, Robot), f"{env.name} is no robot in 3-D; its run has a GIF already")
    _, far_env = evaluation.make_envs(config)
    reset_key, key = jax.random.split(jax.random.key(0))
    start = jax.jit(jax.vmap((far_env or env).reset))(jax.random.split(reset_key, EPISODES))
    play = partial(evaluation.play, env, partial(crl.policy, agent), record=lambda state: state)
    sampled = np.full(EPISODES, len(arguments) == 3)
    states = jax.jit(partial(play, episode_length=config.episode_length, key=key))(start, sampled)
    states = jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), states)
    near = np.asarray(env.distance(states)) < env.success_radius
    time = states.reward.shape[1]
    ends = [np.append(np.flatnonzero(row), time - 1)[0] for row in near]
    last = min(time - 1, max(ends) + time // 20)
    steps = np.linspace(0, last, FRAMES).astype(int)
    films = []
    for i in range(EPISODES):
        episode = jax.tree.map(lambda x, i=i: x[i], states)
        walked = env.poses(episode)[0].reshape(-1, 3)
        goal = np.asarray(env.goal_position(jax.tree.map(lambda x: x[0], episode)))
        view = np.concatenate([walked, goal + env.success_radius * np.array([[-1, -1, 0], [1, 1, 1]])])
        pictures = [
            task_pictures.robot_picture(env, jax.tree.map(lambda x, t=t: x[min(t, last)], episode), view).resize(SIZE)
            for t in np.minimum(steps, ends[i] + time // 20)
        ]
        films.append(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    frames = side_by_side(np.stack(films), np.zeros((EPISODES, FRAMES), bool))
    save_gif(frames, arguments[1], fps=12, enlarge=1)
    print(
        f"{arguments[1]}: {Path(arguments[1]).stat().st_size / 1000:.0f} kB; at the goal: {near.any(axis=1).tolist()}"
    )


if __name__ == "__main__":
    main()
