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

The default environment has a recipe (RECIPES below): settings that learn it on two CPU cores. Everything else has the
paper's hyperparameters. Results, metrics and details: algorithms/crl.md.
"""

import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

import envs
from envs import Env, State, VectorEnv, VectorState, mazes
from shared import replay as buffer
from shared import run
from shared.networks import NetworkOptions, ResidualMLP, SquashedGaussian, all_finite, count_parameters

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "point_*": dict(
        total_env_steps=2_000_000,
        num_envs=256,
        episode_length=100,
        unroll_length=50,
        updates_per_chunk=128,
        min_replay_size=100,
        max_replay_size=1000,
        batch_size=256,
        width=64,
        discount=0.95,
        actor_lr=1e-3,
        critic_lr=1e-3,
        alpha_lr=1e-3,
        final_lr_fraction=0.05,
        goal_switch_probability=0.1,
        random_goals=0.5,
        eval_every=200_000,
        checkpoint_every=500_000,
    ),
}
"""Settings for environments whose name matches a pattern; a flag overrides each."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are the paper's, unless a field says otherwise."""

    env: str = "point_u_maze"
    """Environment to train in, a name of envs.names(). The paper's ten tasks are on the page."""
    eval_env: str = ""
    """Environment with the same walls whose goals are the far goals of the evaluation; by default ENV_eval, if any."""
    env_options: str = ""
    """Options of both environments (envs/README.md), e.g. 'merged_walls=false,goal_in_state=false'."""
    seed: int = 0
    """First seed."""
    num_seeds: int = 1
    """Number of seeds (seed, seed + 1, ...), trained side by side in one program."""
    total_env_steps: int = 100_000_000
    """Environment steps of a seed, prefill included; rounded up to whole chunks. Paper: 100 to 400 million."""
    num_envs: int = 512
    """Environments stepped in parallel, for each seed."""
    episode_length: int = 1000
    """Time limit of an episode, in environment steps, in training and evaluation."""
    goals: Literal["resampled", "fixed"] = "resampled"
    """Start and goal at a reset: drawn anew, or those each environment began with (what the published code does)."""
    goal_switch_probability: float = 0.0
    """Probability, at each step of data collection, that an environment's commanded goal is drawn anew (paper: 0)."""
    unroll_length: int = 62
    """Steps of each environment in one chunk."""
    updates_per_chunk: int = 800
    """Gradient steps in one chunk, after its environment steps."""
    min_replay_size: int = 1000
    """Rows collected in each environment before the first gradient step, with the untrained policy."""
    max_replay_size: int = 10_000
    """Rows kept for each environment."""
    relabel: Literal["episode", "published"] = "episode"
    """Law of the training goals: the discounted future of the row's whole episode, terminal state included; or that of
    the published code, cut off at the end of a window of episode_length rows (page, detail 4)."""
    batch_size: int = 512
    """Pairs (state and action, future goal) in a gradient step; each has the other goals of the batch as negatives."""
    discount: float = 0.99
    """Discount of the future, in (0, 1); the mean look-ahead is 1 / (1 - discount) steps."""
    depth: int = 4
    """Layers inside the residual blocks of all three networks, a multiple of 4. Paper: 4 to 1024."""
    actor_depth: int | None = None
    """Depth of the actor, if other than depth (paper: 512 with a critic of 1024)."""
    critic_depth: int | None = None
    """Depth of the two critic encoders, if other than depth."""
    width: int = 256
    """Units in each layer."""
    representation_size: int = 64
    """Length of phi(s, a) and psi(g)."""
    energy: Literal["norm", "l2", "dot", "cosine"] = "norm"
    """f from phi and psi: minus their distance, minus the squared distance, inner product, cosine. The penalty below
    presses all cosines to -1; take --logsumexp_penalty 0 with them."""
    loss: Literal["fwd_infonce", "bwd_infonce", "sym_infonce", "binary_nce"] = "fwd_infonce"
    """Classify the goal given state and action, the reverse, both, or each pair as true or false."""
    logsumexp_penalty: float = 0.1
    """Weight of the squared log-sum-exp of each row of logits, whatever the loss. Without it, forward InfoNCE leaves
    each state and action a free constant, so that actions cannot be compared."""
    random_goals: float = 0.0
    """Share of the actor's batch whose goals are those of other rows, in [0, 1] (paper: 0)."""
    entropy_tuning: bool = True
    """Entropy bonus with a learned weight alpha; without, the actor only maximises the critic."""
    target_entropy_scale: float = 0.5
    """The entropy that alpha aims at is minus this times the number of action dimensions."""
    actor_lr: float = 3e-4
    """Adam's learning rate for the actor."""
    critic_lr: float = 3e-4
    """Adam's learning rate for phi and psi."""
    alpha_lr: float = 3e-4
    """Adam's learning rate for log alpha."""
    final_lr_fraction: float = 1.0
    """Learning rates fall along a cosine to this share of their start by the end of the run, in [0, 1] (paper: 1)."""
    num_eval_envs: int = 128
    """Evaluation episodes for each layout and kind of action."""
    eval_every: int = 1_000_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: int = 10_000_000
    """Environment steps between checkpoints; the beginning and the end always have one."""
    checkpoint_replay: bool = True
    """Save the replay too. Without, checkpoints are small, and a resumed run first refills it with its policy, in
    min_replay_size steps of each environment that count towards no budget."""
    remat: Literal["dots", "full", "none"] = "dots"
    """What the backward pass recomputes: all but the matrix products, all, or nothing. Trades memory for time."""
    scan_unroll: int = 1
    """Blocks per iteration of the loop over depth. More compile longer and may run faster on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the matrix products in the residual blocks; everything else is float32."""
    matmul_precision: Literal["default", "float32", "tensorfloat32", "bfloat16"] = "default"
    """JAX's precision of float32 matrix products; default is float32 on a CPU, and may be less on a GPU. The logits
    always have float32."""
    run_dir: str = ""
    """Run folder; by default runs/crl/ENV/SEED-TIME."""
    resume: str = ""
    """Run folder to go on with; its settings are in force."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder (pip install -e '.[tensorboard]')."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install -e '.[wandb]')."""


