"""The buffer of many tasks against lists, and its samplers' laws against exact probabilities."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from shared import replay as buffer

TASKS, CAPACITY, TIME = 3, 40, 10


class Lists:
    """What the buffer should hold: per task every row ever written, as (value, episode), and its recent context."""

    def __init__(self):
        self.rows = [[] for _ in range(TASKS)]
        self.context = [set() for _ in range(TASKS)]
        self.episodes = 0

    def add(self, visits, values, last, context):
        for task, row, ends in zip(visits, values, last):
            for t in range(TIME):
                if context:
                    self.context[task].add(len(self.rows[task]))
                self.rows[task].append((row[t], self.episodes))
                self.episodes += bool(ends[t])
            self.episodes += not ends[-1]


def filled(rounds, seed=0, end_probability=0.2):
    rng = np.random.default_rng(seed)
    replay, lists = buffer.init_tasks(jnp.zeros(()), TASKS, CAPACITY), Lists()
    number = 0.0
    for _ in range(rounds):
        visits = rng.integers(0, TASKS, 2)
        replay = buffer.forget_context(replay, jnp.array(visits))
        for task in visits:
            lists.context[task] = set()
        for context in (True, False):
            values = number + np.arange(2 * TIME, dtype=np.float32).reshape(2, TIME)
            number += 2 * TIME
            last = rng.random((2, TIME)) < end_probability
            replay = buffer.add_to_tasks(replay, jnp.array(visits), jnp.array(values), jnp.array(last), context)
            lists.add(visits, values, last, context)
    return replay, lists


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_holds_what_lists_hold(rounds):
    replay, lists = filled(rounds)
    for task, rows in enumerate(lists.rows):
        assert int(replay.count[task]) == len(rows)
        held = {number: rows[number] for number in range(len(rows))[-CAPACITY:]}
        for number, (value, episode) in held.items():
            place = task, number % CAPACITY
            assert float(replay.data[place]) == value
            fellows = [n for n, (_, other) in enumerate(rows) if other == episode]
            assert int(replay.step[place]) == number - fellows[0]
            assert int(replay.left[place]) == fellows[-1] - number
        context = range(int(replay.context_start[task]), int(replay.context_end[task]))
        assert set(context) == lists.context[task]


def test_rows_are_uniform_over_what_is_held_and_context_over_the_recent():
    replay, lists = filled(7, seed=3)
    tasks = jnp.array([0, 1, 2, 1])
    rows = np.asarray(buffer.sample_rows(replay, tasks, jax.random.key(0), 8000))
    context = np.asarray(buffer.sample_context(replay, tasks, jax.random.key(1), 8000))
    for i, task in enumerate(tasks):
        held = [value for value, _ in lists.rows[task][-CAPACITY:]]
        recent = [lists.rows[task][n][0] for n in lists.context[task]]
        for drawn, population in ((rows[i], held), (context[i], recent)):
            counts = Counter(drawn.tolist())
            assert set(counts) <= set(map(float, population))
            assert stats.chisquare([counts[float(v)] for v in population]).pvalue > 1e-4
    assert (rows[1] != rows[3]).any(), "two entries of one task draw for themselves"


@pytest.mark.parametrize("window", [1, 4, TIME])
def test_crops_lie_in_one_episode_and_have_the_stated_law(window):
    replay, lists = filled(5, seed=1)
    task, draws = 1, 20_000
    crops, valid, episode = jax.device_get(
        buffer.sample_crops(replay, jnp.full(draws, task), jax.random.key(2), window)
    )
    rows = lists.rows[task]
    number_of = {float(value): number for number, (value, _) in enumerate(rows)}
    expected = Counter()
    recent = sorted(lists.context[task])
    for number in recent:  # a uniform row chooses the episode, then the two starts are uniform and independent
        fellows = [n for n, (_, episode) in enumerate(rows) if episode == rows[number][1]]
        starts = range(fellows[0], fellows[-1] + 2 - min(window, len(fellows)))
        for a in starts:
            for b in starts:
                expected[a, b] += 1 / len(starts) ** 2 / len(recent)
    counts = Counter()
    for i in range(draws):
        starts = []
        for crop in crops[:, i]:
            numbers = [number_of[float(x)] for x in crop[valid[i]]]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert {rows[n][1] for n in numbers} == {rows[numbers[0]][1]}, "a crop crosses the end of an episode"
            starts.append(numbers[0])
        fellows = [n for n, (_, name) in enumerate(rows) if name == rows[starts[0]][1]]
        assert valid[i].sum() == min(window, len(fellows)) and episode[i] == fellows[0]
        counts[tuple(starts)] += 1
    assert set(counts) <= set(expected)
    names = [name for name in expected if expected[name] * draws >= 5]
    rare = draws - sum(counts[name] for name in names), draws - sum(expected[name] * draws for name in names)
    seen, law = [counts[name] for name in names], [expected[name] * draws for name in names]
    if rare[1] > 5:
        seen, law = [*seen, rare[0]], [*law, rare[1]]
    law = np.array(law) * sum(seen) / sum(law)
    assert stats.chisquare(seen, law).pvalue > 1e-4


def test_several_visits_to_one_task_follow_one_another():
    replay = buffer.init_tasks(jnp.zeros(()), 2, CAPACITY)
    values = jnp.arange(30.0).reshape(3, TIME)
    replay = buffer.add_to_tasks(replay, jnp.array([1, 0, 1]), values, jnp.zeros((3, TIME), bool), True)
    np.testing.assert_array_equal(replay.count, [TIME, 2 * TIME])
    np.testing.assert_array_equal(replay.data[1, : 2 * TIME], np.concatenate([values[0], values[2]]))
    np.testing.assert_array_equal(replay.left[1, :3], [9, 8, 7])
