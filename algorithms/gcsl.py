"""Goal-conditioned supervised learning, in one file: what contrastive RL is compared with.

Ghosh et al., 'Learning to Reach Goals via Iterated Supervised Learning' (2019, arXiv 1912.06088), with GCBC as a flag
(Lynch et al. 2019), on the tasks and with the networks of crl.py.

There is no critic and no reward. Whatever an episode reached would have been a good goal to command: the policy is
trained to repeat the action that was taken on the way to it. It then acts for the task's goals, its episodes join the
replay, and so on. GCSL and GCBC differ in the law of the goal: a uniform later state of the episode, or a discounted
one, the positives of crl.py.

    python algorithms/gcsl.py                                  a point robot in a U
    python algorithms/gcsl.py --future geometric               GCBC
    python algorithms/gcsl.py --likelihood mse                 squared error instead of the likelihood

Results, metrics and details: algorithms/gcsl.md.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from envs import GoalEnv, VectorState, select
from shared import evaluation, pictures, run
from shared import replay as buffer
from shared.networks import Depth, NetworkOptions, ResidualMLP, SquashedGaussian, over_batch
from shared.run import Count, Fraction, Positive, Share, Steps

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "point_*": """
        --total_env_steps 2_000_000 --num_envs 256 --episode_length 100 --unroll_length 50 --updates_per_chunk 128
        --min_replay_size 100 --max_replay_size 1000 --batch_size 256 --width 64 --discount 0.95
        --actor_lr 1e-3 --final_lr_fraction 0.05
        --goal_switch_probability 0.1 --eval_every 200_000 --checkpoint_every 500_000
    """,
    **evaluation.BUDGETS,
}
"""Flags for environments whose name matches a pattern; a flag that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are those of crl.py where it has them, so that a comparison is one of losses."""

    env: str = "point_u_maze"
    """Environment to train in, a name of envs.names()."""
    eval_env: str = ""
    """Environment with the same walls whose goals are the far goals of the evaluation; by default ENV_eval, if any."""
    total_env_steps: Steps = 100_000_000
    """Environment steps of a seed, prefill included; rounded up to whole chunks."""
    num_envs: Count = 512
    """Environments stepped in parallel, for each seed."""
    episode_length: Count = 1000
    """Time limit of an episode, in environment steps, in training and evaluation."""
    goals: Literal["resampled", "fixed"] = "resampled"
    """Start and goal at a reset: drawn anew, or those each environment began with (what the published code does)."""
    goal_switch_probability: Share = 0.0
    """Probability, at each step of data collection, that an environment's commanded goal is drawn anew."""
    unroll_length: Count = 62
    """Steps of each environment in one chunk."""
    updates_per_chunk: Count = 800
    """Gradient steps in one chunk, after its environment steps."""
    min_replay_size: Count = 1000
    """Transitions collected in each environment before the first gradient step, with uniform actions."""
    max_replay_size: Count = 10_000
    """Transitions kept for each environment."""
    future: Literal["uniform", "geometric"] = "uniform"
    """Which later state of the episode is the goal: GCSL's law, or the discounted one (GCBC)."""
    likelihood: Literal["gaussian", "mse"] = "gaussian"
    """Maximise the density of the action under the squashed Gaussian, or minimise the squared error of its mode; then
    nothing trains its standard deviation, with which data are collected."""
    batch_size: Count = 512
    """Transitions in a gradient step."""
    discount: Fraction = 0.99
    """Of --future geometric, else without effect; the mean look-ahead is 1 / (1 - discount) steps."""
    depth: Depth = 4
    """Layers inside the residual blocks."""
    width: Count = 256
    """Units in each layer."""
    norm: Literal["layer", "none"] = "layer"
    """LayerNorm after each Dense, or nothing."""
    activation: Literal["swish", "relu"] = "swish"
    """Of each layer."""
    residual: bool = True
    """Add the input of each block of four layers to its output."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate for the actor."""
    final_lr_fraction: Share = 1.0
    """Learning rates fall along a cosine to this share of their start by the end of the run."""
    num_eval_envs: Count = 128
    """Evaluation episodes for each layout and kind of action."""
    eval_every: Count = 1_000_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 10_000_000
    """Environment steps between checkpoints; the beginning and the end always have one."""
    remat: Literal["dots", "full", "none"] = "dots"
    """What the backward pass recomputes: all but the matrix products, all, or nothing. Trades memory for time."""
    scan_unroll: Count = 1
    """Blocks per iteration of the loop over depth. More compile longer and may run faster on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the matrix products in the residual blocks; everything else is float32."""


