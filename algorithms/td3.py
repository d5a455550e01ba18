"""TD3 with hindsight experience replay, in one file: what contrastive RL is compared with.

Fujimoto et al., 'Addressing Function Approximation Error in Actor-Critic Methods' (2018, arXiv 1802.09477), with the
rewards and the relabelling (HER) of sac.py, on the tasks and with the networks of crl.py.

Two critics Q(s, a, g) are regressed on r + discount (min of two slow copies at s' and at the noisy action of a slow
copy of the actor). The actor is deterministic, explores with noise, and maximises the first critic, once in two steps.

    python algorithms/td3.py                                   a point robot finds its way out of a U (TD3 + HER)
    python algorithms/td3.py --her none                        plain TD3

Results, metrics and details: algorithms/td3.md.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from jaxtyping import Array, Float, Int, Key

from envs import GoalEnv, VectorState, select
from shared import evaluation, pictures, run
from shared import replay as buffer
from shared.networks import Depth, NetworkOptions, ResidualMLP, over_batch
from shared.run import Count, Fraction, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "point_*": """
        --total_env_steps 2_000_000 --num_envs 256 --episode_length 100 --unroll_length 50 --updates_per_chunk 128
        --min_replay_size 100 --max_replay_size 1000 --batch_size 256 --width 64 --discount 0.95
        --actor_lr 1e-3 --critic_lr 1e-3 --final_lr_fraction 0.05
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
    """Gradient steps of the critics in one chunk, after its environment steps; a multiple of policy_delay."""
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
    """By what share the target networks move towards the networks, after each step of the actor."""
    policy_delay: Count = 2
    """Steps of the critics for one of the actor."""
    exploration_noise: Weight = 0.4
    """Standard deviation of the noise of actions in data collection."""
    target_noise: Weight = 0.2
    """Standard deviation of the noise of the target actor's actions."""
    noise_clip: Weight = 0.5
    """Either noise is cut off at this."""
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
    actor_lr: Positive = 3e-4
    """Adam's learning rate for the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate for the critics."""
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

    def __post_init__(self):
        fitting = self.updates_per_chunk // self.policy_delay * self.policy_delay or self.policy_delay
        message = f"updates_per_chunk is {self.updates_per_chunk}; it is a multiple of policy_delay, e.g. {fitting}"
        run.need(fitting == self.updates_per_chunk, message)


# ---- networks -----------------------------------------------------------------------------------------------------


class Actor(eqx.Module):
    """(s, g) -> action before tanh; and how it explores."""

    network: ResidualMLP
    noise: float = eqx.field(static=True)
    clip: float = eqx.field(static=True)


class Agent(NamedTuple):
    """All that learns; its slow copy is the target."""

    actor: Actor
    critics: ResidualMLP
    """(s, a, g) -> Q. Two of them: every leaf has a leading axis of 2."""


def make_agent(config: Config, env: GoalEnv, key: Key[Array, ""]) -> Agent:
    actor_key, critic_key = jax.random.split(key)
    state, action, goal = env.observation_size, env.action_size, len(env.goal_indices)

    def mlp(in_size, depth, out_size, key):
        return ResidualMLP(in_size, config.width, depth, out_size, key, NetworkOptions.of(config))

    network = mlp(state + goal, config.actor_depth or config.depth, action, actor_key)
    actor = Actor(network, config.exploration_noise, config.noise_clip)
    critic = partial(mlp, state + action + goal, config.critic_depth or config.depth, 1)
    return Agent(actor, jax.vmap(critic)(jax.random.split(critic_key)))


class Noisy(NamedTuple):
    """An action, and the noise with which it is tried."""

    action: Float[Array, "*batch action"]
    noise: float
    clip: float

    def mode(self) -> Float[Array, "*batch action"]:
        return self.action

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch action"]:
        """The action with clipped Gaussian noise, within [-1, 1]."""
        noise = jnp.clip(self.noise * jax.random.normal(key, self.action.shape), -self.clip, self.clip)
        return jnp.clip(self.action + noise, -1, 1)