def check(config: Config) -> None:
    """UserError, in one line, if a setting cannot work."""

    def need(fine, message):
        if not fine:
            raise run.UserError(message)

    counts = "num_seeds num_envs episode_length unroll_length updates_per_chunk batch_size width representation_size"
    for name in (*counts.split(), "num_eval_envs", "eval_every", "checkpoint_every", "scan_unroll"):
        need(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it is at least 1")
    for name in ("goal_switch_probability", "random_goals", "final_lr_fraction"):
        need(0 <= getattr(config, name) <= 1, f"{name} is {getattr(config, name)}; it lies in [0, 1]")
    for name, depth in (("actor_depth", actor_depth(config)), ("critic_depth", critic_depth(config))):
        name = "depth" if depth == config.depth else name
        need(depth >= 4 and depth % 4 == 0, f"{name} is {depth}; it is a positive multiple of 4, e.g. {nearest(depth)}")
    need(0 < config.discount < 1, f"discount is {config.discount}; it lies strictly between 0 and 1")
    need(
        config.max_replay_size >= max(config.episode_length, config.unroll_length),
        f"max_replay_size is {config.max_replay_size}; it holds at least an episode ({config.episode_length} steps) "
        f"and an unroll ({config.unroll_length})",
    )
    need(
        2 <= config.min_replay_size <= config.max_replay_size,
        f"min_replay_size is {config.min_replay_size}; it lies in 2 to max_replay_size ({config.max_replay_size})",
    )
    need(
        config.total_env_steps > prefill_chunks(config) * chunk_steps(config),
        f"total_env_steps is {config.total_env_steps}; it must exceed the prefill of "
        f"{prefill_chunks(config) * chunk_steps(config)} steps (num_envs x min_replay_size, in whole chunks)",
    )


def nearest(depth: int) -> int:
    return max(4, round(depth / 4) * 4)


def actor_depth(config: Config) -> int:
    return config.depth if config.actor_depth is None else config.actor_depth


def critic_depth(config: Config) -> int:
    return config.depth if config.critic_depth is None else config.critic_depth


def chunk_steps(config: Config) -> int:
    """Environment steps of one seed in one chunk."""
    return config.num_envs * config.unroll_length


def prefill_chunks(config: Config) -> int:
    """Chunks of data collection before the first gradient step."""
    return math.ceil(config.min_replay_size / config.unroll_length)


def total_updates(config: Config) -> int:
    """Gradient steps in the whole run."""
    chunks = math.ceil(config.total_env_steps / chunk_steps(config)) - prefill_chunks(config)
    return chunks * config.updates_per_chunk


# ---- networks -----------------------------------------------------------------------------------------------------


class Critic(NamedTuple):
    """The two encoders of f(s, a, g)."""

    phi: ResidualMLP
    psi: ResidualMLP

    def encode_state_action(
        self, observation: Float[Array, "batch observation"], action: Float[Array, "batch action"]
    ) -> Float[Array, "batch representation"]:
        return jax.vmap(self.phi)(jnp.concatenate([observation, action], axis=-1))

    def encode_goal(self, goal: Float[Array, "batch goal"]) -> Float[Array, "batch representation"]:
        return jax.vmap(self.psi)(goal)


def make_networks(config: Config, env: Env, key: Key[Array, ""]) -> tuple[ResidualMLP, Critic]:
    """The actor, (s, g) -> mean and raw log-std of the action; and the critic."""
    actor_key, phi_key, psi_key = jax.random.split(key, 3)
    options = NetworkOptions(config.remat, config.scan_unroll, config.dtype)
    state, action, goal = env.observation_size, env.action_size, len(env.goal_indices)

    def mlp(in_size, depth, out_size, key):
        return ResidualMLP(in_size, config.width, depth, out_size, key, options)

    actor = mlp(state + goal, actor_depth(config), 2 * action, actor_key)
    phi = mlp(state + action, critic_depth(config), config.representation_size, phi_key)
    psi = mlp(goal, critic_depth(config), config.representation_size, psi_key)
    return actor, Critic(phi, psi)


def policy(
    actor: ResidualMLP, observation: Float[Array, "batch observation"], goal: Float[Array, "batch goal"]
) -> SquashedGaussian:
    """pi(. | s, g), batched."""
    return SquashedGaussian.from_output(jax.vmap(actor)(jnp.concatenate([observation, goal], axis=-1)))


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
    if kind == "cosine":
        phi, psi = unit(phi), unit(psi)
    return jnp.sum(phi * psi, axis=-1)


def pairwise_energy(
    phi: Float[Array, "rows representation"], psi: Float[Array, "columns representation"], kind: str
) -> Float[Array, "rows columns"]:
    """f of all pairs: entry (i, j) belongs to state-action i and goal j.

    Distances come from one matrix product, |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, instead of a batch x batch x
    representation array. Both are first moved by the goals' mean, which changes no distance and saves the digits that a
    common offset would cost.
    """
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

    observation: Float[Array, "batch observation"]
    action: Float[Array, "batch action"]
    goal: Float[Array, "batch goal"]


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
    actor: ResidualMLP,
    critic: Critic,
    psi: Float[Array, "batch representation"],
    alpha: Float[Array, ""],
    batch: Batch,
    key: Key[Array, ""],
    config: Config,
) -> tuple[Float[Array, ""], dict]:
    """mean_i [alpha log pi(a_i | s_i, g_i) - f(s_i, a_i, g_i)], a_i from the actor, on the goals of the critic's batch,
    whose encodings psi(g_i) come from the critic's loss: one of nine passes over the depth saved.

    A share `random_goals` of the rows takes the goal of the row before instead.
    """
    rows = jnp.arange(batch.goal.shape[0])[:, None]
    swap = lambda x: jnp.where(rows < config.random_goals * len(rows), jnp.roll(x, 1, axis=0), x)
    goal = swap(batch.goal)
    action, log_prob = policy(actor, batch.observation, goal).sample_and_log_prob(key)
    phi = critic.encode_state_action(batch.observation, action)
    loss = jnp.mean(alpha * log_prob - energy(phi, swap(psi), config.energy))
    return loss, {"train/actor_loss": loss, "train/entropy": -jnp.mean(log_prob), "train/alpha": alpha}