# ---- networks -----------------------------------------------------------------------------------------------------


class Agent(NamedTuple):
    """All that learns."""

    actor: ResidualMLP
    """(s, g) -> mean and raw log-std of the action."""


def make_agent(config: Config, env: GoalEnv, key: Key[Array, ""]) -> Agent:
    in_size = env.observation_size + len(env.goal_indices)
    options = NetworkOptions.of(config)
    return Agent(ResidualMLP(in_size, config.width, config.depth, 2 * env.action_size, key, options))


def policy(
    agent: Agent, observation: Float[Array, "*batch observation"], goal: Float[Array, "*batch goal"]
) -> SquashedGaussian:
    """pi(. | s, g)."""
    return SquashedGaussian.from_output(over_batch(agent.actor, jnp.concatenate([observation, goal], axis=-1)))


# ---- losses -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Pairs for one gradient step: `goal` was reached later in the episode of `observation` and `action`."""

    observation: Float[Array, "batch observation"]
    action: Float[Array, "batch action"]
    goal: Float[Array, "batch goal"]


def actor_loss(agent: Agent, batch: Batch, config: Config) -> tuple[Float[Array, ""], dict]:
    """mean_i -log pi(a_i | s_i, g_i), or the squared error of the mode."""
    distribution = policy(agent, batch.observation, batch.goal)
    log_prob = distribution.log_prob(batch.action).mean()
    error = jnp.mean((distribution.mode() - batch.action) ** 2)
    loss = -log_prob if config.likelihood == "gaussian" else error
    return loss, {"train/actor_loss": loss, "train/log_prob": log_prob, "train/action_error": error}


