"""Contrastive RL with deep residual networks, in one file.

Wang et al., '1000 Layer Networks for Self-Supervised RL' (2025, arXiv 2503.14858), on the tasks of JaxGCRL.

There is no reward. A critic f(s, a, g) = -|phi(s, a) - psi(g)| is trained as a classifier: among the goals of a batch,
which one did the trajectory through (s, a) reach later (InfoNCE)? At its optimum f is log p(g | s, a) - log p(g) +
c(s, a), where p(g | s, a) is the discounted probability of reaching g and a penalty keeps c nearly constant. The actor
maximises f for the goals that were reached, with an entropy bonus, and so learns to reach goals. Residual blocks with
LayerNorm make both trainable at depth 1024.

    python algorithms/crl.py                                  a point robot finds its way out of a U (2 minutes)
    python algorithms/crl.py --depth 64                       the same with 64-layer networks
    python algorithms/crl.py --env ant_u4_maze --depth 64     the paper's networks and budget (for a GPU)
    python algorithms/crl.py --resume runs/crl/...            go on with a run

The point mazes have a recipe (RECIPES below): settings that learn them on two CPU cores. Everything else has the
paper's hyperparameters and budget. Results, metrics and details: algorithms/crl.md.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Num

from envs import GoalEnv, VectorState, select
from shared import evaluation, pictures, run
from shared import replay as buffer
from shared.networks import (
    AtariTorso,
    Depth,
    NetworkOptions,
    OnImages,
    ResidualMLP,
    SquashedGaussian,
    over_batch,
    project,
)
from shared.run import Count, Fraction, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "point_*": """
        --total_env_steps 2_000_000 --num_envs 256 --episode_length 100 --unroll_length 50 --updates_per_chunk 128
        --min_replay_size 100 --max_replay_size 1000 --batch_size 256 --width 64 --discount 0.95
        --actor_lr 1e-3 --critic_lr 1e-3 --alpha_lr 1e-3 --final_lr_fraction 0.05
        --goal_switch_probability 0.1 --random_goals 0.5 --eval_every 200_000 --checkpoint_every 500_000
    """,
    "point_*_pixels": """
        --total_env_steps 150_000 --num_envs 32 --updates_per_chunk 64 --max_replay_size 500 --batch_size 64
        --image_channels 16 --num_eval_envs 32 --eval_every 30_000 --checkpoint_every 30_000
    """,
    **evaluation.BUDGETS,
    "--published": "--goals fixed --relabel published --log_prob_epsilon 1e-6",
}
"""Flags for environments whose name matches a pattern, and those that one flag stands for; a flag that is given
overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are the paper's, unless a field says otherwise."""

    env: str = "point_u_maze"
    """Environment to train in, a name of envs.names(). The paper's ten tasks are on the page."""
    eval_env: str = ""
    """Environment with the same walls whose goals are the far goals of the evaluation; by default ENV_eval, if any."""
    published: bool = False
    """What the published code does where ours differs: --goals fixed --relabel published --log_prob_epsilon 1e-6."""
    total_env_steps: Steps = 100_000_000
    """Environment steps of a seed, prefill included; rounded up to whole chunks. Paper: 100 to 400 million."""
    num_envs: Count = 512
    """Environments stepped in parallel, for each seed."""
    episode_length: Count = 1000
    """Time limit of an episode, in environment steps, in training and evaluation."""
    goals: Literal["resampled", "fixed"] = "resampled"
    """Start and goal at a reset: drawn anew, or those each environment began with (what the published code does)."""
    goal_switch_probability: Share = 0.0
    """Probability, at each step of data collection, that an environment's commanded goal is drawn anew (paper: 0)."""
    unroll_length: Count = 62
    """Steps of each environment in one chunk."""
    updates_per_chunk: Count = 800
    """Gradient steps in one chunk, after its environment steps."""
    min_replay_size: Count = 1000
    """Transitions collected in each environment before the first gradient step, with the untrained policy."""
    max_replay_size: Count = 10_000
    """Transitions kept for each environment."""
    relabel: Literal["episode", "published"] = "episode"
    """Law of the training goals: the discounted future of the whole episode, terminal state included; or that of the
    published code, cut off at the end of a window of episode_length transitions (page, detail 4)."""
    batch_size: Count = 512
    """Pairs (state and action, future goal) in a gradient step; each has the other goals of the batch as negatives."""
    discount: Fraction = 0.99
    """Discount of the future; the mean look-ahead is 1 / (1 - discount) steps."""
    depth: Depth = 4
    """Layers inside the residual blocks of all three networks. Paper: 4 to 1024."""
    actor_depth: Depth | None = None
    """Depth of the actor, if other than depth (paper: 512 with a critic of 1024)."""
    critic_depth: Depth | None = None
    """Depth of the two critic encoders, if other than depth."""
    width: Count = 256
    """Units in each layer."""
    image_channels: Count = 32
    """Of the first convolution, where observations are images; the next two have twice as many."""
    norm: Literal["layer", "none", "hyperspherical"] = "layer"
    """LayerNorm after each Dense; nothing; or a root mean square of 1, with weights of norm 1 (SimbaV2)."""
    activation: Literal["swish", "relu"] = "swish"
    """Of each layer."""
    residual: bool = True
    """Add the input of each block of four layers to its output."""
    representation_size: Count = 64
    """Length of phi(s, a) and psi(g)."""
    energy: Literal["norm", "l2", "dot", "cosine", "mrn"] = "norm"
    """f from phi and psi: minus their distance, minus the squared distance, inner product, cosine, minus a quasimetric
    (take it with --loss bwd_infonce --logsumexp_penalty 0). The penalty below presses all cosines to -1; take
    --logsumexp_penalty 0 with them too."""
    loss: Literal["fwd_infonce", "bwd_infonce", "sym_infonce", "binary_nce"] = "fwd_infonce"
    """Classify the goal given state and action, the reverse, both, or each pair as true or false."""
    logsumexp_penalty: Weight = 0.1
    """Weight of the squared log-sum-exp of each row of logits, whatever the loss. Without it, forward InfoNCE leaves
    each state and action a free constant, so that actions cannot be compared."""
    random_goals: Share = 0.0
    """Share of the actor's batch whose goals are those of other transitions (paper: 0)."""
    entropy_tuning: bool = True
    """Entropy bonus with a learned weight alpha; without, the actor only maximises the critic."""
    target_entropy_scale: float = 0.5
    """The entropy that alpha aims at is minus this times the number of action dimensions."""
    log_prob_epsilon: Weight = 0.0
    """Added inside the logarithm of tanh's slope in log pi; 0 is exact (published: 1e-6)."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate for the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate for phi and psi."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate for log alpha."""
    final_lr_fraction: Share = 1.0
    """Learning rates fall along a cosine to this share of their start by the end of the run (paper: 1)."""
    num_eval_envs: Count = 128
    """Evaluation episodes for each layout and kind of action."""
    eval_every: Count = 1_000_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 10_000_000
    """Environment steps between checkpoints; the beginning and the end always have one."""
    checkpoint_replay: bool = True
    """Save the replay too. Without, checkpoints are small, and a resumed run first refills it with its policy, in
    min_replay_size steps of each environment that count towards no budget."""
    remat: Literal["dots", "full", "none"] = "dots"
    """What the backward pass recomputes: all but the matrix products, all, or nothing. Trades memory for time."""
    scan_unroll: Count = 1
    """Blocks per iteration of the loop over depth. More compile longer and may run faster on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the matrix products in the residual blocks; everything else is float32."""

    def __post_init__(self):
        even = self.energy != "mrn" or self.representation_size % 2 == 0
        run.need(even, f"representation_size is {self.representation_size}; --energy=mrn halves it, so it is even")


