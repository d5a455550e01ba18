"""Soft actor-critic with hindsight experience replay, in one file: what contrastive RL is compared with.

Haarnoja et al., 'Soft Actor-Critic Algorithms and Applications' (2018, arXiv 1812.05905); Andrychowicz et al.,
'Hindsight Experience Replay' (2017, arXiv 1707.01495); on the tasks and with the networks of crl.py.

The reward is 1 where a step ends within the success radius of the goal, else 0. Two critics Q(s, a, g) are regressed on
r + discount (min of two slow copies at s' - alpha log pi), and the actor maximises the smaller of them with an entropy
bonus. Rewards are rare, so most rows of a batch get another goal, one that their episode reached later (HER). Compare
with crl.py, line by line: where that classifies futures, this learns values backwards from the goal.

    python algorithms/sac.py                                   a point robot finds its way out of a U (SAC + HER)
    python algorithms/sac.py --her none                        plain SAC
    python algorithms/sac.py --env ant_u4_maze --depth 64      deep networks (for a GPU)
    python algorithms/sac.py --published                       JaxGCRL's hyperparameters

Results, metrics and details: algorithms/sac.md.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
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
        --actor_lr 1e-3 --critic_lr 1e-3 --alpha_lr 1e-3 --final_lr_fraction 0.05
        --goal_switch_probability 0.1 --eval_every 200_000 --checkpoint_every 500_000
    """,
    **evaluation.BUDGETS,
    "--published": """
        --discount 0.9 --actor_lr 1e-4 --critic_lr 1e-4 --alpha_lr 3e-4 --final_lr_fraction 1 --batch_size 256
        --her final --her_share 0.5 --goals fixed --width 256 --norm none --activation relu --residual=false
    """,
}
"""Flags for environments whose name matches a pattern, and those that one flag stands for; a flag that is given
overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are those of crl.py where it has them, so that a comparison is one of losses."""

    env: str = "point_u_maze"
    """Environment to train in, a name of envs.names()."""
    eval_env: str = ""
    """Environment with the same walls whose goals are the far goals of the evaluation; by default ENV_eval, if any."""
    published: bool = False
    """JaxGCRL's discount, learning rates, batch, plain ReLU layers, relabelling and goals (page, deviations)."""
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
    """Transitions collected in each environment before the first gradient step, with the untrained policy."""
    max_replay_size: Count = 10_000
    """Transitions kept for each environment."""
    her: Literal["none", "final", "future", "geometric"] = "future"
    """The goal of a relabelled transition: what its episode reached at its end, at a later step (uniform), or at a
    later step by the discount's law, as in crl.py. With none, all keep the commanded one."""
    her_share: Share = 0.8
    """Share of a batch that is relabelled, unless --her none."""
    batch_size: Count = 512
    """Transitions in a gradient step."""
    discount: Fraction = 0.99
    """Discount of the future; the mean look-ahead is 1 / (1 - discount) steps."""
    target_rate: Annotated[float, Interval(gt=0, le=1)] = 0.005
    """By what share the target critics move towards the critics, after each gradient step."""
    depth: Depth = 4
    """Layers inside the residual blocks of all three networks."""
    actor_depth: Depth | None = None
    """Depth of the actor, if other than depth."""
    critic_depth: Depth | None = None
    """Depth of the two critics, if other than depth."""
    width: Count = 256
    """Units in each layer."""
    norm: Literal["layer", "none"] = "layer"
    """LayerNorm after each Dense, or nothing."""
    activation: Literal["swish", "relu"] = "swish"
    """Of each layer."""
    residual: bool = True
    """Add the input of each block of four layers to its output."""
    target_entropy_scale: float = 0.5
    """The entropy that alpha aims at is minus this times the number of action dimensions."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate for the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate for the critics."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate for log alpha."""
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
    critics: ResidualMLP
    """(s, a, g) -> Q. Two of them: every leaf has a leading axis of 2."""
    log_alpha: Float[Array, ""]


def make_agent(config: Config, env: GoalEnv, key: Key[Array, ""]) -> Agent:
    actor_key, critic_key = jax.random.split(key)
    state, action, goal = env.observation_size, env.action_size, len(env.goal_indices)

    def mlp(in_size, depth, out_size, key):
        return ResidualMLP(in_size, config.width, depth, out_size, key, NetworkOptions.of(config))

    actor = mlp(state + goal, config.actor_depth or config.depth, 2 * action, actor_key)
    critic = partial(mlp, state + action + goal, config.critic_depth or config.depth, 1)
    return Agent(actor, jax.vmap(critic)(jax.random.split(critic_key)), jnp.zeros(()))


def policy(
    agent: Agent, observation: Float[Array, "*batch observation"], goal: Float[Array, "*batch goal"]
) -> SquashedGaussian:
    """pi(. | s, g)."""
    return SquashedGaussian.from_output(over_batch(agent.actor, jnp.concatenate([observation, goal], axis=-1)))