# ---- state --------------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of one environment, in the replay."""

    observation: Float[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    next_goal: Float[Array, "*batch goal"]
    """The goal achieved after the action."""


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    optimizer: optax.OptState
    replay: buffer.Replay
    envs: VectorState
    env_steps: Int[Array, ""]
    gradient_steps: Int[Array, ""]
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(
        optax.cosine_decay_schedule(config.actor_lr, buffer.total_updates(config), config.final_lr_fraction)
    )


def init(config: Config, env: GoalEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, env, agent_key)
    sizes = env.observation_size, env.action_size, len(env.goal_indices)
    return TrainState(
        agent=agent,
        optimizer=make_optimizer(config).init(agent),
        replay=buffer.init(Transition(*map(jnp.zeros, sizes)), config.max_replay_size, config.num_envs),
        envs=evaluation.vector_env(config, env).reset(env_key),
        env_steps=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def collect(config: Config, env: GoalEnv, state: TrainState) -> TrainState:
    """Steps every environment `unroll_length` times with sampled actions, and stores what happened. Before the first
    gradient step actions are uniform: an untrained policy may go one way only, and then learns no other."""
    vector = evaluation.vector_env(config, env)
    key, unroll_key = jax.random.split(state.key)

    def step(carry: tuple[VectorState, Transition], key):
        before, previous = carry
        action_key, uniform_key, switch_key, goal_key = jax.random.split(key, 4)
        observation, goal = before.env.observation, before.env.goal
        action = policy(state.agent, observation, goal).sample(action_key)
        uniform = jax.random.uniform(uniform_key, action.shape, minval=-1.0)
        action = jnp.where(state.gradient_steps == 0, uniform, action)
        current, after, truncated = vector.step(before, action)
        current = vector.switch_goals(current, config.goal_switch_probability, switch_key, goal_key)
        transition = Transition(observation, action, env.achieved_goal(after.observation))
        # where the simulator failed, the row before is stored once more (zeros, if there was none)
        transition = select(current.broken > before.broken, previous, transition)
        return (current, transition), (transition, after.terminated | truncated)

    keys = jax.random.split(unroll_key, config.unroll_length)
    (current, _), (transitions, last) = jax.lax.scan(step, (state.envs, buffer.newest(state.replay)), keys)
    replay = buffer.add(state.replay, transitions, last)
    return state._replace(replay=replay, envs=current, env_steps=state.env_steps + buffer.chunk_steps(config), key=key)


def sample(config: Config, replay: buffer.Replay, key: Key[Array, ""]) -> Batch:
    """Uniform transitions, each with a goal from the future of its episode."""
    discount = config.discount if config.future == "geometric" else 1.0
    pairs = buffer.sample_future(replay, key, config.batch_size, discount)
    transition = buffer.gather(replay, pairs.row, pairs.env)
    goal = buffer.gather(replay, pairs.future, pairs.env).next_goal
    return Batch(transition.observation, transition.action, goal)


def update(config: Config, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step on one batch."""
    batch = sample(config, state.replay, key)
    gradient, info = jax.grad(actor_loss, has_aux=True)(state.agent, batch, config)
    updates, optimizer = make_optimizer(config).update(gradient, state.optimizer)
    agent = optax.apply_updates(state.agent, updates)
    return state._replace(agent=agent, optimizer=optimizer, gradient_steps=state.gradient_steps + 1), info


def learn(config: Config, state: TrainState) -> tuple[TrainState, dict]:
    """`updates_per_chunk` gradient steps; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_chunk)
    state, metrics = jax.lax.scan(partial(update, config), state._replace(key=key), keys)
    return state, metrics | {"train/broken_steps": state.envs.broken.sum()}


def evaluate(config: Config, env: GoalEnv, far_env: GoalEnv | None, agent: Agent, key: Key[Array, ""]) -> dict:
    return evaluation.evaluate(env, far_env, partial(policy, agent), config.num_eval_envs, config.episode_length, key)


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, RECIPES, __doc__, argv)
    buffer.check(config)
    env, far_env = evaluation.make_envs(config)
    with run.Run(config, "gcsl", RECIPES, evaluation.SCORES) as log:
        agent = train(config, env, far_env, log)
        pictures.draw_goal_reaching(log, env, far_env, partial(policy, agent), None, config.episode_length)


def train(config: Config, env: GoalEnv, far_env: GoalEnv | None, log: run.Run) -> Agent:
    """Fills the replay or resumes, then collects and learns in turns. Returns the agent of the first seed."""
    begin = log.over_seeds(partial(init, config, env))
    shapes = jax.eval_shape(begin, log.seeds)
    log.describe(f"goals: {config.future} futures", actor=shapes.agent.actor)
    state = log.restore(shapes)
    collect_chunk = log.compile("collect", partial(collect, config, env), shapes, donate=True)
    learn_chunk = log.compile("learn", partial(learn, config), shapes, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, env, far_env), shapes.agent, log.seeds)
    if state is None:
        state = log.repeat("filling the replay", buffer.prefill_chunks(config), collect_chunk, begin(log.seeds))
    while log.going(state):
        state, metrics = learn_chunk(collect_chunk(state))
        if log.evaluates(state):
            metrics |= score(state.agent, log.evaluation_keys(state))
        log.end_chunk(state, metrics)
    return run.one_seed(state.agent)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, GoalEnv, Agent]:
    """Settings, environment and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    env, _ = evaluation.make_envs(config)
    return config, env, run.load_agent(partial(make_agent, config, env), folder, config, seed)


if __name__ == "__main__":
    main()