# ---- networks -----------------------------------------------------------------------------------------------------


class Critic(NamedTuple):
    """The two encoders of f(s, a, g)."""

    phi: ResidualMLP
    psi: ResidualMLP
    torso: AtariTorso | eqx.nn.Identity
    """What looks at images, states and goals alike."""

    def encode_state_action(
        self, observation: Num[Array, "*batch observation"], action: Float[Array, "*batch action"]
    ) -> Float[Array, "*batch representation"]:
        state = over_batch(self.torso, observation)
        return over_batch(self.phi, jnp.concatenate([state, action], axis=-1))

    def encode_goal(self, goal: Num[Array, "*batch goal"]) -> Float[Array, "*batch representation"]:
        return over_batch(self.psi, over_batch(self.torso, goal))


class Agent(NamedTuple):
    """All that learns."""

    actor: ResidualMLP | OnImages
    """(s, g) -> mean and raw log-std of the action."""
    critic: Critic
    log_alpha: Float[Array, ""]


def make_agent(config: Config, env: GoalEnv, key: Key[Array, ""]) -> Agent:
    actor_key, phi_key, psi_key, torso_key, pair_key = jax.random.split(key, 5)
    state, action, goal = env.observation_size, env.action_size, len(env.goal_indices)
    critic_depth = config.critic_depth or config.depth

    def mlp(in_size, depth, out_size, key):
        return ResidualMLP(in_size, config.width, depth, out_size, key, NetworkOptions.of(config))

    torso, pair = eqx.nn.Identity(), state + goal
    if env.image_shape:
        torso = AtariTorso(env.image_shape, 1, config.image_channels, torso_key)
        pair_torso = AtariTorso(env.image_shape, 2, config.image_channels, pair_key)
        state = goal = pair = torso.size
    actor = mlp(pair, config.actor_depth or config.depth, 2 * action, actor_key)
    actor = OnImages(pair_torso, actor) if env.image_shape else actor
    phi = mlp(state + action, critic_depth, config.representation_size, phi_key)
    psi = mlp(goal, critic_depth, config.representation_size, psi_key)
    return Agent(actor, Critic(phi, psi, torso), jnp.zeros(()))