def q_values(
    critics: ResidualMLP,
    observation: Float[Array, "batch observation"],
    action: Float[Array, "batch action"],
    goal: Float[Array, "batch goal"],
) -> Float[Array, "2 batch"]:
    """Q(s, a, g) of both critics."""
    x = jnp.concatenate([observation, action, goal], axis=-1)
    return jax.vmap(lambda critic: over_batch(critic, x)[:, 0])(critics)


def value(
    agent: Agent, observation: Float[Array, "batch observation"], goal: Float[Array, "batch goal"]
) -> Float[Array, " batch"]:
    """The smaller Q(s, mean action, g), for pictures."""
    return q_values(agent.critics, observation, policy(agent, observation, goal).mode(), goal).min(axis=0)


# ---- losses -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions for one gradient step, with the goals to learn about."""

    observation: Float[Array, "batch observation"]
    action: Float[Array, "batch action"]
    next_observation: Float[Array, "batch observation"]
    goal: Float[Array, "batch goal"]
    reward: Float[Array, " batch"]
    terminated: Float[Array, " batch"]


def critic_loss(
    critics: ResidualMLP, agent: Agent, target: ResidualMLP, batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict]:
    """Half the mean of (Q_j(s, a, g) - y)^2 over rows and both critics, the paper's soft Bellman residual, where

    y = r + discount (1 - terminated) (min_j target_j(s', a', g) - alpha log pi(a' | s', g)), a' ~ pi(. | s', g).

    An episode that is cut off by the time limit has not terminated: its last s' is worth what follows.
    """
    action, log_prob = policy(agent, batch.next_observation, batch.goal).sample_and_log_prob(key)
    next_value = q_values(target, batch.next_observation, action, batch.goal).min(axis=0)
    next_value = next_value - jnp.exp(agent.log_alpha) * log_prob
    y = jax.lax.stop_gradient(batch.reward + config.discount * (1 - batch.terminated) * next_value)
    q = q_values(critics, batch.observation, batch.action, batch.goal)
    loss = 0.5 * jnp.mean((q - y) ** 2)
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/reward": batch.reward.mean()}


def actor_loss(actor: ResidualMLP, agent: Agent, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], dict]:
    """mean_i [alpha log pi(a_i | s_i, g_i) - min_j Q_j(s_i, a_i, g_i)], a_i from the actor."""
    alpha = jnp.exp(agent.log_alpha)
    action, log_prob = policy(agent._replace(actor=actor), batch.observation, batch.goal).sample_and_log_prob(key)
    q = q_values(agent.critics, batch.observation, action, batch.goal).min(axis=0)
    loss = jnp.mean(alpha * log_prob - q)
    return loss, {"train/actor_loss": loss, "train/entropy": -jnp.mean(log_prob), "train/alpha": alpha}


def alpha_loss(log_alpha: Float[Array, ""], entropy: Float[Array, ""], target: float) -> Float[Array, ""]:
    """alpha (H - H*): alpha falls while the entropy H is above its target, and rises below it."""
    return jnp.exp(log_alpha) * jax.lax.stop_gradient(entropy - target)


