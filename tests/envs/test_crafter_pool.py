import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import envs
from envs import AchievementState
from envs.crafter_pool import Crafter, CrafterPool
from envs.pool import shares

crafter = pytest.importorskip("crafter")
ROOT = Path(__file__).parents[2]
NUM_ENVS, LIMIT, STEPS, SEED = 2, 146, 200, 14
"""With this seed one world ends by death, later at the time limit, the other by death just at the time limit."""
HALF = 60


@pytest.fixture
def make_pool():
    """Makes pools that are closed after the test."""
    pools = []

    def make(num_envs=NUM_ENVS, limit=LIMIT, **options):
        pools.append(Crafter(**options).vectorise(num_envs, limit))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def reset(pool: CrafterPool, seed: int = SEED):
    return jax.block_until_ready(jax.jit(pool.reset)(jax.random.key(seed)))


class Steps(NamedTuple):
    """Steps of all worlds: leading axes (time, num_envs)."""

    observation: jax.Array
    """What was acted on."""
    after: AchievementState
    truncated: jax.Array


def step_of(pool: CrafterPool):
    def step(state, action):
        now, after, truncated = pool.step(state, action)
        return now, Steps(state.env.observation, after, truncated)

    return step


def unroll(pool: CrafterPool, state, actions):
    """The last state, and all steps."""
    return jax.block_until_ready(jax.jit(partial(jax.lax.scan, step_of(pool)))(state, actions))


def assert_equal(a, b):
    """Two PyTrees of arrays, which may be keys, are the same, dtypes included."""
    a, b = jax.tree.flatten(a), jax.tree.flatten(b)
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0]):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def processes(pool: CrafterPool) -> list[int]:
    return [worker._process.pid for worker in pool.pool.workers]


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def played():
    """A reference run: the first state, one on the way, the last one, all steps, the actions."""
    pool = Crafter().vectorise(NUM_ENVS, LIMIT)
    actions = np.random.default_rng(SEED).integers(0, 17, (STEPS, NUM_ENVS)).astype(np.int32)
    first = reset(pool)
    middle, before = unroll(pool, first, actions[:HALF])
    last, after = unroll(pool, middle, actions[HALF:])
    steps = jax.tree.map(lambda *x: np.concatenate(x), before, after)
    pool.close()
    return SimpleNamespace(first=first, middle=middle, last=last, steps=steps, actions=actions)


def test_a_jitted_scan_equals_stepping_crafter(played, monkeypatch):
    # crafter is no function of its seed, unless the creatures of a chunk have an order
    where = lambda creature: (creature.pos[0], creature.pos[1])
    in_order = lambda world: {chunk: sorted(creatures, key=where) for chunk, creatures in world._chunks.items()}
    monkeypatch.setattr(crafter.engine.World, "chunks", property(in_order))
    got, after = played.steps, played.steps.after
    for i in range(NUM_ENVS):
        game = crafter.Env(seed=int(played.first.env.physics.seed[i]), length=LIMIT)
        observation = game.reset()
        for t in range(STEPS):
            np.testing.assert_array_equal(got.observation[t, i], observation)
            observation, reward, done, info = game.step(int(played.actions[t, i]))
            np.testing.assert_array_equal(after.observation[t, i], observation)
            assert after.reward[t, i] == np.float32(reward)
            assert after.terminated[t, i] == (info["discount"] == 0)
            assert (after.terminated[t, i] or got.truncated[t, i]) == done
            achieved = [name for name, yes in zip(Crafter.achievement_names, after.achievements[t, i]) if yes]
            assert achieved == [name for name, count in info["achievements"].items() if count]
            if done:
                observation = game.reset()
        np.testing.assert_array_equal(played.last.env.observation[i], observation)
    assert after.achievements.any()


def test_states_have_the_declared_form(played):
    env, state, got, after = Crafter(), played.last, played.steps, played.steps.after
    assert env.achievement_names == tuple(crafter.constants.achievements) == tuple(sorted(env.achievement_names))
    assert env.num_actions == len(crafter.constants.actions)
    assert not env.in_jax
    images = state.env.observation, got.observation[0], after.observation[0]
    chex.assert_shape(images, (NUM_ENVS, *env.observation_shape))
    chex.assert_type(images, env.observation_dtype)
    chex.assert_type(after.reward, np.float32)
    chex.assert_shape(after.achievements, (STEPS, NUM_ENVS, len(env.achievement_names)))
    chex.assert_trees_all_equal_shapes(state, jax.eval_shape(env.vectorise(NUM_ENVS, LIMIT).reset, jax.random.key(0)))