def policy(
    agent: Agent, observation: Num[Array, "*batch observation"], goal: Num[Array, "*batch goal"]
) -> SquashedGaussian:
    """pi(. | s, g)."""
    return SquashedGaussian.from_output(over_batch(agent.actor, jnp.concatenate([observation, goal], axis=-1)))


def value(
    config: Config, agent: Agent, observation: Num[Array, "batch observation"], goal: Num[Array, "batch goal"]
) -> Float[Array, " batch"]:
    """f(s, mean action, g), for pictures."""
    phi = agent.critic.encode_state_action(observation, policy(agent, observation, goal).mode())
    return energy(phi, agent.critic.encode_goal(goal), config.energy)


# ---- losses -------------------------------------------------------------------------------------------------------

TINY = 1e-6
"""Under the square root of a distance: its gradient at 0 is then 0 rather than NaN."""


def energy(
    phi: Float[Array, "batch representation"], psi: Float[Array, "batch representation"], kind: str
) -> Float[Array, " batch"]:
    """f of each row's own pair."""
    if kind == "norm":
        return -jnp.sqrt(jnp.sum((phi - psi) ** 2, axis=-1) + TINY)
    if kind == "l2":
        return -jnp.sum((phi - psi) ** 2, axis=-1)
    if kind == "mrn":
        return -mrn_distance(phi, psi)
    if kind == "cosine":
        phi, psi = unit(phi), unit(psi)
    return jnp.sum(phi * psi, axis=-1)