# ---- state --------------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of one environment, in the replay."""

    observation: Float[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    next_observation: Float[Array, "*batch observation"]
    """After the action: at the end of an episode its terminal state."""
    goal: Float[Array, "*batch goal"]
    """The one commanded."""
    terminated: Float[Array, "*batch"]
    """1 where the environment, not the time limit, ended the episode."""


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    target: ResidualMLP
    """Slow copies of the critics."""
    optimizer: optax.OptState
    replay: buffer.Replay
    envs: VectorState
    env_steps: Int[Array, ""]
    gradient_steps: Int[Array, ""]
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, with a learning rate for each part of the agent."""
    schedule = lambda rate: optax.cosine_decay_schedule(rate, buffer.total_updates(config), config.final_lr_fraction)
    rates = {"actor": config.actor_lr, "critics": config.critic_lr, "alpha": config.alpha_lr}
    adams = {part: optax.adam(schedule(rate)) for part, rate in rates.items()}
    return optax.partition(adams, Agent("actor", "critics", "alpha"))


def init(config: Config, env: GoalEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, env, agent_key)
    state, action, goal = map(jnp.zeros, (env.observation_size, env.action_size, len(env.goal_indices)))
    row = Transition(state, action, state, goal, jnp.zeros(()))
    return TrainState(
        agent=agent,
        target=jax.tree.map(jnp.copy, agent.critics),
        optimizer=make_optimizer(config).init(agent),
        replay=buffer.init(row, config.max_replay_size, config.num_envs),
        envs=evaluation.vector_env(config, env).reset(env_key),
        env_steps=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def collect(config: Config, env: GoalEnv, state: TrainState) -> TrainState:
    """Steps every environment `unroll_length` times with sampled actions, and stores what happened."""
    vector = evaluation.vector_env(config, env)
    key, unroll_key = jax.random.split(state.key)

    def step(carry: tuple[VectorState, Transition], key):
        before, previous = carry
        action_key, switch_key, goal_key = jax.random.split(key, 3)
        observation, goal = before.env.observation, before.env.goal
        action = policy(state.agent, observation, goal).sample(action_key)
        current, after, truncated = vector.step(before, action)
        current = vector.switch_goals(current, config.goal_switch_probability, switch_key, goal_key)
        transition = Transition(observation, action, after.observation, goal, after.terminated.astype(jnp.float32))
        # where the simulator failed, the row before is stored once more (zeros, if there was none)
        transition = select(current.broken > before.broken, previous, transition)
        return (current, transition), (transition, after.terminated | truncated)

    keys = jax.random.split(unroll_key, config.unroll_length)
    (current, _), (transitions, last) = jax.lax.scan(step, (state.envs, buffer.newest(state.replay)), keys)
    replay = buffer.add(state.replay, transitions, last)
    return state._replace(replay=replay, envs=current, env_steps=state.env_steps + buffer.chunk_steps(config), key=key)


def sample(config: Config, env: GoalEnv, replay: buffer.Replay, key: Key[Array, ""]) -> Batch:
    """Uniform transitions. The first `her_share` of them get a goal that their episode reached, not before the
    transition's own next state (Andrychowicz et al. 2017). All rewards are of the state after the step."""
    laws = {"none": 1.0, "final": math.inf, "future": 1.0, "geometric": config.discount}
    pairs = buffer.sample_future(replay, key, config.batch_size, laws[config.her])
    row = buffer.gather(replay, pairs.row, pairs.env)
    reached = env.achieved_goal(buffer.gather(replay, pairs.future, pairs.env).next_observation)
    share = 0 if config.her == "none" else config.her_share
    goal = jnp.where(jnp.arange(config.batch_size)[:, None] < share * config.batch_size, reached, row.goal)
    distance = jnp.linalg.norm(env.achieved_goal(row.next_observation) - goal, axis=-1)
    reward = (distance < env.success_radius).astype(jnp.float32)
    return Batch(row.observation, row.action, row.next_observation, goal, reward, row.terminated)


def update(config: Config, env: GoalEnv, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step: critics, actor and alpha on one batch, each against the others as they were before; then the
    target critics follow."""
    batch_key, next_key, actor_key = jax.random.split(key, 3)
    agent = state.agent
    batch = sample(config, env, state.replay, batch_key)
    target_entropy = -config.target_entropy_scale * env.action_size
    critic_gradient, critic_info = jax.grad(critic_loss, has_aux=True)(
        agent.critics, agent, state.target, batch, next_key, config
    )
    actor_gradient, actor_info = jax.grad(actor_loss, has_aux=True)(agent.actor, agent, batch, actor_key)
    alpha_gradient = jax.grad(alpha_loss)(agent.log_alpha, actor_info["train/entropy"], target_entropy)
    gradient = Agent(actor_gradient, critic_gradient, alpha_gradient)
    updates, optimizer = make_optimizer(config).update(gradient, state.optimizer)
    agent = optax.apply_updates(agent, updates)
    target = optax.incremental_update(agent.critics, state.target, config.target_rate)
    state = state._replace(agent=agent, target=target, optimizer=optimizer, gradient_steps=state.gradient_steps + 1)
    return state, actor_info | critic_info


def learn(config: Config, env: GoalEnv, state: TrainState) -> tuple[TrainState, dict]:
    """`updates_per_chunk` gradient steps; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_chunk)
    state, metrics = jax.lax.scan(partial(update, config, env), state._replace(key=key), keys)
    return state, metrics | {"train/broken_steps": state.envs.broken.sum()}


def evaluate(config: Config, env: GoalEnv, far_env: GoalEnv | None, agent: Agent, key: Key[Array, ""]) -> dict:
    return evaluation.evaluate(env, far_env, partial(policy, agent), config.num_eval_envs, config.episode_length, key)


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, RECIPES, __doc__, argv)
    buffer.check(config)
    env, far_env = evaluation.make_envs(config)
    with run.Run(config, "sac", RECIPES, evaluation.SCORES) as log:
        agent = train(config, env, far_env, log)
        values = partial(value, agent)
        pictures.draw_goal_reaching(log, env, far_env, partial(policy, agent), values, config.episode_length)


def train(config: Config, env: GoalEnv, far_env: GoalEnv | None, log: run.Run) -> Agent:
    """Fills the replay or resumes, then collects and learns in turns. Returns the agent of the first seed."""
    begin = log.over_seeds(partial(init, config, env))
    shapes = jax.eval_shape(begin, log.seeds)
    relabelled = f"HER: {config.her}, {config.her_share:.0%} of a batch" if config.her != "none" else "no HER"
    log.describe(relabelled, actor=shapes.agent.actor, critics=shapes.agent.critics)
    state = log.restore(shapes)
    collect_chunk = log.compile("collect", partial(collect, config, env), shapes, donate=True)
    learn_chunk = log.compile("learn", partial(learn, config, env), shapes, donate=True)
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
