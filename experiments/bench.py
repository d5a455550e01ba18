"""How fast the scripts are: the first part of `make bench`, about 4 minutes on 2 cores.

    python experiments/bench.py

Writes, with DEVICE cpu or gpu:
  bench_depth_DEVICE.csv    a gradient step of crl.py (critic, actor and alpha) at five depths
  bench_scripts_DEVICE.csv  each script with its default settings: data collection alone, gradient steps alone
  bench_envs_DEVICE.csv     data collection of crl.py in several environments
Each row of the first two has a process of its own, so that its peak memory is its own. Rates are from medians, and
compile time (tracing, lowering, compiling) is apart.
"""

import json
import os
import subprocess
import sys
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes of one GPU share its memory

import jax
import jax.numpy as jnp
import numpy as np

import measure
from algorithms import cocoa, crl, ppo_ad
from envs import AchievementEnv, GoalEnv, GoalState, TaskFamily
from shared import evaluation, networks, run
from shared import replay as buffer

DEPTHS = (4, 16, 64, 256, 1024)
ON_GPU = jax.default_backend() == "gpu"
BATCH, WIDTH = 512 if ON_GPU else 256, 256
NUM_ENVS = 512 if ON_GPU else 64


class Humanoid(GoalEnv):
    """The sizes of the paper's humanoid; a gradient step asks for nothing else."""

    observation_size, action_size, goal_indices = 268, 17, (0, 1, 2)
    step = sample_goal = render = None

    def reset(self, key):
        return GoalState(None, jnp.zeros(268), jnp.zeros(3), jnp.zeros(()), jnp.zeros((), bool))


def gradient_step_inputs(depth: int, **settings) -> tuple[crl.Config, GoalEnv, crl.TrainState]:
    """What crl.update needs, its replay filled with noise of the humanoid's sizes."""
    config = crl.Config(
        depth=depth, num_envs=8, min_replay_size=62, max_replay_size=1000,
        **{"batch_size": BATCH, "width": WIDTH, **settings},
    )  # fmt: skip
    env = Humanoid()
    state = crl.init(config, env, jax.random.key(0))
    noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), state.replay.data)
    replay = buffer.add(state.replay, noise, jnp.zeros((1000, 8), bool))
    return config, env, state._replace(replay=replay, envs=None)


def one_depth(depth: int) -> dict:
    config, env, state = gradient_step_inputs(depth)
    parameters = networks.count_parameters((state.agent.actor, state.agent.critic))
    step = jax.jit(partial(crl.update, config, env), donate_argnums=0)
    compile_seconds, step = measure.compiled(step, state, jax.random.key(0))
    rounds = 21 if depth <= 64 else 6 if depth == 256 else 4
    seconds, (_, info) = measure.repeated(lambda carry: step(carry[0], jax.random.key(1)), (state, None), rounds)
    assert all(np.isfinite(x) for x in info.values()), "a loss is not finite"
    return {
        "depth": depth,
        "parameters": parameters,
        "compile_s": round(compile_seconds, 1),
        "step_ms": round(1e3 * seconds, 1),
        "gradient_steps_per_s": round(1 / seconds, 2),
        "temporary_mb": round(step.memory_analysis().temp_size_in_bytes / 1e6),
        "peak_mb": round(measure.peak_memory() / 1e6),
    }