def pairwise_energy(
    phi: Float[Array, "rows representation"], psi: Float[Array, "columns representation"], kind: str
) -> Float[Array, "rows columns"]:
    """f of all pairs: entry (i, j) belongs to state-action i and goal j.

    Distances come from one matrix product, |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, instead of a batch x batch x
    representation array. Both are first moved by the goals' mean, which changes no distance and saves the digits that a
    common offset would cost. Only mrn needs that array.
    """
    if kind == "mrn":
        return -mrn_distance(phi[:, None], psi)
    if kind in ("norm", "l2"):
        centre = jax.lax.stop_gradient(psi.mean(axis=0))
        phi, psi = phi - centre, psi - centre
    if kind == "cosine":
        phi, psi = unit(phi), unit(psi)
    product = jnp.matmul(phi, psi.T, precision="highest")
    if kind in ("dot", "cosine"):
        return product
    squared = jnp.maximum(jnp.sum(phi**2, axis=-1)[:, None] + jnp.sum(psi**2, axis=-1) - 2 * product, 0)
    return -squared if kind == "l2" else -jnp.sqrt(squared + TINY)


def mrn_distance(
    phi: Float[Array, "*rows representation"], psi: Float[Array, "columns representation"]
) -> Float[Array, "*pairs"]:
    """The metric residual network (Liu et al. 2023): the Euclidean distance of the first halves, and the most by which
    an entry of phi's second half exceeds psi's. It obeys the triangle inequality and is not symmetric."""
    symmetric, asymmetric = jnp.split(phi - psi, 2, axis=-1)
    return jnp.sqrt(jnp.sum(symmetric**2, axis=-1) + TINY) + jnp.max(jax.nn.relu(asymmetric), axis=-1)


def unit(x: Float[Array, "batch representation"]) -> Float[Array, "batch representation"]:
    return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + TINY)


def contrastive_loss(logits: Float[Array, "batch batch"], kind: str) -> Float[Array, ""]:
    """The classification loss; the diagonal holds the true pairs.

    fwd_infonce, the paper's: mean_i [-l_ii + log sum_j exp l_ij]; bwd_infonce sums over state-actions instead of
    goals; sym_infonce adds the two. binary_nce, that of Contrastive RL (Eysenbach et al. 2022): true and false pairs
    told apart by a sigmoid, the mean over each kind.
    """
    positive = jnp.diag(logits)
    if kind == "binary_nce":
        batch = logits.shape[0]
        false_pairs = jax.nn.softplus(logits) * (1 - jnp.eye(batch))
        return jnp.mean(jax.nn.softplus(-positive)) + jnp.sum(false_pairs) / max(batch * (batch - 1), 1)
    forward = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
    backward = jnp.mean(jax.nn.logsumexp(logits, axis=0) - positive)
    return {"fwd_infonce": forward, "bwd_infonce": backward, "sym_infonce": forward + backward}[kind]


class Batch(NamedTuple):
    """Pairs for one gradient step: `goal` was reached later in the episode of `observation` and `action`."""

    observation: Num[Array, "batch observation"]
    action: Float[Array, "batch action"]
    goal: Num[Array, "batch goal"]


def critic_loss(
    critic: Critic, batch: Batch, config: Config
) -> tuple[Float[Array, ""], tuple[Float[Array, "batch representation"], dict]]:
    """Contrastive loss, plus the mean squared log-sum-exp of the rows of logits; psi(g) for the actor; metrics."""
    phi = critic.encode_state_action(batch.observation, batch.action)
    psi = critic.encode_goal(batch.goal)
    logits = pairwise_energy(phi, psi, config.energy)
    logsumexp = jax.nn.logsumexp(logits, axis=1)
    loss = contrastive_loss(logits, config.loss) + config.logsumexp_penalty * jnp.mean(logsumexp**2)
    batch_size = logits.shape[0]
    positive = jnp.mean(jnp.diag(logits))
    info = {
        "train/critic_loss": loss,
        "train/accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(batch_size)),
        "train/positive_energy": positive,
        "train/negative_energy": (jnp.sum(logits) - batch_size * positive) / max(batch_size * (batch_size - 1), 1),
        "train/logsumexp": jnp.mean(logsumexp),
    }
    return loss, (psi, info)