def test_the_worlds_after_a_step_are_those_that_were_acted_in(played):
    """Also where an episode ended: its number, and its actions with the one just taken."""
    worlds, episode, clock = played.steps.after.physics, np.ones(NUM_ENVS, int), np.zeros(NUM_ENVS, int)
    for t in range(STEPS):
        np.testing.assert_array_equal(worlds.seed[t], played.first.env.physics.seed)
        np.testing.assert_array_equal(worlds.episode[t], episode)
        np.testing.assert_array_equal(worlds.actions[t, np.arange(NUM_ENVS), clock], played.actions[t])
        ended = played.steps.after.terminated[t] | played.steps.truncated[t]
        episode, clock = episode + ended, np.where(ended, 0, clock + 1)


def test_episodes_end_by_death_or_at_the_time_limit_and_start_afresh(played):
    got, after, steps, ends = played.steps, played.steps.after, np.zeros(NUM_ENVS, int), np.zeros(NUM_ENVS, int)
    deaths_at_the_limit = 0
    for t in range(STEPS):
        steps += 1
        np.testing.assert_array_equal(got.truncated[t], (steps == LIMIT) & ~after.terminated[t])
        ended = after.terminated[t] | got.truncated[t]
        if t + 1 < STEPS:
            same = (got.observation[t + 1] == after.observation[t]).all(axis=(1, 2, 3))
            np.testing.assert_array_equal(same, ~ended)
            # of a new episode, only what its first step unlocked
            assert after.achievements[t + 1][ended].sum() <= 1
        deaths_at_the_limit += (after.terminated[t] & (steps == LIMIT)).sum()
        steps[ended] = 0
        ends += ended
    assert after.terminated.sum() == 2 and got.truncated.sum() == deaths_at_the_limit == 1
    np.testing.assert_array_equal(played.last.steps, steps)
    np.testing.assert_array_equal(played.last.env.physics.episode, 1 + ends)
    np.testing.assert_array_equal(ends, [1, 2])
    assert not played.last.env.terminated.any()


def test_two_pools_in_one_compiled_program_do_not_disturb_each_other(played, make_pool):
    train, evaluation = make_pool(), make_pool(1, 1000)

    def step(states, action):
        state, seen = step_of(train)(states[0], action)
        other = jax.lax.while_loop(
            lambda other: other.steps[0] < 2 * state.steps[0],
            lambda other: evaluation.step(other, action[:1])[0],
            states[1],
        )
        return (state, other), seen

    states, actions = (reset(train), reset(evaluation, 1)), played.actions[:HALF]
    program = jax.jit(partial(jax.lax.scan, step), donate_argnums=0).lower(states, actions).compile()
    (state, other), steps = program(states, actions)
    assert_equal(steps, jax.tree.map(lambda x: x[:HALF], played.steps))
    assert_equal(state, played.middle)
    assert other.steps[0] == 2 * HALF


def test_a_new_pool_restored_to_a_saved_state_goes_on_as_if_nothing_had_happened(played, make_pool):
    np.testing.assert_array_equal(played.middle.env.physics.episode, [1, 2])
    pool = make_pool()
    pool.restore(played.middle)
    last, steps = unroll(pool, played.middle, played.actions[HALF:])
    assert_equal(steps, jax.tree.map(lambda x: x[HALF:], played.steps))
    assert_equal(last, played.last)


def test_a_saved_state_that_the_worlds_do_not_come_out_as_is_refused(played, make_pool):
    pool = make_pool(workers=1)
    state = played.middle
    message = f"^Crafter's world 1 differs from the saved one after replaying its {state.steps[1]} actions; was it "
    wrong = state.env._replace(observation=state.env.observation.at[1, 5, 5].add(1))
    with pytest.raises(RuntimeError, match=message):
        pool.restore(state._replace(env=wrong))
    assert pool.failure.startswith(message[1:])
    with pytest.raises(jax.errors.JaxRuntimeError, match=message[1:]):
        unroll(pool, state, played.actions[:1])


def test_a_state_that_is_not_the_latest_is_refused(make_pool):
    pool = make_pool(1)
    step = jax.jit(pool.step)
    old = reset(pool)
    new, *_ = step(old, np.zeros(1, np.int32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="stepped from a state that is not its latest"):
        jax.block_until_ready(step(old, np.zeros(1, np.int32)))
    assert pool.failure.startswith("Crafter was stepped from a state that is not its latest: it has one set of worlds")
    assert "\n" not in pool.failure
    pool.restore(new)
    assert pool.failure is None
    assert step(new, np.zeros(1, np.int32))[0].steps[0] == 2
    pool.close()
    pool.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match="not its latest"):
        jax.block_until_ready(step(new, np.zeros(1, np.int32)))