def policy(agent: Agent, observation: Float[Array, "*batch observation"], goal: Float[Array, "*batch goal"]) -> Noisy:
    """pi(s, g), and how it is explored around."""
    action = jnp.tanh(over_batch(agent.actor.network, jnp.concatenate([observation, goal], axis=-1)))
    return Noisy(action, agent.actor.noise, agent.actor.clip)


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
    """The first Q(s, pi(s, g), g), for pictures."""
    return q_values(agent.critics, observation, policy(agent, observation, goal).mode(), goal)[0]


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
    critics: ResidualMLP, target: Agent, batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], dict]:
    """Half the mean of (Q_j(s, a, g) - y)^2 over rows and both critics, where

    y = r + discount (1 - terminated) min_j target_j(s', a', g), a' the target actor's action with clipped noise

    (clipped double Q-learning, target policy smoothing). At a time limit, which terminates nothing, the last s' counts.
    """
    after = policy(target, batch.next_observation, batch.goal)._replace(noise=config.target_noise)
    next_value = q_values(target.critics, batch.next_observation, after.sample(key), batch.goal).min(axis=0)
    y = jax.lax.stop_gradient(batch.reward + config.discount * (1 - batch.terminated) * next_value)
    q = q_values(critics, batch.observation, batch.action, batch.goal)
    loss = 0.5 * jnp.mean((q - y) ** 2)
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/reward": batch.reward.mean()}


def actor_loss(actor: Actor, agent: Agent, batch: Batch) -> tuple[Float[Array, ""], dict]:
    """-mean_i Q_1(s_i, pi(s_i, g_i), g_i) (algorithm 1)."""
    action = policy(agent._replace(actor=actor), batch.observation, batch.goal).mode()
    loss = -q_values(agent.critics, batch.observation, action, batch.goal)[0].mean()
    return loss, {"train/actor_loss": loss}


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
    target: Agent
    """Slow copies of all networks."""
    optimizers: Agent
    """The state of Adam for the actor and for the critics."""
    replay: buffer.Replay
    envs: VectorState
    env_steps: Int[Array, ""]
    gradient_steps: Int[Array, ""]
    key: Key[Array, ""]


def make_optimizers(config: Config) -> Agent:
    """Adam for the actor and for the critics."""
    adam = lambda rate, steps: optax.adam(optax.cosine_decay_schedule(rate, steps, config.final_lr_fraction))
    steps = buffer.total_updates(config)
    return Agent(adam(config.actor_lr, steps // config.policy_delay), adam(config.critic_lr, steps))


def init(config: Config, env: GoalEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, env, agent_key)
    state, action, goal = map(jnp.zeros, (env.observation_size, env.action_size, len(env.goal_indices)))
    row = Transition(state, action, state, goal, jnp.zeros(()))
    return TrainState(
        agent=agent,
        target=jax.tree.map(jnp.copy, agent),
        optimizers=Agent(*(adam.init(part) for adam, part in zip(make_optimizers(config), agent))),
        replay=buffer.init(row, config.max_replay_size, config.num_envs),
        envs=evaluation.vector_env(config, env).reset(env_key),
        env_steps=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def collect(config: Config, env: GoalEnv, state: TrainState) -> TrainState:
    """Steps every environment `unroll_length` times with noisy actions, and stores what happened."""
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
    """`policy_delay` steps of the critics, one of the actor on the last batch, and one of the target networks."""
    actor_optimizer, critic_optimizer = make_optimizers(config)

    def improve_critics(carry, key):
        critics, optimizer = carry
        batch_key, noise_key = jax.random.split(key)
        batch = sample(config, env, state.replay, batch_key)
        gradient, info = jax.grad(critic_loss, has_aux=True)(critics, state.target, batch, noise_key, config)
        updates, optimizer = critic_optimizer.update(gradient, optimizer)
        return (optax.apply_updates(critics, updates), optimizer), (batch, info)

    actor, carry = state.agent.actor, (state.agent.critics, state.optimizers.critics)
    keys = jax.random.split(key, config.policy_delay)
    (critics, critic_state), (batches, info) = jax.lax.scan(improve_critics, carry, keys)
    batch = jax.tree.map(lambda x: x[-1], batches)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(actor, Agent(actor, critics), batch)
    updates, actor_state = actor_optimizer.update(gradient, state.optimizers.actor)
    agent = Agent(optax.apply_updates(actor, updates), critics)
    state = state._replace(
        agent=agent,
        target=optax.incremental_update(agent, state.target, config.target_rate),
        optimizers=Agent(actor_state, critic_state),
        gradient_steps=state.gradient_steps + config.policy_delay,
    )
    return state, actor_info | jax.tree.map(jnp.mean, info)


def learn(config: Config, env: GoalEnv, state: TrainState) -> tuple[TrainState, dict]:
    """`updates_per_chunk` gradient steps of the critics; each metric has one entry for a step of the actor."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_chunk // config.policy_delay)
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
    with run.Run(config, "td3", RECIPES, evaluation.SCORES) as log:
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