def alpha_loss(log_alpha: Float[Array, ""], entropy: Float[Array, ""], target: float) -> Float[Array, ""]:
    """alpha (H - H*): alpha falls while the entropy H is above its target, and rises below it."""
    return jnp.exp(log_alpha) * jax.lax.stop_gradient(entropy - target)


# ---- state --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One step of one environment, in the replay."""

    observation: Float[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    next_goal: Float[Array, "*batch goal"]
    """The goal achieved after the action."""


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    actor: ResidualMLP
    critic: Critic
    log_alpha: Float[Array, ""]
    actor_optimizer: optax.OptState
    critic_optimizer: optax.OptState
    alpha_optimizer: optax.OptState
    replay: buffer.Replay
    envs: VectorState
    unrolled: Int[Array, ""]
    """Steps taken in each environment."""
    updates: Int[Array, ""]
    """Gradient steps taken."""
    key: Key[Array, ""]


def adam(config: Config, learning_rate: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, total_updates(config), config.final_lr_fraction))


def empty_replay(config: Config, env: Env) -> buffer.Replay:
    row = Row(*(jnp.zeros(size) for size in (env.observation_size, env.action_size, len(env.goal_indices))))
    return buffer.init(row, config.max_replay_size, config.num_envs)


def init(config: Config, env: Env, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    network_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is evaluation_key's
    actor, critic = make_networks(config, env, network_key)
    log_alpha = jnp.zeros(())
    return TrainState(
        actor=actor,
        critic=critic,
        log_alpha=log_alpha,
        actor_optimizer=adam(config, config.actor_lr).init(actor),
        critic_optimizer=adam(config, config.critic_lr).init(critic),
        alpha_optimizer=adam(config, config.alpha_lr).init(log_alpha),
        replay=empty_replay(config, env),
        envs=vector_env(config, env).reset(env_key),
        unrolled=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        key=key,
    )


def vector_env(config: Config, env: Env) -> VectorEnv:
    return VectorEnv(env, config.num_envs, config.episode_length, config.goals)


# ---- training -----------------------------------------------------------------------------------------------------


def collect(config: Config, env: Env, state: TrainState) -> TrainState:
    """Steps every environment `unroll_length` times with sampled actions, and stores what happened."""
    vector = vector_env(config, env)
    key, unroll_key = jax.random.split(state.key)

    def step(current: VectorState, key):
        action_key, switch_key, goal_key = jax.random.split(key, 3)
        action, _ = policy(state.actor, current.env.observation, current.env.goal).sample_and_log_prob(action_key)
        current, seen = vector.step(current, action)
        if config.goal_switch_probability > 0:
            new = jax.vmap(env.sample_goal)(jax.random.split(goal_key, config.num_envs))
            switch = jax.random.bernoulli(switch_key, config.goal_switch_probability, (config.num_envs, 1))
            goal = jnp.where(switch, new, current.env.goal)
            current = current._replace(env=jax.vmap(env.with_goal)(current.env, goal))
        row = Row(seen.observation, seen.action, env.achieved_goal(seen.next_observation))
        return current, (row, seen.terminated | seen.truncated)

    current, (rows, last) = jax.lax.scan(step, state.envs, jax.random.split(unroll_key, config.unroll_length))
    replay = buffer.add(state.replay, rows, last)
    return state._replace(replay=replay, envs=current, unrolled=state.unrolled + config.unroll_length, key=key)


def sample(config: Config, env: Env, replay: buffer.Replay, key: Key[Array, ""]) -> Batch:
    """Rows, each with a goal from the discounted future of its episode."""
    if config.relabel == "episode":
        pairs = buffer.sample_future(replay, key, config.batch_size, config.discount)
        goal = buffer.gather(replay, pairs.future, pairs.env).next_goal
    else:
        window = config.episode_length
        pairs = buffer.sample_future_in_window(replay, key, config.batch_size, config.discount, window)
        goal = env.achieved_goal(buffer.gather(replay, pairs.future, pairs.env).observation)
    row = buffer.gather(replay, pairs.row, pairs.env)
    return Batch(row.observation, row.action, goal)


def update(config: Config, env: Env, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step: critic, actor and alpha on one batch, each against the others as they were before."""
    batch_key, actor_key = jax.random.split(key)
    batch = sample(config, env, state.replay, batch_key)
    alpha = jnp.exp(state.log_alpha) if config.entropy_tuning else jnp.zeros(())
    target_entropy = -config.target_entropy_scale * env.action_size

    def step(learning_rate, gradient, optimizer_state, parameters):
        updates, optimizer_state = adam(config, learning_rate).update(gradient, optimizer_state)
        return optax.apply_updates(parameters, updates), optimizer_state

    gradient, (psi, critic_info) = jax.grad(critic_loss, has_aux=True)(state.critic, batch, config)
    critic, critic_optimizer = step(config.critic_lr, gradient, state.critic_optimizer, state.critic)

    actor_gradient = jax.grad(actor_loss, has_aux=True)
    gradient, actor_info = actor_gradient(state.actor, state.critic, psi, alpha, batch, actor_key, config)
    actor, actor_optimizer = step(config.actor_lr, gradient, state.actor_optimizer, state.actor)

    gradient = jax.grad(alpha_loss)(state.log_alpha, actor_info["train/entropy"], target_entropy)
    log_alpha, alpha_optimizer = step(config.alpha_lr, gradient, state.alpha_optimizer, state.log_alpha)

    state = state._replace(
        actor=actor,
        critic=critic,
        log_alpha=log_alpha,
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        alpha_optimizer=alpha_optimizer,
        updates=state.updates + 1,
    )
    return state, {**actor_info, **critic_info}


def learn(config: Config, env: Env, state: TrainState) -> tuple[TrainState, dict]:
    """`updates_per_chunk` gradient steps; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_chunk)
    return jax.lax.scan(partial(update, config, env), state._replace(key=key), keys)


# ---- evaluation ---------------------------------------------------------------------------------------------------


def play(config: Config, env: Env, actor: ResidualMLP, start: State, sampled: Bool[Array, " batch"], key, record):
    """Plays one episode from each start, with the mean action or a sampled one; returns record(state) of each step."""

    def step(state, key):
        distribution = policy(actor, state.observation, state.goal)
        action = jnp.where(sampled[:, None], distribution.sample_and_log_prob(key)[0], distribution.mode())
        after = jax.vmap(env.step)(state, action)
        # a robot that fell stays as it was
        stay = lambda old, new: jnp.where(state.terminated.reshape(-1, *[1] * (new.ndim - 1)), old, new)
        state = jax.tree.map(stay, state, after)
        return state, record(state)

    return jax.lax.scan(step, start, jax.random.split(key, config.episode_length))[1]


def evaluation_key(seed: Int[Array, ""]) -> Key[Array, ""]:
    """Evaluations draw from a key of their own, so that evaluating more or less often changes nothing else."""
    return jax.random.split(jax.random.key(seed), 4)[3]


def evaluate(config: Config, env: Env, far: Env | None, actor: ResidualMLP, key: Key[Array, ""]) -> dict:
    """Fresh episodes on every layout with both kinds of action, as one batch; counted until a robot falls."""
    reset_key, play_key = jax.random.split(key)
    keys = jax.random.split(reset_key, config.num_eval_envs)
    groups = [
        (f"eval/{layout}{kind}", jax.vmap(where.reset)(keys), jnp.full(config.num_eval_envs, kind != ""))
        for layout, where in (("", env), ("far/", far))
        for kind in ("", "sampled/")
        if where is not None
    ]
    names, starts, sampled = zip(*groups)
    start, sampled = jax.tree.map(lambda *x: jnp.concatenate(x), *starts), jnp.concatenate(sampled)
    # the layouts have the same walls, so one environment steps them all
    distance, fallen = play(config, env, actor, start, sampled, play_key, lambda s: (env.distance(s), s.terminated))
    playing = jnp.cumsum(fallen, axis=0) - fallen == 0  # (time, episodes); the step of the fall still counts
    steps = playing.sum(axis=0)
    at_goal = jnp.sum(playing & (distance < env.success_radius), axis=0)
    per_episode = {
        "success_any": at_goal > 0,
        "time_at_goal": at_goal,
        "distance": jnp.sum(jnp.where(playing, distance, 0), axis=0) / steps,
        "episode_length": steps,
    }
    for name, radius in env.other_radii.items():
        per_episode[f"time_at_goal_{name}"] = jnp.sum(playing & (distance < radius), axis=0)
    return {
        f"{name}{metric}": values.reshape(len(names), -1)[i].mean()
        for i, name in enumerate(names)
        for metric, values in per_episode.items()
    }


# ---- pictures -----------------------------------------------------------------------------------------------------


def value_map(config: Config, env: Env, state: TrainState, goals: Float[Array, "goals 2"], cells: int = 12):
    """Energies f(s, mean action, goal) of one seed, for s all over a maze on a grid of `cells` points a cell.

    The robot is at rest. Returns the grid's x, its y, and the maps (goal, y, x); walls are NaN.
    """
    maze = env.maze
    rows, columns = maze.is_wall.shape
    x, y = ((np.arange(n * cells) + 0.5) / cells - 0.5 for n in (rows, columns))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)

    @jax.jit
    def values(goals):
        def of(goal):
            placed = jax.vmap(env.place, (0, None))(jnp.asarray(points * maze.cell_size, jnp.float32), goal)
            action = policy(state.actor, placed.observation, placed.goal).mode()
            phi = state.critic.encode_state_action(placed.observation, action)
            return energy(phi, state.critic.encode_goal(placed.goal), config.energy)

        return jax.lax.map(of, goals)

    walls = maze.is_wall[tuple(np.round(points).astype(int).T)]
    maps = np.where(walls, np.nan, values(goals)).reshape(-1, len(y), len(x))
    return x * maze.cell_size, y * maze.cell_size, maps


