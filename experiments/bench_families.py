"""Task families: compile seconds, steps per second, returns at random; and which physics. About 6 minutes on 2 cores.

    python experiments/bench_families.py            both tables
    python experiments/bench_families.py NAME...    print these families only
    python experiments/bench_families.py random     only random returns on the test tasks of the point families

Writes families_DEVICE.csv, family_physics_DEVICE.csv, and random_points.csv, which is what 0 means in normalised
returns of cocoa.py: means of 200 episodes in each test task of a seed. Compile time is tracing, lowering and compiling
of 20 steps of 64 copies; rates are medians of 3. The random policy draws actions uniformly from [-1, 1]; returns are
those of episodes of the published length, to their end. `deviation` of a physics is the largest difference of a joint
position from C MuJoCo (float64, with the model's solver settings) 5 control steps after a start with random actions,
the median over 16 copies.
"""

import io
import sys
import time
import warnings
from contextlib import redirect_stdout
from functools import partial

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

import envs
import measure
from algorithms import cocoa
from envs import mjx_physics, spring
from envs.mjx_physics import Physics, mjx
from shared import run

FACTS = measure.facts()
NUM_ENVS, CHUNK = 64, 20
BODIES = {"half_cheetah_dir": "half_cheetah", "ant_dir": "ant", "humanoid_dir": "humanoid", "walker_params": "walker2d"}
"""Families whose physics are compared -> brax's file."""


def timed(function, *args):
    """The compiled function, the seconds that compiling took, and the median seconds of 3 calls."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_seconds, seconds = time.perf_counter() - start, []
    for _ in range(4):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return result, compile_seconds, np.median(seconds[1:])


def play(env, state, keys):
    """Random actions; who fell stays as it was."""

    def step(state, key):
        action = jax.random.uniform(key, (len(state.reward), env.action_size), minval=-1, maxval=1)
        after = jax.vmap(env.step)(state, action)
        seen = jnp.where(state.terminated, 0, after.reward), ~state.terminated, jnp.isfinite(after.observation).all()
        return cocoa.select(state.terminated, state, after), seen

    return jax.lax.scan(step, state, keys)


def family(name: str) -> dict:
    env = envs.make_kind(name, envs.TaskFamily)
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), NUM_ENVS))
    keys = jax.random.split(jax.random.key(1), CHUNK)
    _, compile_seconds, seconds = timed(partial(play, env), state, keys)
    episode = 20 if "point" in name else 200
    _, (rewards, alive, finite) = jax.jit(partial(play, env))(state, jax.random.split(jax.random.key(2), episode))
    assert np.all(finite), f"{name}: an observation is not finite"
    returns = np.asarray(rewards).sum(axis=0)
    return {
        "family": name,
        "simulator": env.simulator,
        "num_envs": NUM_ENVS,
        "compile_s": f"{compile_seconds:.1f}",
        "steps_per_s": f"{NUM_ENVS * CHUNK / seconds:.0f}",
        "episodes": NUM_ENVS,
        "random_return": f"{returns.mean():.2f}",
        "standard_error": f"{returns.std(ddof=1) / NUM_ENVS**0.5:.2f}",
        "episode_length": f"{np.asarray(alive).sum(axis=0).mean():.1f}",
    }


def random_points(seed: int) -> dict:
    """A random policy's mean return in the test tasks of a seed of cocoa.py."""
    returns = {}
    for name in ("point_goal", "sparse_point_goal"):
        env = envs.make(name)
        flags = [cocoa.__name__, "--env", name]
        config = cocoa.settle(run.configure(cocoa.Config, cocoa.RECIPES, cocoa.__doc__, flags), env)
        tasks = jnp.tile(cocoa.init(config, env, jax.random.key(seed)).test_tasks, (200, 1))
        start = cocoa.reset(env, tasks, jax.random.key(1000 + seed))
        _, (rewards, *_) = play(env, start, jax.random.split(jax.random.key(2000 + seed), config.episode_length))
        returns[f"{name}_return"] = f"{rewards.sum(axis=0).mean():.4f}"
    return {"seed": seed, **returns}