def actor_loss(
    actor: ResidualMLP | OnImages,
    agent: Agent,
    psi: Float[Array, "batch representation"],
    batch: Batch,
    key: Key[Array, ""],
    config: Config,
) -> tuple[Float[Array, ""], dict]:
    """mean_i [alpha log pi(a_i | s_i, g_i) - f(s_i, a_i, g_i)], a_i from the actor, on the goals of the critic's batch,
    whose encodings psi(g_i) come from the critic's loss: one of nine passes over the depth saved.

    A share `random_goals` of the batch takes the goal of the entry before instead.
    """
    rows = jnp.arange(batch.goal.shape[0])[:, None]
    swap = lambda x: jnp.where(rows < config.random_goals * len(rows), jnp.roll(x, 1, axis=0), x)
    goal = swap(batch.goal)
    alpha = jnp.exp(agent.log_alpha) if config.entropy_tuning else jnp.zeros(())
    action, log_prob = policy(agent._replace(actor=actor), batch.observation, goal).sample_and_log_prob(
        key, config.log_prob_epsilon
    )
    phi = agent.critic.encode_state_action(batch.observation, action)
    loss = jnp.mean(alpha * log_prob - energy(phi, swap(psi), config.energy))
    return loss, {"train/actor_loss": loss, "train/entropy": -jnp.mean(log_prob), "train/alpha": alpha}


def alpha_loss(log_alpha: Float[Array, ""], entropy: Float[Array, ""], target: float) -> Float[Array, ""]:
    """alpha (H - H*): alpha falls while the entropy H is above its target, and rises below it."""
    return jnp.exp(log_alpha) * jax.lax.stop_gradient(entropy - target)


