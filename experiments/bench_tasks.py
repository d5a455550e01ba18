"""Every task: compile seconds, steps per second, and what a random policy scores. About 30 minutes on 2 cores.

    python experiments/bench_tasks.py            all tasks below, and merged walls against one box a cell
    python experiments/bench_tasks.py paper      the paper's ten tasks only
    python experiments/bench_tasks.py NAME...    print these tasks only

Writes tasks_DEVICE.csv and walls_DEVICE.csv. Compile time is tracing, lowering and compiling of 50 steps; rates are
medians of 3. The random policy draws actions uniformly from [-1, 1]; its scores are those of crl.py's evaluation:
episodes of 1000 steps, counted until a robot falls, distances in the goal's unit.
"""

import os
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import envs
import measure
from envs.base import GoalEnv, GoalState

PAPER = [
    *("ant_big_maze", "ant_hardest_maze", "ant_u4_maze", "ant_u5_maze", "humanoid", "humanoid_u_maze"),
    *("humanoid_big_maze", "arm_push_easy", "arm_push_hard", "arm_binpick_hard"),
]
OTHERS = [
    *("point_u_maze", "ant", "ant_u_maze", "ant_u_maze_gen_1f2f3f", "humanoid_jaxgcrl", "humanoid_hardest_maze"),
    *(name for name in envs.IN_THE_OPEN if name not in ("ant", "humanoid", "humanoid_jaxgcrl", *PAPER)),
    *("ant_ball_u_maze", "simple_u_maze"),
]
WALLS = ["ant_u_maze", "ant_big_maze", "ant_hardest_maze", "humanoid_u_maze", "humanoid_big_maze"]
EPISODE, CHUNK = 1000, 50
NUM_ENVS = [int(n) for n in os.environ.get("NUM_ENVS", "64").split(",")]
"""How many environments are stepped side by side, e.g. NUM_ENVS=512,4096."""
FACTS = measure.facts(f"episodes of {EPISODE} steps")


def play(env: GoalEnv, state: GoalState, keys):
    """Random actions for as many steps as there are keys; a robot that fell stays as it was, but is stepped."""

    def step(state, key):
        shape = (len(state.reward), env.action_size)
        after = jax.vmap(env.step)(state, jax.random.uniform(key, shape, minval=-1, maxval=1))
        stay = lambda old, new: jnp.where(state.terminated.reshape(-1, *[1] * (new.ndim - 1)), old, new)
        state = jax.tree.map(stay, state, after)
        return state, (env.distance(state), state.terminated, jnp.isfinite(state.observation).all())

    return jax.lax.scan(step, state, keys)


def compiled(env: GoalEnv, num_envs: int):
    """A chunk of steps, its first state, and the seconds that compiling it took."""
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), num_envs))
    start = time.perf_counter()
    chunk = jax.jit(partial(play, env)).lower(state, jax.random.split(jax.random.key(0), CHUNK)).compile()
    return chunk, state, time.perf_counter() - start


def task(name: str) -> dict:
    env = envs.make_kind(name, GoalEnv)
    row = {"env": name, "simulator": env.simulator}
    for num_envs in NUM_ENVS:
        chunk, state, compile_seconds = compiled(env, num_envs)
        seconds = []
        for key in jax.random.split(jax.random.key(1), 3):
            start = time.perf_counter()
            _, seen = jax.block_until_ready(chunk(state, jax.random.split(key, CHUNK)))
            seconds.append(time.perf_counter() - start)
            assert seen[2].all(), f"{name}: an observation is not finite"
        rate = num_envs * CHUNK / np.median(seconds)
        row |= {f"compile_s_{num_envs}": f"{compile_seconds:.1f}", f"steps_per_s_{num_envs}": f"{rate:.0f}"}
    episodes = 16 if env.maze or name.startswith("arm") else 64
    if episodes != num_envs:
        chunk, state, _ = compiled(env, episodes)
    seen = []
    for key in jax.random.split(jax.random.key(2), EPISODE // CHUNK):
        state, now = chunk(state, jax.random.split(key, CHUNK))
        seen.append(jax.tree.map(np.asarray, now))
    distance, fallen, finite = (np.concatenate(x) for x in zip(*seen))
    assert finite.all(), f"{name}: an observation is not finite"
    playing = np.cumsum(fallen, axis=0) - fallen == 0
    steps = playing.sum(axis=0)
    at_goal = (playing & (distance < env.success_radius)).sum(axis=0)
    return row | {
        "episodes": episodes,
        "distance": f"{(np.where(playing, distance, 0).sum(axis=0) / steps).mean():.3f}",
        "success_any": f"{(at_goal > 0).mean():.3f}",
        "time_at_goal": f"{at_goal.mean():.1f}",
        "episode_length": f"{steps.mean():.0f}",
    }


def walls(name: str, rounds: int = 3) -> dict:
    """Seconds of a chunk with merged walls and with a box a cell, called in turns."""
    chunks, states, boxes = {}, {}, {}
    for merged in (True, False):
        env = envs.make(name, merged_walls=merged)
        chunks[merged], states[merged], _ = compiled(env, NUM_ENVS[0])
        boxes[merged] = len(env.maze.wall_boxes(merged))
    keys = jax.random.split(jax.random.key(1), CHUNK)
    seconds = {True: [], False: []}
    for _ in range(rounds + 1):
        for merged in (True, False):
            start = time.perf_counter()
            jax.block_until_ready(chunks[merged](states[merged], keys))
            seconds[merged].append(time.perf_counter() - start)
    ratios = np.divide(seconds[False], seconds[True])[1:]
    rates = {merged: NUM_ENVS[0] * CHUNK / np.median(times[1:]) for merged, times in seconds.items()}
    return {
        "env": name,
        "num_envs": NUM_ENVS[0],
        "boxes_merged": boxes[True],
        "boxes": boxes[False],
        "steps_per_s_merged": f"{rates[True]:.0f}",
        "steps_per_s": f"{rates[False]:.0f}",
        "speed_up": f"{np.median(ratios):.2f}",
    }


def measured(table: str, row_of, names: list[str]) -> None:
    """Prints a row for each name; and writes the rows so far, if the table has a name."""
    rows = []
    for name in names:
        rows.append(row_of(name))
        print(rows[-1], flush=True)
        jax.clear_caches()
        if table:
            measure.write(f"{table}_{jax.default_backend()}", f"python experiments/bench_tasks.py; {FACTS}", rows)


def main():
    names = sys.argv[1:]
    print(FACTS, flush=True)
    if names and names != ["paper"]:
        measured("", task, names)
    else:
        measured("tasks", task, PAPER if names else PAPER + OTHERS)
    if not names:
        measured("walls", walls, WALLS)


if __name__ == "__main__":
    main()