def three_goals(env: Env) -> Float[np.ndarray, "goals 2"]:
    """Cells of three goals of a maze, spread over their list."""
    goals = env.maze.positions("G")
    return goals[np.unique(np.linspace(0, len(goals) - 1, 3).round().astype(int))]


def draw_value_map(env: Env, goals, x, y, maps, path) -> None:
    """The value maps of `value_map`, side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(goals), figsize=(4.2 * len(goals), 4), squeeze=False, layout="constrained")
    for axis, goal, values in zip(axes[0], goals, maps):
        mazes.draw(env.maze, axis)
        image = axis.pcolormesh(x, y, values, shading="nearest", zorder=2)
        axis.plot(*goal, "rX", markersize=12, zorder=3)
        axis.plot(*env.maze.positions("R").T, "wo", zorder=3)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"{env.name}: f(s, mean action, goal); start o, goal x")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def draw_trajectories(env: Env, tracks, goals, sampled, path) -> None:
    """Paths (episode, time, 2) to goals (episode, 2): left those of mean actions, right those of sampled ones."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    for axis, title, kind in ((axes[0], "mean actions", False), (axes[1], "sampled actions", True)):
        mazes.draw(env.maze, axis)
        for i in np.flatnonzero(np.asarray(sampled) == kind):
            (line,) = axis.plot(*tracks[i].T, alpha=0.8)
            axis.plot(*goals[i], "X", markersize=9, color=line.get_color())
        axis.set_title(title)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def eight_episodes(config: Config, env: Env, far: Env | None, actor: ResidualMLP) -> tuple[State, np.ndarray]:
    """Episodes of one seed's policy to draw, leaves (episode, time, ...): whole ones, on far goals if there are any;
    and which have sampled actions, the last four."""
    reset_key, play_key = jax.random.split(evaluation_key(jnp.array(config.seed)))
    start = jax.vmap((far or env).reset)(jax.random.split(reset_key, 8))
    sampled = jnp.arange(8) >= 4
    states = jax.jit(lambda start: play(config, env, actor, start, sampled, play_key, lambda s: s))(start)
    return jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), states), np.asarray(sampled)