# ---- state --------------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of one environment, in the replay."""

    observation: Num[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    next_goal: Num[Array, "*batch goal"]
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
    """Adam, with a learning rate for each part of the agent."""
    schedule = lambda rate: optax.cosine_decay_schedule(rate, buffer.total_updates(config), config.final_lr_fraction)
    rates = {"actor": config.actor_lr, "critic": config.critic_lr, "alpha": config.alpha_lr}
    adams = {part: optax.adam(schedule(rate)) for part, rate in rates.items()}
    return optax.partition(adams, Agent("actor", "critic", "alpha"))


def empty_replay(config: Config, env: GoalEnv) -> buffer.Replay:
    dtype = jnp.uint8 if env.image_shape else jnp.float32
    goal = jnp.zeros(len(env.goal_indices), dtype)
    row = Transition(jnp.zeros(env.observation_size, dtype), jnp.zeros(env.action_size), goal)
    return buffer.init(row, config.max_replay_size, config.num_envs)


def init(config: Config, env: GoalEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, env, agent_key)
    return TrainState(
        agent=agent,
        optimizer=make_optimizer(config).init(agent),
        replay=empty_replay(config, env),
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
        transition = Transition(observation, action, env.achieved_goal(after.observation))
        # where the simulator failed, the row before is stored once more (zeros, if there was none)
        transition = select(current.broken > before.broken, previous, transition)
        return (current, transition), (transition, after.terminated | truncated)

    keys = jax.random.split(unroll_key, config.unroll_length)
    (current, _), (transitions, last) = jax.lax.scan(step, (state.envs, buffer.newest(state.replay)), keys)
    replay = buffer.add(state.replay, transitions, last)
    return state._replace(replay=replay, envs=current, env_steps=state.env_steps + buffer.chunk_steps(config), key=key)


def sample(config: Config, env: GoalEnv, replay: buffer.Replay, key: Key[Array, ""]) -> Batch:
    """Transitions, each with a goal from the discounted future of its episode."""
    if config.relabel == "episode":
        pairs = buffer.sample_future(replay, key, config.batch_size, config.discount)
        goal = buffer.gather(replay, pairs.future, pairs.env).next_goal
    else:
        window = config.episode_length
        pairs = buffer.sample_future_in_window(replay, key, config.batch_size, config.discount, window)
        goal = env.achieved_goal(buffer.gather(replay, pairs.future, pairs.env).observation)
    transition = buffer.gather(replay, pairs.row, pairs.env)
    return run.spread(Batch(transition.observation, transition.action, goal))


def update(config: Config, env: GoalEnv, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step: critic, actor and alpha on one batch, each against the others as they were before."""
    batch_key, actor_key = jax.random.split(key)
    agent = state.agent
    batch = sample(config, env, state.replay, batch_key)
    target_entropy = -config.target_entropy_scale * env.action_size
    critic_gradient, (psi, critic_info) = jax.grad(critic_loss, has_aux=True)(agent.critic, batch, config)
    actor_gradient, actor_info = jax.grad(actor_loss, has_aux=True)(agent.actor, agent, psi, batch, actor_key, config)
    alpha_gradient = jax.grad(alpha_loss)(agent.log_alpha, actor_info["train/entropy"], target_entropy)
    gradient = Agent(actor_gradient, critic_gradient, alpha_gradient)
    updates, optimizer = make_optimizer(config).update(gradient, state.optimizer)
    state = state._replace(
        agent=project(optax.apply_updates(agent, updates)), optimizer=optimizer, gradient_steps=state.gradient_steps + 1
    )
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
    env, far_env = evaluation.make_envs(config, images=True)
    unsaved = () if config.checkpoint_replay else ("replay",)
    environments = {"replay": 1, "envs": 0}  # field of the state -> its axis of environments, for several devices
    with run.Run(config, "crl", RECIPES, evaluation.SCORES, unsaved, environments=environments) as log:
        agent = train(config, env, far_env, log)
        critic = partial(value, config, agent)
        pictures.draw_goal_reaching(log, env, far_env, partial(policy, agent), critic, config.episode_length)


def train(config: Config, env: GoalEnv, far_env: GoalEnv | None, log: run.Run) -> Agent:
    """Fills the replay or resumes, then collects and learns in turns. Returns the agent of the first seed."""
    begin = log.over_seeds(partial(init, config, env))
    shapes = jax.eval_shape(begin, log.seeds)
    depths = f"{config.actor_depth or config.depth} in the actor, {config.critic_depth or config.depth} in the critic"
    log.describe(f"layers in residual blocks: {depths}", actor=shapes.agent.actor, **shapes.agent.critic._asdict())
    state = log.restore(shapes)
    # compiled apart, because the prefill only collects
    collect_chunk = log.compile("collect", partial(collect, config, env), shapes, donate=True)
    learn_chunk = log.compile("learn", partial(learn, config, env), shapes, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, env, far_env), shapes.agent, log.seeds)

    fill = partial(log.repeat, "filling the replay", buffer.prefill_chunks(config), collect_chunk)
    if state is None:
        state = fill(begin(log.seeds))
    elif state.replay is None:
        log.print("the checkpoint has no replay: refilling it with the current policy")
        env_steps = jnp.copy(state.env_steps)
        replay = log.over_seeds(lambda _: empty_replay(config, env))(log.seeds)
        state = fill(state._replace(replay=replay))._replace(env_steps=env_steps)
    while log.going(state):
        state, metrics = learn_chunk(collect_chunk(state))
        if log.evaluates(state):
            metrics |= score(state.agent, log.evaluation_keys(state))
        log.end_chunk(state, metrics)
    return run.one_seed(state.agent)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, GoalEnv, Agent]:
    """Settings, environment and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    env, _ = evaluation.make_envs(config, images=True)
    return config, env, run.load_agent(partial(make_agent, config, env), folder, config, seed)


if __name__ == "__main__":
    main()
