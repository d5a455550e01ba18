"""What rl2.py and maml.py learn: to find goals that they are not told."""

import dataclasses
from functools import partial

import jax
import pytest

from algorithms import maml, rl2
from envs.point import PointGoal
from shared import run

OPTIMISED = True


def returns(script, steps, **settings):
    """With held-out goals, before and after adaptation, after so many steps of the default recipe."""
    given = run.configure(script.Config, script.RECIPES, None, [script.__name__])
    config, family = run.settle_tasks(dataclasses.replace(given, **settings), PointGoal()), PointGoal()
    state = jax.jit(partial(script.init, config, family))(jax.random.key(0))
    learn = jax.jit(partial(script.learn, config, family), donate_argnums=0)
    while state.env_steps < steps:
        state, _ = learn(state)
    scores = jax.jit(partial(script.evaluate, config, family))(state.agent, state.test_tasks, jax.random.key(1))
    return float(scores["eval/return_prior"]), float(scores["eval/return_adapted"])


@pytest.mark.slow
def test_a_point_finds_a_goal_that_it_is_not_told_and_goes_back_to_it():
    """Before half of the recipe's steps. Three seeds have -10 on average by then, and -13 in the first episode, which
    has to look for the goal; going to the centre gives -15, a random walk -21."""
    first, last = returns(rl2, 400_000)
    assert last > -11 and last > first + 1.5, (first, last)


@pytest.mark.slow
def test_without_its_history_it_cannot_know_the_goal():
    """With it, three seeds have -12 by then, and -14 in the first episode."""
    first, last = returns(rl2, 300_000, history=False)
    assert last < -13 and abs(first - last) < 1, (first, last)


@pytest.mark.slow
def test_a_gradient_step_on_twenty_episodes_finds_the_goal():
    """Three seeds have -9 to -11 by then, and -15 to -17 before the step."""
    before, adapted = returns(maml, 180_000)
    assert adapted > -11 and adapted > before + 4, (before, adapted)
