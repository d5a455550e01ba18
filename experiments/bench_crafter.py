"""Craftax-Classic: what a random policy scores, and what resets cost.

    python experiments/bench_crafter.py random     writes random_craftax.csv; about 3 minutes on 2 cores
    python experiments/bench_crafter.py speed      writes crafter_envs_DEVICE.csv; about 6 minutes on 2 cores

random: uniformly random actions until death, in the symbolic environment, which is the same game as the one of images
and cheaper. The score is Crafter's, exp(mean of ln(1 + s)) - 1 with s the success rates in percent.

speed: random actions from states in mid-episode, so that episodes end while the clock runs. Three ways to step the same
game are called in turns: ours, which makes as many worlds as episodes have ended; VectorEnv's default, which makes
worlds for all copies when any has ended; and craftax's own automatic reset, which makes one for each copy in each step.
Rates are medians over the rounds, ratios medians of the rounds' ratios; compile time is not in them.
"""

import importlib.metadata
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import envs
import measure
from envs.base import AchievementEnv, VectorEnv

FACTS = measure.facts(f"craftax {importlib.metadata.version('craftax')}")
LIMIT = 10_000
"""The time limit of Crafter's episodes, in steps."""
BATCH, BATCHES = 192, 4
STEPS = {8: 200, 64: 50}
"""Steps in a round, by the number of environments."""
WARM_UP = 400
"""Steps in which episodes that began together come to end at different times."""
ROUNDS = 5
CRAFTAX_ALONE = {
    "length, mean": 145,
    "length, median": 137,
    "length, longest": 432,
    "return, mean": 1.46,
    "return, standard deviation": 1.30,
    "score": 1.71,
    "collect_wood %": 48.3,
    "place_table %": 12.0,
    "eat_cow %": 0.3,
    "collect_sapling %": 37.9,
    "collect_drink %": 10.0,
    "make_wood_pickaxe %": 0.8,
    "place_plant %": 31.0,
    "wake_up %": 95.2,
}
"""The same, measured on 768 other episodes of craftax 1.6.1 without any code of ours; the other rates are not known."""


