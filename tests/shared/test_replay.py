"""The ring buffer against a deque, and the samplers' laws against exact probabilities."""

import math
from collections import Counter, deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from shared import replay as buffer

CAPACITY, NUM_ENVS, DISCOUNT = 20, 3, 0.8


def filled(total_rows, end_probability, seed=0, chunk=7):
    """A buffer after many insertions, and a deque per environment of what it should hold.

    An entry of a deque is (row number, episode number, value).
    """
    rng = np.random.default_rng(seed)
    replay = buffer.init(jnp.zeros(2), CAPACITY, NUM_ENVS)
    add = jax.jit(buffer.add, donate_argnums=0)
    held = [deque(maxlen=CAPACITY) for _ in range(NUM_ENVS)]
    episode = np.zeros(NUM_ENVS, int)
    number = 0
    while number < total_rows:
        time = int(rng.integers(1, chunk + 1))
        values = rng.normal(size=(time, NUM_ENVS, 2)).astype(np.float32)
        last = rng.random((time, NUM_ENVS)) < end_probability
        replay = add(replay, jnp.array(values), jnp.array(last))
        for t in range(time):
            for env in range(NUM_ENVS):
                held[env].append((number + t, episode[env], values[t, env]))
                episode[env] += last[t, env]
        number += time
    return replay, held


@pytest.mark.parametrize("total_rows", [1, 13, 20, 21, 300])
@pytest.mark.parametrize("end_probability", [0.0, 0.15, 1.0])
def test_holds_what_a_deque_holds(total_rows, end_probability):
    replay, held = filled(total_rows, end_probability)
    for env, rows in enumerate(held):
        assert int(replay.size) == len(rows)
        assert int(replay.count) == rows[-1][0] + 1
        newest = {episode: number for number, episode, _ in rows}
        for number, episode, value in rows:
            np.testing.assert_array_equal(replay.data[number % CAPACITY, env], value)
            assert (
                int(replay.episode_end[int(replay.episode[number % CAPACITY, env]) % CAPACITY, env]) == newest[episode]
            )


def test_gather_returns_the_rows_asked_for():
    replay, held = filled(50, 0.2)
    number = jnp.array([held[0][3][0], held[2][19][0], held[1][0][0]])
    got = buffer.gather(replay, number, jnp.array([0, 2, 1]))
    np.testing.assert_array_equal(got, [held[0][3][2], held[2][19][2], held[1][0][2]])


def test_more_rows_than_capacity_are_refused():
    replay = buffer.init(jnp.zeros(()), 4, 1)
    with pytest.raises(ValueError, match="5 rows at once do not fit a replay of 4"):
        buffer.add(replay, jnp.zeros((5, 1)), jnp.zeros((5, 1), bool))


def truncated(weights):
    return np.array(weights) / np.sum(weights)


def exact_episode_law(held, discount):
    """P(env, row, future): rows uniform, future = row + k - 1 with P(k) ~ discount^k up to the episode's newest row."""
    law = {}
    for env, rows in enumerate(held):
        for number, episode, _ in rows:
            futures = [n for n, e, _ in rows if e == episode and n >= number]
            if discount == math.inf:
                futures, p = futures[-1:], [1]
            else:
                p = truncated([discount ** (n - number) for n in futures])
            law |= {(env, number, n): q / len(rows) / NUM_ENVS for n, q in zip(futures, p)}
    return law


def exact_window_law(held, window):
    """The published sampler, by enumeration: window start, row, weights discount^k on the episode's later rows."""
    law = Counter()
    for env, rows in enumerate(held):
        rows = list(rows)
        width = min(window, len(rows))
        starts = max(len(rows) - width, 1)
        for start in range(starts):
            inside = rows[start : start + width]
            for position, (number, episode, _) in enumerate(inside[:-1]):
                futures = [n for n, e, _ in inside[position + 1 :] if e == episode] or [number]
                p = truncated([DISCOUNT ** (n - number) for n in futures])
                for n, q in zip(futures, p):
                    law[env, number, n] += q / starts / (width - 1) / NUM_ENVS
    return law


def assert_follows(law, pairs):
    drawn = Counter(zip(*(np.asarray(x).tolist() for x in pairs)))
    assert set(drawn) <= set(law), "a pair was drawn that cannot occur"
    total = sum(drawn.values())
    expected = np.array([law[key] * total for key in law])
    seen = np.array([drawn[key] for key in law])
    assert np.isclose(expected.sum(), total)
    # pairs too rare for a chi-square go into one bin
    rare = expected < 10
    if rare.any():
        seen, expected = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(seen, expected).pvalue > 1e-3


@pytest.mark.parametrize("end_probability", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("total_rows", [12, 100])  # before and after wrapping around
@pytest.mark.parametrize("discount", [DISCOUNT, 1.0, math.inf])
def test_futures_follow_the_truncated_geometric_law(total_rows, end_probability, discount):
    """Geometric futures, uniform ones, and the end of the episode, by enumeration."""
    replay, held = filled(total_rows, end_probability)
    draw = jax.jit(buffer.sample_future, static_argnums=(2, 3))
    assert_follows(exact_episode_law(held, discount), draw(replay, jax.random.key(1), 200_000, discount))


@pytest.mark.parametrize("end_probability", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("total_rows", [5, 20, 100])
def test_windowed_futures_follow_the_published_law(total_rows, end_probability):
    replay, held = filled(total_rows, end_probability)
    draw = jax.jit(buffer.sample_future_in_window, static_argnums=(2, 3, 4))
    assert_follows(exact_window_law(held, 8), draw(replay, jax.random.key(2), 200_000, DISCOUNT, 8))


@pytest.mark.parametrize("discount", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("steps", [0, 1, 2, 17, 999])
def test_truncated_geometric_inverts_the_distribution_function(discount, steps):
    uniform = jnp.linspace(0, 1, 1_000_001)[:-1]
    k = np.asarray(buffer.truncated_geometric(uniform, jnp.full(uniform.shape, steps), discount))
    if steps == 0:
        assert (k == 0).all()
        return
    share = np.bincount(k, minlength=steps + 1)[1:] / len(k)
    exact = truncated(discount ** np.arange(1, steps + 1, dtype=np.float64))
    assert np.abs(share - exact).sum() / 2 < 3e-4  # total variation, on a grid of a million points in float32