def phases(script) -> tuple[str, dict, object]:
    """The default environment of a script; its phases, jitted functions of a state, with how many environment steps or
    gradient steps each takes (the auxiliary phase of ppo_ad.py is not among them); and a state."""
    config = run.configure(script.Config, script.RECIPES, script.__doc__, [script.__name__])
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    jitted = lambda function: jax.jit(run.over_seeds(1, function), donate_argnums=0)
    if script is ppo_ad:
        env = run.make_env(config.env, AchievementEnv, config.env_options)
        vector = env.vectorise(config.num_envs, config.episode_length)
        state = jax.jit(run.over_seeds(1, partial(ppo_ad.init, config, vector)))(keys)

        def collect(carry):
            state, _ = carry
            return state, ppo_ad.collect(config, vector, state)

        def learn(carry):
            state, data = carry
            return ppo_ad.learn(config, state, *data)[0], data

        data = jax.jit(run.over_seeds(1, partial(ppo_ad.collect, config, vector)))(state)
        steps = ppo_ad.rollout_steps(config)
        updates = config.update_epochs * config.num_minibatches
        return config.env, {"collect": (jitted(collect), steps), "learn": (jitted(learn), updates)}, (state, data)
    if script is crl:
        env, _ = evaluation.make_envs(config)
        state = jax.jit(run.over_seeds(1, partial(crl.init, config, env)))(keys)
        steps, updates = buffer.chunk_steps(config), config.updates_per_chunk
    else:
        env = run.make_env(config.env, TaskFamily, config.env_options)
        config = cocoa.settle(config, env)
        begin = lambda key: cocoa.fill(config, env, cocoa.init(config, env, key))
        state = jax.jit(run.over_seeds(1, begin))(keys)
        steps, updates = config.tasks_per_iteration * cocoa.visit_steps(config), config.updates_per_iteration
    collect = jitted(partial(script.collect, config, env))
    learn = jitted(lambda state: script.learn(config, env, state)[0])
    return config.env, {"collect": (collect, steps), "learn": (learn, updates)}, state


def one_script(name: str) -> dict:
    script = {"crl": crl, "ppo_ad": ppo_ad, "cocoa": cocoa}[name]
    env, functions, state = phases(script)
    compile_seconds, rates = 0.0, {}
    for phase, (function, steps) in functions.items():
        seconds, function = measure.compiled(function, state)
        compile_seconds += seconds
        seconds, state = measure.repeated(function, state)
        rates[phase] = round(steps / seconds)
    return {
        "script": f"{name}.py",
        "env": env,
        "compile_s": round(compile_seconds, 1),
        "env_steps_per_s": rates["collect"],
        "gradient_steps_per_s": rates["learn"],
        "peak_mb": round(measure.peak_memory() / 1e6),
    }


def collection(name: str, steps: int) -> dict:
    """Compile seconds and environment steps per second of crl.py's data collection with depth-4 networks."""
    config = crl.Config(env=name, num_envs=NUM_ENVS, unroll_length=steps, max_replay_size=1000, min_replay_size=steps)
    env = run.make_env(name, GoalEnv, config.env_options)
    state = jax.jit(partial(crl.init, config, env))(jax.random.key(0))
    compile_seconds, chunk = measure.compiled(jax.jit(partial(crl.collect, config, env), donate_argnums=0), state)
    seconds, _ = measure.repeated(chunk, state)
    rate = round(NUM_ENVS * steps / seconds)
    return {"env": name, "num_envs": NUM_ENVS, "compile_s": round(compile_seconds, 1), "env_steps_per_s": rate}


def alone(*arguments: str) -> dict:
    """The row that this script measures for these arguments, in a process of its own."""
    child = [sys.executable, __file__, *arguments]
    done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in ("depth", "script"):  # the child process of one row
        what, argument = sys.argv[1:]
        print(json.dumps(one_depth(int(argument)) if what == "depth" else one_script(argument)))
        return
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    how, device = f"python experiments/bench.py; {measure.facts()}", jax.default_backend()
    print(how, flush=True)
    sizes = f"{how}; batch {BATCH}, width {WIDTH}, humanoid sizes"
    measure.measured(f"bench_depth_{device}", sizes, [partial(alone, "depth", str(depth)) for depth in DEPTHS])
    scripts = [partial(alone, "script", name) for name in ("crl", "ppo_ad", "cocoa")]
    measure.measured(f"bench_scripts_{device}", how, scripts)
    names = "point_u_maze", "ant", "ant_u_maze", "ant_u4_maze"
    measure.measured(f"bench_envs_{device}", f"{how}; depth 4, width 256", [partial(collection, n, 20) for n in names])


if __name__ == "__main__":
    main()