@partial(jax.jit, static_argnums=(0, 2))
def random_episodes(env: AchievementEnv, key, episodes: int):
    """Lengths, returns and unlocked achievements of episodes of uniformly random actions; a multiple of 8 of them."""
    world_key, key = jax.random.split(key)
    # worlds in small batches: 64 at once take 20 times as long as 8
    state = jax.lax.map(jax.vmap(env.reset), jax.random.split(world_key, (episodes // 8, 8)))
    state = jax.tree.map(lambda x: x.reshape(episodes, *x.shape[2:]), state)

    def step(carry):
        state, length, total, key = carry
        action_key, key = jax.random.split(key)
        after = jax.vmap(env.step)(state, jax.random.randint(action_key, (episodes,), 0, env.num_actions))
        alive = ~state.terminated
        stay = lambda old, new: jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        total = total + jnp.where(alive, after.reward, 0)
        return jax.tree.map(stay, state, after), length + alive, total, key

    def playing(carry):
        state, length, *_ = carry
        return (~state.terminated).any() & (length.max() < LIMIT)

    start = state, jnp.zeros(episodes, jnp.int32), jnp.zeros(episodes), key
    state, length, total, _ = jax.lax.while_loop(playing, step, start)
    return length, total, state.achievements


def score(unlocked: np.ndarray) -> float:
    """Crafter's score of episodes: `unlocked` is (episodes, achievements)."""
    return float(np.exp(np.log1p(100 * unlocked.mean(axis=0)).mean()) - 1)


def summary(names, lengths, returns, unlocked) -> dict[str, tuple[float, float | None]]:
    """Values and their standard errors, by the names of CRAFTAX_ALONE."""
    episodes = len(lengths)
    again = np.random.default_rng(0).integers(episodes, size=(300, episodes))
    # with one success and one failure more, as a rate of 0 is not without error
    rates = (unlocked.sum(axis=0) + 1) / (episodes + 2)
    error = lambda values: values.std(ddof=1) / np.sqrt(episodes)
    return {
        "length, mean": (lengths.mean(), error(lengths)),
        "length, median": (np.median(lengths), None),
        "length, longest": (lengths.max(), None),
        "return, mean": (returns.mean(), error(returns)),
        "return, standard deviation": (returns.std(ddof=1), None),
        "score": (score(unlocked), np.std([score(unlocked[rows]) for rows in again])),
    } | {
        f"{name} %": (100 * unlocked[:, i].mean(), 100 * np.sqrt(rates[i] * (1 - rates[i]) / episodes))
        for i, name in enumerate(names)
    }


def random_policy() -> None:
    env = envs.make("craftax_classic_symbolic")
    batches = [random_episodes(env, key, BATCH) for key in jax.random.split(jax.random.key(0), BATCHES)]
    seen = summary(env.achievement_names, *(np.concatenate(x) for x in zip(*batches)))
    rows = [
        {
            "quantity": name,
            "measured": f"{value:.2f}",
            "standard_error": "" if error is None else f"{error:.2f}",
            "craftax_alone": CRAFTAX_ALONE.get(name, ""),
        }
        for name, (value, error) in seen.items()
    ]
    print(*rows, sep="\n")
    write("random", "random_craftax", f"{BATCH * BATCHES} episodes of craftax_classic_symbolic", rows)


def with_vector_env(vector: VectorEnv):
    """A function of a state and keys: steps, and counts the episodes that end."""

    def step(state, key):
        action = jax.random.randint(key, (vector.num_envs,), 0, vector.env.num_actions)
        state, after, truncated = vector.step(state, action)
        return state, (after.reward, after.terminated | truncated)

    return lambda state, keys: jax.lax.scan(step, state, keys)


def with_auto_reset(game, num_envs: int):
    """The same with craftax's own resets; its state is (observation, EnvState)."""

    def step(state, key):
        action_key, key = jax.random.split(key)
        action = jax.random.randint(action_key, (num_envs,), 0, game.num_actions)
        one = lambda key, world, action: game.step(key, world, action, game.default_params)
        observation, world, reward, ended, _ = jax.vmap(one)(jax.random.split(key, num_envs), state[1], action)
        return (observation, world), (reward, ended)

    return lambda state, keys: jax.lax.scan(step, state, keys)


def speed(kind: str, num_envs: int) -> dict:
    from craftax.craftax_env import make_craftax_env_from_name

    env = envs.make(f"craftax_classic_{kind}")
    game = make_craftax_env_from_name(f"Craftax-Classic-{kind.title()}-v1", auto_reset=True)
    ours = env.vectorise(num_envs, LIMIT)
    steps = STEPS[num_envs]
    state = jax.jit(ours.reset)(jax.random.key(0))
    state, _ = jax.jit(with_vector_env(ours))(state, jax.random.split(jax.random.key(1), WARM_UP))
    ways = {
        "ours": (with_vector_env(ours), state),
        "all_at_once": (with_vector_env(VectorEnv(env, num_envs, LIMIT)), state),
        "auto_reset": (with_auto_reset(game, num_envs), (state.env.observation, state.env.physics.world)),
    }
    states, compiled, compile_seconds = {}, {}, {}
    keys = jax.random.split(jax.random.key(2), (ROUNDS + 1, steps))
    for way, (function, state) in ways.items():
        start = time.perf_counter()
        compiled[way] = jax.jit(function).lower(state, keys[0]).compile()
        compile_seconds[way] = time.perf_counter() - start
        states[way] = state
    seconds, ends = {way: [] for way in ways}, dict.fromkeys(ways, 0)
    for i in range(ROUNDS + 1):
        for way in ways:
            taken, (states[way], (_, ended)) = measure.timed(compiled[way], states[way], keys[i])
            if i:  # the first round is a rehearsal
                seconds[way].append(taken)
                ends[way] += int(ended.sum())
    rates = {way: num_envs * steps / np.median(taken) for way, taken in seconds.items()}
    quotient = lambda way: np.median(np.divide(seconds[way], seconds["ours"]))
    return (
        {"env": env.name, "num_envs": num_envs, "fresh_worlds": ours.fresh_worlds, "steps": ROUNDS * steps}
        | {f"{way}_per_s": f"{rate:.0f}" for way, rate in rates.items()}
        | {f"ours/{way}": f"{quotient(way):.2f}" for way in ("all_at_once", "auto_reset")}
        | {f"{way}_ends": count for way, count in ends.items()}
        | {f"{way}_compile_s": f"{taken:.1f}" for way, taken in compile_seconds.items()}
    )


def write(argument: str, name: str, what: str, rows: list[dict]) -> None:
    measure.write(name, f"python experiments/bench_crafter.py {argument}; {FACTS}; {what}", rows)


def main():
    print(FACTS, flush=True)
    match sys.argv[1:]:
        case ["random"]:
            random_policy()
        case ["speed"]:
            rows = []
            for kind in ("symbolic", "pixels"):
                for num_envs in STEPS:
                    rows.append(speed(kind, num_envs))
                    print(rows[-1], flush=True)
                    jax.clear_caches()
            write("speed", f"crafter_envs_{jax.default_backend()}", "environment steps per second", rows)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
