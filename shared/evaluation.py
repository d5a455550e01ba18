"""How goal-reaching policies are scored and filmed: one protocol, for every algorithm that reaches goals.

A policy here is a function (observation, goal) -> distribution, each of any batch shape, the distribution with `mode()`
and `sample(key)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, PyTree

import envs
from envs import GoalEnv, GoalState
from shared import run

SCORES = run.Scores(
    "episodes that reach their goal",
    {
        "eval/success_any": "uniform goals, mean action",
        "eval/sampled/success_any": "uniform goals, sampled action",
        "eval/far/success_any": "far goals, mean action",
        "eval/far/sampled/success_any": "far goals, sampled action",
    },
)


BUDGETS = {
    "humanoid_*_maze": "--total_env_steps 400_000_000",
    "ant_u5_maze": "--total_env_steps 400_000_000",
    "ant_hardest_maze": "--total_env_steps 200_000_000",
}
"""Recipes of all goal-reaching algorithms: where '1000 Layer Networks' trains longer than 100 million steps."""


def make_envs(config, images: bool = False) -> tuple[GoalEnv, GoalEnv | None]:
    """The environment `env`, and the one with its far goals: `eval_env`, or by default that of the same name, if any.

    Raises:
      UserError: no such environments, or they differ in more than their goals, have images where none are taken, or
        other processes step them.
    """
    env = run.make_env(config.env, GoalEnv, config.env_options)
    run.need(images or env.image_shape is None, f"{config.env} has images to look at; only crl.py takes those")
    run.need(env.in_jax, f"{config.env} is stepped by other processes; only crl_offline.py takes it")
    far_name = config.eval_env or envs.far_goals(config.env)
    far_env = run.make_env(far_name, GoalEnv, config.env_options) if far_name else None
    if far_env and far_env.world != env.world:
        raise run.UserError(
            f"eval_env {far_name} has another robot, other walls or another time step than {config.env}"
        )
    return env, far_env


def vector_env(config, env: GoalEnv) -> envs.VectorEnv:
    """The environments that data are collected in."""
    return envs.VectorEnv(env, config.num_envs, config.episode_length, config.goals)


def play(
    env: GoalEnv,
    policy: Callable,
    start: GoalState,
    sampled: Bool[Array, "*batch"],
    episode_length: int,
    key: Key[Array, ""],
    record: Callable[[GoalState], PyTree],
) -> PyTree:
    """One episode from each start (*batch), with sampled actions or the mean ones.

    Returns record(state) of each step, time first. A robot that fell stays as it was.
    """
    shape = sampled.shape  # as one axis: a vmap for each takes up to twice as long to trace
    start, sampled = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), (start, sampled))

    def step(state, key):
        distribution = policy(state.observation, state.goal)
        action = jnp.where(sampled[:, None], distribution.sample(key), distribution.mode())
        after, _ = envs.intact(state, jax.vmap(env.step)(state, action))
        state = envs.select(state.terminated, state, after)
        return state, record(state)

    recorded = jax.lax.scan(step, start, jax.random.split(key, episode_length))[1]
    return jax.tree.map(lambda x: x.reshape(len(x), *shape, *x.shape[2:]), recorded)


def evaluate(
    env: GoalEnv,
    far_env: GoalEnv | None,
    policy: Callable,
    num_episodes: int,
    episode_length: int,
    key: Key[Array, ""],
) -> dict:
    """Fresh episodes in each layout (uniform goals, far goals) with each kind of action (mean, sampled).

    A robot that falls ends its episode; the step of the fall still counts. Metrics are means over episodes, under
    `eval/`, `eval/sampled/`, `eval/far/` and `eval/far/sampled/`:
      success_any: share that came within the success radius of their goal at some step.
      time_at_goal: steps within it. time_at_goal_NAME: within another radius that scores are published for.
      distance: mean distance to the goal, in the goal's unit. episode_length: in steps.
    """
    reset_key, play_key = jax.random.split(key)
    keys = jax.random.split(reset_key, num_episodes)
    layouts = {"": env} if far_env is None else {"": env, "far/": far_env}
    starts = [jax.vmap(layout.reset)(keys) for layout in layouts.values()]
    both_kinds = lambda *x: jnp.repeat(jnp.stack(x)[:, None], 2, axis=1)  # axes: layout, kind of action, episode
    start = jax.tree.map(both_kinds, *starts)
    sampled = jnp.broadcast_to(jnp.array([False, True])[:, None], start.terminated.shape)
    # the layouts have the same walls, so one environment steps them all
    record = lambda state: (env.distance(state), state.terminated)
    distance, fallen = play(env, policy, start, sampled, episode_length, play_key, record)
    playing = jnp.cumsum(fallen, axis=0) - fallen == 0  # (time, layout, kind of action, episode)
    steps = playing.sum(axis=0)
    at_goal = lambda radius: jnp.sum(playing & (distance < radius), axis=0)
    per_episode = {
        "success_any": at_goal(env.success_radius) > 0,
        "time_at_goal": at_goal(env.success_radius),
        "distance": jnp.sum(jnp.where(playing, distance, 0), axis=0) / steps,
        "episode_length": steps,
        **{f"time_at_goal_{name}": at_goal(radius) for name, radius in env.other_radii.items()},
    }
    return {
        f"eval/{layout}{kind}{metric}": values[i, j].mean()
        for i, layout in enumerate(layouts)
        for j, kind in enumerate(("", "sampled/"))
        for metric, values in per_episode.items()
    }