@needs_proc
def test_a_killed_worker_ends_the_program_at_once_with_one_clear_line(make_pool, capfd, caplog):
    pool = make_pool(limit=10_000)
    state = reset(pool)
    program = jax.jit(lambda state: jax.lax.while_loop(lambda s: True, lambda s: _noop(pool, s), state))
    program = program.lower(state).compile()
    pids, killed = processes(pool), []

    def kill():
        os.kill(pids[1], signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Timer(0.5, kill).start()
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(program(state))
    assert time.monotonic() - killed[0] < 5
    assert pool.failure == "Crafter worker 1 died (signal SIGKILL; is the machine out of memory?)"
    assert not any(map(alive, pids))
    assert not caplog.records
    assert capfd.readouterr().err == ""
    pool.close()


def _noop(pool, state):
    return pool.step(state, jnp.zeros(pool.num_envs, jnp.int32))[0]


def test_a_worker_that_crashes_says_why_and_a_reset_starts_new_ones(make_pool):
    pool = make_pool(1)
    state = reset(pool)
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(jax.jit(pool.step)(state, np.full(1, 17, np.int32)))
    assert pool.failure == "Crafter worker 0 died (exit code 1: IndexError: list index out of range)"
    state = _noop(pool, reset(pool))
    assert pool.failure is None
    assert state.steps[0] == 1


def test_workers_that_cannot_be_started_are_a_failure_in_one_line(make_pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    pool = make_pool(1)
    with pytest.raises(jax.errors.JaxRuntimeError):
        reset(pool)
    assert pool.failure.startswith("cannot start 1 Crafter workers: [Errno 2] No such file or directory")


ENDLESS = """
    import sys
    import jax, numpy as np
    import envs

    pool = envs.make("crafter").vectorise(2, 10_000)
    state, step = jax.jit(pool.reset)(jax.random.key(0)), jax.jit(pool.step)
    while True:
        state, *_ = step(state, np.zeros(2, np.int32))
        if state.steps[0] == 5:
            print(*[worker._process.pid for worker in pool.pool.workers], flush=True)
"""


@pytest.fixture
def endless():
    """A training program that never ends, in a process group of its own, and the ids of its workers."""
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS)]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    yield program, [int(word) for word in program.stdout.readline().split()]
    program.kill()
    program.communicate()


@needs_proc
def test_workers_do_without_jax_ignore_ctrl_c_and_end_with_their_parent_even_if_it_is_killed(endless):
    program, pids = endless
    assert len(pids) == 2
    for pid in pids:
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in libraries
        assert "jaxlib" not in libraries
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    assert program.poll() is None
    assert all(map(alive, pids))
    program.kill()
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "num_envs", "sizes"),
    [({}, 3, [1, 1, 1]), ({"workers": 2.0}, 5, [2, 3]), ({"workers": 1}, 4, [4]), ({"workers": 9}, 2, [1, 1])],
)
def test_worlds_are_shared_out_among_the_workers(options, num_envs, sizes):
    pool = envs.make("crafter", **options).vectorise(num_envs, LIMIT)
    assert [share.stop - share.start for share in shares(num_envs, pool.pool._number)] == sizes
    assert not processes(pool)  # they start with the first reset


@pytest.mark.parametrize("workers", [-1, 1.5])
def test_a_number_of_workers_that_is_none_is_refused(workers):
    with pytest.raises(ValueError, match=rf"^option workers of crafter is {workers}; it is a whole number, 0 or more$"):
        Crafter(workers)


def test_without_the_package_crafter_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ValueError, match=r"^the package crafter is not installed; pip install -e '\.\[crafter\]'$"):
        envs.make("crafter")


def test_one_environment_cannot_be_stepped():
    with pytest.raises(NotImplementedError, match=r"only its vectorise\(\.\.\.\) can be reset"):
        Crafter().reset(jax.random.key(0))
    with pytest.raises(NotImplementedError, match=r"only its vectorise\(\.\.\.\) can be stepped"):
        Crafter().step(AchievementState(*[jnp.zeros(0)] * 3, *[jnp.zeros(0, bool)] * 2), jnp.int32(0))


def test_render_draws_the_episodes_side_by_side(played, tmp_path):
    path = Crafter().render(_film(played), str(tmp_path / "film"))
    assert path == str(tmp_path / "film.gif")
    with Image.open(path) as film:
        assert STEPS / 2 < film.n_frames <= STEPS  # equal ones after another are one
        assert film.size[1] % 64 == 0
        assert film.size[0] >= NUM_ENVS * film.size[1]


def _film(played):
    """The observations of the reference run as states with axes (episode, time)."""
    by_episode = lambda x: jnp.swapaxes(x, 0, 1)
    observation = by_episode(played.steps.observation)
    return played.last.env._replace(observation=observation, terminated=jnp.zeros(observation.shape[:2], bool))


@pytest.mark.slow
def test_a_random_policy_achieves_what_an_independent_measurement_found():
    spec = importlib.util.spec_from_file_location("random_crafter", ROOT / "experiments" / "random_crafter.py")
    random_crafter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(random_crafter)
    played = random_crafter.play(episodes=24, num_envs=8, seed=1)
    assert len(played.length) == 24
    for row in random_crafter.compare(played):
        if row["z"]:
            assert abs(float(row["z"])) < 3.5, row
        # nobody was ever seen to reach the others
        elif row["what"] in random_crafter.RATES:
            assert float(row["here"]) == float(row["reference"]), row