def generalized(env):
    """brax's generalized physics: start(qpos, qvel), step(state, control) and joint positions."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax.generalized import pipeline
        from brax.io import mjcf

        body = BODIES[env.name]
        if body in ("ant", "humanoid"):  # bodies without joints are joined to their parents
            system = spring.load(spring.asset(f"{body}.xml"), env.model.opt.timestep)
        else:
            system = mjcf.load_model(env.model)
    return partial(pipeline.init, system), partial(pipeline.step, system), lambda state: state.q


def mjx_with_barriers(env):
    """The same step with `forward_kinematics` of envs/mjx_physics.py."""

    def start(qpos, qvel):
        return mjx.make_data(env.model, impl="jax").replace(qpos=qpos, qvel=qvel)

    step = lambda data, control: mjx_physics._step(env.model, env.mjx_model, data.replace(ctrl=control))
    return start, step, lambda data: data.qpos


def physics(name: str) -> list[dict]:
    env = envs.make(name)
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), NUM_ENVS))
    scale = 0.4 if name == "humanoid_dir" else 1.0
    controls = scale * jax.random.uniform(jax.random.key(1), (CHUNK, NUM_ENVS, env.action_size), minval=-1, maxval=1)
    substeps = round(env.control_step / env.model.opt.timestep)
    advance = super(type(env), env).advance if name == "humanoid_dir" else env.advance
    ours = (
        lambda qpos, qvel: Physics(qpos, qvel, jnp.zeros_like(qvel)),
        lambda physics, control: advance(physics, control),
        lambda physics: physics.qpos,
    )
    exact = np.stack([reference(env, state, controls, i, substeps) for i in range(16)])
    rows = []
    for label, (start, step, position), repeat in (
        ("mjx", ours, 1),
        ("mjx, kinematics with barriers", mjx_with_barriers(env), substeps),
        ("brax generalized", generalized(env), substeps),
    ):

        def rollout(qpos, qvel, step=step, start=start, position=position, repeat=repeat):
            def control_step(carry, control):
                after, _ = jax.lax.scan(lambda c, _: (jax.vmap(step)(c, control), None), carry, None, length=repeat)
                return after, jax.vmap(position)(carry)

            return jax.lax.scan(control_step, jax.vmap(start)(qpos, qvel), controls)[1]

        positions, compile_seconds, seconds = timed(rollout, state.physics.qpos, state.physics.qvel)
        deviation = np.abs(np.asarray(positions)[5, :16] - exact).max(axis=1)
        rows.append(
            {
                "body": BODIES[name],
                "physics": label,
                "compile_s": f"{compile_seconds:.1f}",
                "steps_per_s": f"{NUM_ENVS * CHUNK / seconds:.0f}",
                "deviation": f"{np.median(deviation):.1e}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def reference(env, state, controls, i: int, substeps: int) -> np.ndarray:
    """C MuJoCo's joint positions after 5 control steps."""
    data = mujoco.MjData(env.model)
    data.qpos, data.qvel = state.physics.qpos[i], state.physics.qvel[i]
    for control in np.asarray(controls)[:5, i]:
        data.ctrl = control
        mujoco.mj_step(env.model, data, substeps)
    return data.qpos.copy()


def write(table: str, rows: list[dict]) -> None:
    measure.write(table, f"python {' '.join(['experiments/bench_families.py', *sys.argv[1:]])}; {FACTS}", rows)


def main():
    print(FACTS, flush=True)
    names, device = sys.argv[1:], jax.default_backend()
    if names in ([], ["random"]):
        write("random_points", [random_points(seed) for seed in range(5)])
    if names == ["random"]:
        return
    rows = []
    for name in names or envs.FAMILIES:
        rows.append(family(name))
        print(rows[-1], flush=True)
        jax.clear_caches()
    if not names:
        write(f"families_{device}", rows)
        write(f"family_physics_{device}", [row for name in BODIES for row in physics(name)])


if __name__ == "__main__":
    main()