def draw(config: Config, env: Env, far: Env | None, state: TrainState, log: run.Run) -> None:
    """All figures of a finished run; of several seeds, the first one's policy and critic."""
    labels = {"eval/": "uniform goals, mean action", "eval/sampled/": "uniform goals, sampled action"}
    if far:
        labels |= {"eval/far/": "far goals, mean action", "eval/far/sampled/": "far goals, sampled action"}
    curves = {f"{name}success_any": label for name, label in labels.items()}
    log.print(f"learning curve  {run.plot_curve(log.folder, curves, 'episodes that reach their goal')}")

    state = jax.tree.map(lambda x: x[0], state._replace(replay=None))
    log.progress.show("drawing the policy")
    states, sampled = eight_episodes(config, env, far, state.actor)
    log.print(f"policy          {env.render(states, str(log.folder / 'rollout'))}")
    if env.maze:
        tracks = np.asarray(env.achieved_goal(jnp.asarray(states.observation)))[..., :2]
        draw_trajectories(env, tracks, states.goal[:, 0, :2], sampled, log.folder / "trajectories.png")
        log.print(f"trajectories    {log.folder / 'trajectories.png'}")
        goals = three_goals(far or env)
        maps = value_map(config, env, state, jnp.asarray(goals))
        draw_value_map(env, goals, *maps, log.folder / "value_map.png")
        log.print(f"value map       {log.folder / 'value_map.png'}")


