"""Meta-World: steps per second of the package in one process, and of our families with one and two. 3 minutes.

    python experiments/bench_metaworld.py

Writes metaworld_DEVICE.csv. 16 worlds take 100 steps of random actions, with rewards v1: in this process, each world
after the other, with the package's own code (its welds mended, without which it does not start); and in processes of
envs/pool.py, from a compiled loop. Medians of 5 rounds, in turns; resets do not count.
"""

from functools import partial

import jax
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

import envs
import measure
from envs.metaworld_worker import World

WORLDS, STEPS = 16, 100


def speeds(name: str) -> dict:
    families = {workers: envs.make(f"metaworld_{name}", workers=workers) for workers in (1, 2)}
    tasks, _ = families[1].tasks(jax.random.key(0), WORLDS, 1)
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, WORLDS, 4)).astype(np.float32)
    kind = ALL_V3_ENVIRONMENTS[f"{name.replace('_', '-')}-v3"]
    kind = type("Package", (kind,), {"reset_mocap_welds": World.reset_mocap_welds})
    worlds = [kind(reward_function_version="v1") for _ in range(WORLDS)]
    for world, task in zip(worlds, np.float64(tasks)):
        world._last_rand_vec, world._freeze_rand_vec, world._set_task_called = task, True, True
    seconds, rolls = {"package": [], 1: [], 2: []}, {}
    for workers, family in families.items():
        step = lambda state, action, family=family: (jax.vmap(family.step)(state, action), ())
        start = jax.vmap(family.begin)(tasks)
        rolls[workers] = jax.jit(partial(jax.lax.scan, step)).lower(start, actions).compile()

    def package():
        for step in actions:
            for world, action in zip(worlds, step):
                world.step(action)

    for _ in range(6):
        for world in worlds:
            world.reset()
        seconds["package"].append(measure.timed(package)[0])
        for workers, family in families.items():
            seconds[workers].append(measure.timed(rolls[workers], jax.vmap(family.begin)(tasks), actions)[0])
    for family in families.values():
        family.close()
    package, one, two = (WORLDS * STEPS / np.median(x[1:]) for x in seconds.values())
    rates = {"package": f"{package:.0f}", "one": f"{one:.0f}", "two": f"{two:.0f}"}
    return {"family": f"metaworld_{name}", **rates, "ratio": f"{two / package:.2f}"}


def main():
    how = f"python experiments/bench_metaworld.py; {measure.facts(f'{WORLDS} worlds')}"
    names = ("reach", "push", "door_close")
    measure.measured(f"metaworld_{jax.default_backend()}", how, [partial(speeds, name) for name in names])


if __name__ == "__main__":
    main()
