"""What a random policy scores in the original Crafter: 250 episodes, some 3 minutes on 2 cores (1 with numba).

    python experiments/random_crafter.py

Writes random_crafter.csv. Actions are uniform, episodes end by death (none comes near the limit of 10,000 steps).
Rates are in percent of episodes; the score is Crafter's, exp(mean of ln(1 + rate)) - 1 over all achievements.
`reference` is an earlier, independent measurement: as many episodes of crafter 1.8.3, without any code from here.
`error` is the standard error of the difference of the two, and `z` the difference in such errors.
"""

import importlib.metadata
from typing import NamedTuple

import jax
import numpy as np

import measure
from envs.crafter_pool import Crafter

EPISODES, NUM_ENVS, LIMIT = 250, 10, 10_000
RATES = {
    **dict.fromkeys(Crafter.achievement_names, 0.0),
    **{"collect_wood": 20.8, "place_table": 2.8, "collect_sapling": 56.4, "place_plant": 51.2, "collect_drink": 9.6},
    **{"wake_up": 92.0, "eat_cow": 0.4, "make_wood_pickaxe": 0.4},
}
REFERENCE = {"length": 161.0, "return": 1.42, "return_std": 1.21, "length_median": 163.0, "length_max": 284.0}
REFERENCE |= {"score": 1.48, **RATES}


class Episodes(NamedTuple):
    length: np.ndarray
    """int (episodes)"""
    total_reward: np.ndarray
    """float (episodes)"""
    unlocked: np.ndarray
    """bool (episodes, achievements)"""


def play(episodes: int, num_envs: int, seed: int = 0) -> Episodes:
    """Uniform random actions; the same number of episodes from every world, since the first to end are short ones."""
    pool = Crafter().vectorise(num_envs, LIMIT)
    state, step = jax.jit(pool.reset)(jax.random.key(seed)), jax.jit(pool.step)
    actions = np.random.default_rng(seed)
    length, total_reward, seen = np.zeros(num_envs, int), np.zeros(num_envs), [[] for _ in range(num_envs)]
    each = -(-episodes // num_envs)
    while min(map(len, seen)) < each:
        state, after, truncated = step(state, actions.integers(pool.env.num_actions, size=num_envs, dtype=np.int32))
        after, truncated = jax.tree.map(np.asarray, (after, truncated))
        length += 1
        total_reward += after.reward
        for i in np.flatnonzero(after.terminated | truncated):
            seen[i].append((length[i], total_reward[i], after.achievements[i]))
            length[i] = total_reward[i] = 0
    pool.close()
    return Episodes(*map(np.array, zip(*(episode for world in seen for episode in world[:each]))))


def compare(played: Episodes) -> list[dict]:
    """A row for each quantity: here, in the reference, the standard error of the difference where it has a formula."""
    n = len(played.length)
    rates = 100 * played.unlocked.mean(axis=0)
    both = np.clip((n * rates + EPISODES * np.array(list(RATES.values()))) / (n + EPISODES), 0, 100)
    here = {
        "length": played.length.mean(),
        "length_median": np.median(played.length),
        "length_max": played.length.max(),
        "return": played.total_reward.mean(),
        "return_std": played.total_reward.std(),
        "score": np.exp(np.log1p(rates).mean()) - 1,
        **dict(zip(RATES, rates)),
    }
    spread = {
        "length": played.length.std(),
        "return": played.total_reward.std(),
        **dict(zip(RATES, np.sqrt(both * (100 - both)))),
    }
    rows = []
    for name, value in here.items():
        row = {"what": name, "here": f"{value:.2f}", "reference": f"{REFERENCE[name]:.2f}", "error": "", "z": ""}
        error = spread.get(name, 0) * np.sqrt(1 / n + 1 / EPISODES)
        if error > 0:
            row |= {"error": f"{error:.2f}", "z": f"{(value - REFERENCE[name]) / error:.1f}"}
        rows.append(row)
    return rows


def main():
    rows = compare(play(EPISODES, NUM_ENVS))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("crafter", "opensimplex", "numpy"))
    facts = measure.facts(f"{versions}; {EPISODES} episodes")
    measure.write("random_crafter", f"python experiments/random_crafter.py; {facts}", rows)
    for row in rows:
        print("".join(f"{value:<20}" if key == "what" else f"{value:>10}" for key, value in row.items()))


if __name__ == "__main__":
    main()