# ---- main ---------------------------------------------------------------------------------------------------------


def make_envs(config: Config) -> tuple[Env, Env | None]:
    """The environment, and the one with its far goals."""
    try:
        options = run.parse_options(config.env_options)
        env = envs.make(config.env, **options)
        far_name = config.eval_env or envs.far(config.env)
        far = envs.make(far_name, **options) if far_name else None
    except ValueError as error:
        raise run.UserError(str(error)) from None
    if not env.goal_indices:
        script = "cocoa.py" if config.env in envs.FAMILIES else "ppo_ad.py"
        raise run.UserError(f"{config.env} has no goals to reach; it is for {script}")
    if far and far.world != env.world:
        raise run.UserError(
            f"eval_env {far_name} has another robot, other walls or another time step than {config.env}"
        )
    return env, far


def count(config: Config, state: TrainState) -> dict[str, int]:
    """Steps of one seed so far."""
    return {
        "env_steps": int(state.unrolled[0]) * config.num_envs,
        "gradient_steps": int(state.updates[0]),
    }


def check_finite(config: Config, before: int, metrics: dict[str, np.ndarray], state: TrainState) -> None:
    """UserError if a loss of a chunk, of shape (num_seeds, updates), or a parameter after it is NaN or infinite."""
    names = ("train/critic_loss", "train/actor_loss")
    bad = np.argwhere(~np.isfinite([metrics[name] for name in names]).transpose(2, 1, 0))  # by step, seed, name
    what = ""
    if len(bad):
        step, seed, name = bad[0]
        value = metrics[names[name]][seed, step]
        what = f"{names[name]} is {value} at gradient step {before + step + 1} of seed {config.seed + seed}"
    elif not all_finite((state.actor, state.critic, state.log_alpha)):
        what = f"a parameter is not finite after gradient step {before + metrics[names[0]].shape[1]}"
    if what:
        raise run.UserError(
            f"{what}; training stopped, the last good checkpoint is kept. Try lower learning rates anew"
        )


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, RECIPES, __doc__, argv)
    check(config)
    env, far = make_envs(config)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    with run.Run(config, "crl") as log:
        train(config, env, far, log)


def describe(config: Config, state: TrainState, log: run.Run) -> None:
    log.print(f"run folder {log.folder}")
    recipe = run.recipe_for(config.env, RECIPES)
    if recipe:
        log.print(f"recipe for {config.env}: " + " ".join(f"{k}={getattr(config, k)}" for k in recipe))
    for name, network, depth in (
        ("actor", state.actor, actor_depth(config)),
        ("phi", state.critic.phi, critic_depth(config)),
        ("psi", state.critic.psi, critic_depth(config)),
    ):
        parameters = count_parameters(network) // config.num_seeds
        log.print(f"{name:5s} {depth} layers in blocks, {depth + 2} in all, {parameters:,} parameters")
    precision = f"{config.dtype} blocks, matmul precision {config.matmul_precision}"
    log.print(f"device {run.device_name()}; {precision}; {config.num_seeds} seed(s)")


def train(config: Config, env: Env, far: Env | None, log: run.Run) -> None:
    """The run: set up or resume, then chunks with evaluations and checkpoints between them, then the figures."""

    seed_numbers = config.seed + jnp.arange(config.num_seeds)
    seeds = jax.vmap(jax.random.key)(seed_numbers)
    shapes = jax.eval_shape(jax.vmap(partial(init, config, env)), seeds)
    describe(config, shapes, log)
    batched = partial(run.over_seeds, config.num_seeds)
    # compiled apart, because the prefill only collects; the state is donated, so the replay is never copied
    collect_chunk = log.compile("collect", jax.jit(batched(partial(collect, config, env)), donate_argnums=0), shapes)
    learn_chunk = log.compile("learn", jax.jit(batched(partial(learn, config, env)), donate_argnums=0), shapes)
    score = log.compile("evaluate", jax.jit(batched(partial(evaluate, config, env, far))), shapes.actor, seeds)
    columns = [*learn_chunk.out_info[1], *score.out_info]

    def stored(state):
        return state if config.checkpoint_replay else state._replace(replay=None)

    def fill(state):
        log.progress.show("filling the replay")
        for _ in range(prefill_chunks(config)):
            state = state if log.stopping else collect_chunk(state)
        return state

    state, steps = log.restore(stored(shapes)) if log.resumed else (None, None)
    if state is None:
        log.progress.show("initialising")
        state = fill(jax.jit(jax.vmap(partial(init, config, env)))(seeds))
        steps = count(config, state)
        if not log.stopping:
            log.save(stored(state), steps)
    elif not config.checkpoint_replay:
        log.print("the checkpoint has no replay: refilling it with the current policy")
        unrolled = jnp.copy(state.unrolled)
        empty = jax.vmap(lambda _: empty_replay(config, env))(seeds)
        state = fill(state._replace(replay=empty))._replace(unrolled=unrolled)

    success = ""
    log.start_clock(steps["env_steps"])
    while steps["env_steps"] < config.total_env_steps and not log.stopping:
        before = steps
        state, info = learn_chunk(collect_chunk(state))
        info = jax.tree.map(np.asarray, info)
        steps = count(config, state)
        check_finite(config, before["gradient_steps"], info, state)
        metrics = {name: values.mean(axis=1) for name, values in info.items()}
        if log.due(config.eval_every, before, steps):
            keys = jax.vmap(lambda seed, step: jax.random.fold_in(evaluation_key(seed), step), (0, None))(
                seed_numbers, steps["gradient_steps"]
            )
            metrics |= jax.tree.map(np.asarray, score(state.actor, keys))
            success = f"success {metrics['eval/success_any'].mean():.2f}"
            log.print(summary(steps, metrics))
        log.log(steps, metrics, columns)
        log.show(steps["env_steps"], success)
        if log.due(config.checkpoint_every, before, steps):
            log.save(stored(state), steps)

    if log.stopping:
        if steps["gradient_steps"]:
            log.save(stored(state), steps)
        log.stopped(f"at env step {steps['env_steps']:,}")
    draw(config, env, far, state, log)
    log.print(str(log.folder))


def summary(steps: dict[str, int], metrics: dict[str, np.ndarray]) -> str:
    """One line on an evaluation: the share of episodes that reach their goal, the mean over seeds."""
    kinds = ("", "sampled/", "far/", "far/sampled/")
    parts = [
        f"{kind.replace('/', ' ') or 'uniform '}{metrics[f'eval/{kind}success_any'].mean():.2f}"
        for kind in kinds
        if f"eval/{kind}success_any" in metrics
    ]
    return f"env steps {steps['env_steps']:>11,}  reached the goal: {', '.join(parts)}"


if __name__ == "__main__":
    main()
