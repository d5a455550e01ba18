"""CoCOA: contrastive task embeddings on PEARL meta-RL, in one file.

'Contrastive Context-based Off-policy Adaptation' of the thesis UCB/EECS-2020-219, on top of PEARL (Rakelly et al. 2019,
arXiv 1903.08254). It has nothing to do with COCOA, counterfactual contribution analysis (Meulemans et al. 2023).

An agent meets tasks that differ in their rewards or their physics, and is not told which one it is in. PEARL (1)
encodes what it has seen of the task, each transition as a Gaussian factor over a latent variable z and their product as
its posterior; (2) acts and values states given a sample of z, by soft actor-critic; (3) at a new task explores with z
from the prior, then acts with z from the posterior. The encoder learns from the critics' loss, under an information
bottleneck. CoCOA adds a contrastive loss to it: two crops of one trajectory shall be embedded alike, and unlike those
of other trajectories.

    python algorithms/cocoa.py                                     a point finds goals it is not told (a minute)
    python algorithms/cocoa.py --contrastive=false                 PEARL on it
    python algorithms/cocoa.py --context=oracle                    the same agent told the task: the upper bound
    python algorithms/cocoa.py --env half_cheetah_vel              PEARL's networks and budget (for a GPU)
    python algorithms/cocoa.py --resume runs/cocoa/...             go on with a run

Every environment has a recipe (RECIPES below): the point tasks' are ours, for two CPU cores; the others are PEARL's
published settings. Results, metrics and details: algorithms/cocoa.md.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Interval
from jaxtyping import Array, Bool, Float, Int, Key

from envs import TaskFamily, TaskState, intact, select
from shared import pictures, run
from shared import replay as buffer
from shared.networks import MLP, SquashedGaussian
from shared.run import Count, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

ONE_WAY = "--meta_batch 4 --context_size 256 --eval_repeats 4"
RECIPES = {
    "*point_goal": """
        --total_env_steps 60_000 --episode_length 20 --initial_steps 200 --tasks_per_iteration 16
        --prior_steps 40 --posterior_steps 80 --extra_steps 0 --updates_per_iteration 500 --replay_size 80_000
        --batch_size 32 --context_size 40 --temperature 100 --latent_size 8 --width 64 --encoder_width 128
        --discount 0.9 --reward_scale 20 --target_rate 0.02 --learning_rate 2e-3 --final_lr_fraction 0.05
        --exploration_episodes 4 --eval_episodes 8 --eval_repeats 5 --eval_every 10_000 --checkpoint_every 20_000
    """,
    "sparse_point_goal": "--exploration_episodes 5 --eval_episodes 20",
    "half_cheetah_dir": f"""
        --total_env_steps 5_004_000 --initial_steps 2000 --prior_steps 1000 --extra_steps 1000 {ONE_WAY}
    """,
    "half_cheetah_vel": "--total_env_steps 2_700_000 --context_size 100",
    "ant_dir": f"--total_env_steps 2_504_000 --updates_per_iteration 4000 {ONE_WAY}",
    "ant_goal": """
        --total_env_steps 2_800_000 --meta_batch 10 --updates_per_iteration 4000 --context_size 256
        --kl_weight 1 --contrastive_kl_weight 1
    """,
    "humanoid_dir": "--total_env_steps 2_700_000 --updates_per_iteration 4000 --context_size 256",
    "metaworld_*": """
        --initial_steps 4000 --tasks_per_iteration 15 --prior_steps 800 --extra_steps 800 --updates_per_iteration 4000
        --latent_size 7 --reward_scale 0.05 --context_reward_scale 0.01 --exploration_episodes 10 --eval_episodes 11
    """,
    "walker_params": """
        --total_env_steps 2_580_000 --meta_batch 10 --updates_per_iteration 4000 --context_size 100
        --next_observation_in_context --eval_repeats 2
    """,
}
"""Flags for environments whose name matches a pattern; a flag that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are PEARL's, and the thesis' where it gives a value; the others are ours (algorithms/cocoa.md)."""

    env: str = "point_goal"
    """Task family to meta-train on: one of envs.FAMILIES."""
    total_env_steps: Steps = 2_500_000
    """Environment steps of a seed, without evaluations; rounded up to whole iterations."""
    episode_length: Count = 200
    """Time limit of an episode, in environment steps."""
    num_train_tasks: Count | None = None
    """Tasks to train on; by default the family's published number."""
    num_test_tasks: Count | None = None
    """Held-out tasks to test on; by default the family's published number."""
    initial_steps: Count = 2000
    """Steps in each train task before the first gradient step, z from the prior; rounded up to whole episodes, as are
    the next three."""
    tasks_per_iteration: Count = 5
    """Visits to train tasks in an iteration, side by side; no task has two before all have one."""
    prior_steps: Count = 400
    """Steps of a visit with z from the prior; they replace the task's context."""
    posterior_steps: Annotated[int, Ge(0)] = 0
    """Steps of a visit with z from the posterior that join the context."""
    extra_steps: Annotated[int, Ge(0)] = 600
    """Steps of a visit with z from the posterior that are not for context."""
    updates_per_iteration: Count = 2000
    """Gradient steps in an iteration."""
    meta_batch: Count = 16
    """Tasks in a gradient step, drawn with replacement."""
    batch_size: Count = 256
    """Transitions of each task in a gradient step, from all of its data."""
    replay_size: Count = 5_000_000
    """Rows kept, over all train tasks together."""
    context: Literal["encoder", "oracle"] = "encoder"
    """What z is: a sample of the encoder's posterior; or the task itself, told, and then there is no encoder."""
    context_size: Count = 64
    """Transitions of a task's recent data that z is inferred from in training."""
    next_observation_in_context: bool = False
    """Transitions in the context include the next observation."""
    context_reward_scale: Positive = 1.0
    """Multiplies rewards in the context."""
    contrastive: bool = True
    """CoCOA's loss on the encoder. Without, this is PEARL, and the next eight flags have no effect."""
    contrastive_weight: Weight = 1.0
    """Weight of the contrastive loss."""
    contrastive_kl_weight: Weight = 0.1
    """Weight of the mean divergence of the query crops' posteriors from the prior."""
    similarity: Literal["mahalanobis", "bhattacharyya", "bilinear", "wasserstein"] = "mahalanobis"
    """Of two embeddings: the thesis' form, the whole Bhattacharyya distance, a learned product of means, or the
    2-Wasserstein distance."""
    temperature: Positive = 1.0
    """Divides the similarities; what suits one form does not suit another."""
    num_trajectories: int = 16
    """Trajectories in a contrastive batch, rounded up to as many for each task of the meta-batch."""
    window: int | None = None
    """Steps in a crop; by default 0.32 of episode_length. The thesis gives no value."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.995
    """Of the key encoder, which follows the encoder: 0 is the encoder itself. The thesis gives no value."""
    negatives: Literal["all", "other_tasks"] = "all"
    """Keys that a query is told from: those of all other trajectories, or only those of other tasks."""
    latent_size: Count = 5
    """Length of z."""
    kl_weight: Weight = 0.1
    """Weight of the information bottleneck, summed over the tasks of a meta-batch."""
    discount: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """Discount of future rewards."""
    reward_scale: Positive = 5.0
    """Multiplies rewards in the critics' targets; the entropy bonus has weight 1."""
    target_rate: Annotated[float, Interval(gt=0, le=1)] = 0.005
    """Of the target value network, each gradient step towards the value network."""
    learning_rate: Positive = 3e-4
    """Adam's, for all networks."""
    final_lr_fraction: Share = 1.0
    """The learning rate falls along a cosine to this share of its start by the end of the run (PEARL: 1)."""
    width: Count = 300
    """Units in the three hidden layers of policy, critics and value."""
    encoder_width: Count = 200
    """Units in the three hidden layers of the encoder."""
    exploration_episodes: Count = 2
    """At a test task, episodes with z from the prior, before the posterior is first used."""
    eval_episodes: Count = 3
    """Episodes at a test task in all; the last one is scored."""
    eval_repeats: Count = 1
    """Times that each test task is met anew in an evaluation."""
    eval_every: Count = 100_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 500_000
    """Environment steps between checkpoints; the beginning and the end always have one."""


def settle(config: Config, family: TaskFamily) -> Config:
    """The settings with every default filled in, and steps rounded up to whole episodes."""
    in_episodes = lambda steps: math.ceil(steps / config.episode_length) * config.episode_length
    phases = ("initial_steps", "prior_steps", "posterior_steps", "extra_steps")
    oracle = config.context == "oracle"
    return dataclasses.replace(
        run.settle_tasks(config, family),
        window=max(1, int(0.32 * config.episode_length)) if config.window is None else config.window,
        latent_size=family.oracle_size if oracle else config.latent_size,
        contrastive=config.contrastive and not oracle,
        **{phase: in_episodes(getattr(config, phase)) for phase in phases},
    )


def check(config: Config, family: TaskFamily) -> None:
    """UserError, in one line, if settings (that are settled) cannot work together."""
    run.need(
        config.context == "oracle" or config.exploration_episodes < config.eval_episodes,
        f"exploration_episodes is {config.exploration_episodes}; it lies in 1 to eval_episodes - 1 "
        f"({config.eval_episodes - 1})",
    )
    run.need(
        not config.contrastive or 1 <= config.window <= config.episode_length,
        f"window is {config.window}; it lies in 1 to episode_length ({config.episode_length}), the longest trajectory",
    )
    run.need(
        not config.contrastive or config.num_trajectories >= 2,
        f"num_trajectories is {config.num_trajectories}; a trajectory is told from others, so it is at least 2",
    )
    for name in ("num_train_tasks", "meta_batch"):
        run.need(
            not config.contrastive or config.negatives == "all" or getattr(config, name) >= 2,
            f"{name} is {getattr(config, name)}; --negatives=other_tasks needs at least 2",
        )
    tasks, rows = config.num_train_tasks, rows_of_a_task(config)
    needed = max(config.initial_steps, math.ceil(config.tasks_per_iteration / tasks) * visit_steps(config))
    run.need(
        rows >= needed,
        f"replay_size is {config.replay_size}, {rows} rows for each of {tasks} train tasks; "
        f"each needs {needed}: make it {tasks * needed} or more, or take fewer tasks",
    )
    first = tasks * config.initial_steps
    run.need(
        config.total_env_steps > first,
        f"total_env_steps is {config.total_env_steps}; it must exceed the first {first} (train tasks x initial_steps, "
        "in whole episodes)",
    )


def rows_of_a_task(config: Config) -> int:
    """What the replay holds of each task."""
    return config.replay_size // config.num_train_tasks


def visit_steps(config: Config) -> int:
    """Environment steps of one visit to a task."""
    return config.prior_steps + config.posterior_steps + config.extra_steps


def total_updates(config: Config) -> int:
    """Gradient steps in the whole run."""
    steps = config.total_env_steps - config.num_train_tasks * config.initial_steps
    iterations = math.ceil(steps / (config.tasks_per_iteration * visit_steps(config)))
    return iterations * config.updates_per_iteration


# ---- networks -----------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What the critics' loss trains, the embedding included."""

    encoder: MLP | None
    """Transition -> mean and raw variance of its factor; None for the oracle."""
    critics: MLP  # two, every leaf with a leading axis
    """Q(s, a, z)."""
    bilinear: Float[Array, "latent latent"] | None
    """Of the bilinear similarity."""


class Agent(NamedTuple):
    """All networks."""

    model: Model
    actor: MLP
    """(s, z) -> mean and log-std of the action."""
    value: MLP
    """V(s, z)."""
    target_value: MLP
    key_encoder: MLP | None


def make_agent(config: Config, family: TaskFamily, key: Key[Array, ""]) -> Agent:
    encoder_key, critic_key, actor_key, value_key = jax.random.split(key, 4)
    state, action, latent = family.observation_size, family.action_size, config.latent_size
    context_row = state + action + 1 + (state if config.next_observation_in_context else 0)
    encoder = None
    if config.context == "encoder":
        encoder = MLP(context_row, config.encoder_width, 2 * latent, 3e-3, encoder_key)
    critic = lambda key: MLP(state + action + latent, config.width, 1, 3e-3, key)
    value = MLP(state + latent, config.width, 1, 3e-3, value_key)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # a donated carry may not name one buffer twice
    return Agent(
        model=Model(
            encoder=encoder,
            critics=eqx.filter_vmap(critic)(jax.random.split(critic_key)),
            bilinear=jnp.eye(latent) if config.contrastive and config.similarity == "bilinear" else None,
        ),
        actor=MLP(state + latent, config.width, 2 * action, 1e-3, actor_key),
        value=value,
        target_value=copy(value),
        key_encoder=copy(encoder) if config.contrastive else None,
    )


def policy(
    agent: Agent, observation: Float[Array, "batch observation"], z: Float[Array, "batch latent"]
) -> SquashedGaussian:
    """pi(. | s, z)."""
    output = jax.vmap(agent.actor)(jnp.concatenate([observation, z], axis=-1))
    mean, log_std = jnp.split(output, 2, axis=-1)
    return SquashedGaussian(mean, jnp.clip(log_std, -20, 2))


def q_values(critics: MLP, *parts: Float[Array, "batch _"]) -> Float[Array, "2 batch"]:
    """Both critics' values of states, actions and z."""
    inputs = jnp.concatenate(parts, axis=-1)
    return jax.vmap(lambda critic: jax.vmap(critic)(inputs)[:, 0])(critics)


def values(value: MLP, *parts: Float[Array, "batch _"]) -> Float[Array, " batch"]:
    return jax.vmap(value)(jnp.concatenate(parts, axis=-1))[:, 0]


# ---- the posterior ------------------------------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """Independent normal distributions."""

    mean: Float[Array, "*batch latent"]
    variance: Float[Array, "*batch latent"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch latent"]:
        return self.mean + jnp.sqrt(self.variance) * jax.random.normal(key, self.mean.shape)


def prior(batch: int, latent: int) -> Gaussian:
    return Gaussian(jnp.zeros((batch, latent)), jnp.ones((batch, latent)))


def product(factors: Gaussian, valid: Bool[Array, "*batch rows"]) -> Gaussian:
    """The normalised product of the valid factors along the axis before the last; at least one is valid.

    1 / V = sum_i 1 / v_i and M = V sum_i m_i / v_i (PEARL, section 4.1).
    """
    precision = valid[..., None] / factors.variance
    variance = 1 / precision.sum(axis=-2)
    return Gaussian(variance * jnp.sum(precision * factors.mean, axis=-2), variance)


def embed(
    encoder: MLP, context: Float[Array, "tasks rows row"], valid: Bool[Array, "tasks rows"] | None = None
) -> Gaussian:
    """q(z | context) of each task."""
    mean, raw = jnp.split(jax.vmap(jax.vmap(encoder))(context), 2, axis=-1)
    valid = jnp.ones(context.shape[:-1], bool) if valid is None else valid
    return product(Gaussian(mean, jnp.maximum(jax.nn.softplus(raw), 1e-7)), valid)


def kl_from_prior(posterior: Gaussian) -> Float[Array, "*batch"]:
    """KL(N(M, V) || N(0, 1)), summed over dimensions."""
    mean, variance = posterior
    return 0.5 * jnp.sum(variance + mean**2 - 1 - jnp.log(variance), axis=-1)


# ---- losses -------------------------------------------------------------------------------------------------------

TINY_VARIANCE = 1e-3
"""Added to the mean variance that differences of means are divided by: products of many factors are narrow."""


def similarity(
    queries: Gaussian, keys: Gaussian, kind: str, bilinear: Float[Array, "latent latent"] | None
) -> Float[Array, "queries keys"]:
    """Entry (i, j) belongs to query i and key j.

    mahalanobis (thesis, eq. 4.2): -d' S^-1 d, where d is the difference of the means and S the mean of the variances;
    bhattacharyya: -(d' S^-1 d / 8 + ln(det S / sqrt(det V_q det V_k)) / 2);
    wasserstein: -(|d|^2 + |sqrt V_q - sqrt V_k|^2);  bilinear: M_q' W M_k.
    """
    if kind == "bilinear":
        return queries.mean @ bilinear @ keys.mean.T
    (query_mean, query_variance), (key_mean, key_variance) = (x[:, None] for x in queries), keys
    squared = (query_mean - key_mean) ** 2
    if kind == "wasserstein":
        return -jnp.sum(squared + (jnp.sqrt(query_variance) - jnp.sqrt(key_variance)) ** 2, axis=-1)
    variance = (query_variance + key_variance) / 2
    distance = jnp.sum(squared / (variance + TINY_VARIANCE), axis=-1)
    if kind == "mahalanobis":
        return -distance
    log_ratio = jnp.log(variance) - 0.5 * (jnp.log(query_variance) + jnp.log(key_variance))
    return -(distance / 8 + 0.5 * jnp.sum(log_ratio, axis=-1))


def info_nce(
    logits: Float[Array, "batch batch"], excluded: Bool[Array, "batch batch"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """mean_i -log softmax_j(l_ij) at j = i (thesis, eq. 4.3), and the share of queries whose own key is nearest.

    Excluded pairs are no negatives; those on the diagonal never are.
    """
    own = jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(excluded & ~own, -jnp.inf, logits)
    log_probs = jnp.diag(jax.nn.log_softmax(logits))
    return -jnp.mean(log_probs), jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))


class Crops(NamedTuple):
    """Two windows of each of some trajectories."""

    rows: Float[Array, "2 trajectories window row"]
    """Of the query, and of the key, as the encoder sees them."""
    valid: Bool[Array, "trajectories window"]
    task: Int[Array, " trajectories"]
    episode: Int[Array, " trajectories"]
    """Of the task's episodes, which."""


class Batch(NamedTuple):
    """Data for one gradient step; flattened rows are those of the tasks in turn."""

    task: Int[Array, " tasks"]
    transitions: "Transition"  # (tasks, batch, ...)
    context: Float[Array, "tasks rows row"]
    crops: Crops | None


def contrastive_loss(model: Model, key_encoder: MLP, crops: Crops, config: Config) -> tuple[Float[Array, ""], dict]:
    """CoCOA's part of the encoder's loss: InfoNCE of queries and keys, and the queries' mean divergence from the
    prior, which the thesis adds because embeddings would drift apart without bound."""
    queries = embed(model.encoder, crops.rows[0], crops.valid)
    keys = jax.lax.stop_gradient(embed(key_encoder, crops.rows[1], crops.valid))
    logits = similarity(queries, keys, config.similarity, model.bilinear) / config.temperature
    same_task = crops.task[:, None] == crops.task
    same_episode = same_task & (crops.episode[:, None] == crops.episode)
    loss, accuracy = info_nce(logits, same_task if config.negatives == "other_tasks" else same_episode)
    divergence = kl_from_prior(queries).mean()
    info = {
        "train/contrastive_loss": loss,
        "train/contrastive_accuracy": accuracy,
        "train/query_kl": divergence,
        "train/logit_range": logits.max() - logits.min(),
    }
    return config.contrastive_weight * loss + config.contrastive_kl_weight * divergence, info


def model_loss(
    model: Model, agent: Agent, oracle: Float[Array, "tasks oracle"], batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], tuple]:
    """The critics' squared errors (thesis, eq. 3.6), which reach the encoder through z; the information bottleneck
    (eq. 3.7); the contrast (eq. 4.3).

    Only `model` gets gradients. Returns z of every row too.
    """
    info, extra = {}, 0.0
    z = oracle
    if config.context == "encoder":
        posterior = embed(model.encoder, batch.context)
        z = posterior.sample(key)
        kl = kl_from_prior(posterior)
        extra = config.kl_weight * kl.sum()
        info |= {
            "train/kl": kl.mean(),
            "train/latent_mean": jnp.abs(posterior.mean).mean(),
            "train/latent_variance": posterior.variance.mean(),
        }
    if config.contrastive:
        loss, more = contrastive_loss(model, agent.key_encoder, batch.crops, config)
        extra, info = extra + loss, info | more
    data = jax.tree.map(flatten, batch.transitions)
    z = jnp.repeat(z, batch.transitions.reward.shape[1], axis=0)
    next_value = values(agent.target_value, data.next_observation, jax.lax.stop_gradient(z))
    target = config.reward_scale * data.training_reward + (1 - data.terminated) * config.discount * next_value
    q = q_values(model.critics, data.observation, data.action, z)
    critic_loss = jnp.sum(jnp.mean((q - jax.lax.stop_gradient(target)) ** 2, axis=1))
    info = {"train/critic_loss": critic_loss, "train/q": q.mean(), **info}
    return critic_loss + extra, (z, info)


def actor_loss(
    actor: MLP,
    agent: Agent,
    observation: Float[Array, "batch observation"],
    z: Float[Array, "batch latent"],
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], tuple]:
    """mean(log pi(a | s, z) - min Q(s, a, z)), and small penalties of the pre-tanh mean and of the log-std.

    Returns min Q - log pi of each row too, which the value learns.
    """
    distribution = policy(agent._replace(actor=actor), observation, z)
    action, log_prob = distribution.sample_and_log_prob(key)
    soft_value = q_values(agent.model.critics, observation, action, z).min(axis=0) - log_prob
    penalty = 1e-3 * jnp.mean(distribution.mean**2) + 1e-3 * jnp.mean(distribution.log_std**2)
    info = {"train/actor_loss": -soft_value.mean(), "train/entropy": -log_prob.mean()}
    return penalty - soft_value.mean(), (jax.lax.stop_gradient(soft_value), info)


def value_loss(
    value: MLP,
    observation: Float[Array, "batch observation"],
    z: Float[Array, "batch latent"],
    soft_value: Float[Array, " batch"],
) -> Float[Array, ""]:
    """mean (V(s, z) - (min Q - log pi))^2."""
    return jnp.mean((values(value, observation, z) - soft_value) ** 2)


def flatten(x: Float[Array, "a b ..."]) -> Float[Array, "a*b ..."]:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


# ---- state --------------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step in a task, in the replay."""

    observation: Float[Array, "*batch observation"]
    action: Float[Array, "*batch action"]
    reward: Float[Array, "*batch"]
    """In the context and in scores."""
    training_reward: Float[Array, "*batch"]
    """In the critics' targets."""
    next_observation: Float[Array, "*batch observation"]
    terminated: Float[Array, "*batch"]
    """1 where the environment ended the episode, which a time limit does not."""


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    optimizers: dict[str, optax.OptState]
    """Of the agent's parts that gradients train."""
    replay: buffer.TaskReplay
    train_tasks: Float[Array, "train_tasks task"]
    test_tasks: Float[Array, "test_tasks task"]
    env_steps: Int[Array, ""]
    gradient_steps: Int[Array, ""]
    broken: Int[Array, ""]
    """Steps in which the simulator failed."""
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, total_updates(config), config.final_lr_fraction)
    )


def init(config: Config, family: TaskFamily, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, task_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, family, agent_key)
    train_tasks, test_tasks = family.tasks(task_key, config.num_train_tasks, config.num_test_tasks)
    observation, scalar = jnp.zeros(family.observation_size), jnp.zeros(())
    transition = Transition(observation, jnp.zeros(family.action_size), scalar, scalar, observation, scalar)
    return TrainState(
        agent=agent,
        optimizers={part: make_optimizer(config).init(getattr(agent, part)) for part in ("model", "actor", "value")},
        replay=buffer.init_tasks(transition, len(train_tasks), rows_of_a_task(config)),
        train_tasks=jnp.copy(train_tasks),
        test_tasks=jnp.copy(test_tasks),
        env_steps=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- collection ---------------------------------------------------------------------------------------------------


def context_row(config: Config, transition: Transition) -> Float[Array, "*batch row"]:
    """What the encoder sees of a step."""
    parts = [transition.observation, transition.action, config.context_reward_scale * transition.reward[..., None]]
    return jnp.concatenate(parts + [transition.next_observation] * config.next_observation_in_context, axis=-1)


def reset(family: TaskFamily, tasks: Float[Array, "batch task"], key: Key[Array, ""]) -> TaskState:
    """A start in each task."""
    state = jax.vmap(family.reset)(jax.random.split(key, len(tasks)))
    return jax.vmap(family.with_task)(state, tasks)


def unroll(
    config: Config,
    family: TaskFamily,
    agent: Agent,
    posterior: Gaussian,
    tasks: Float[Array, "batch task"],
    key: Key[Array, ""],
) -> tuple[Transition, Bool[Array, "batch time"], Int[Array, ""]]:
    """`episode_length` steps from fresh starts with sampled actions, which of them ended an episode, and how many the
    simulator failed in.

    z is sampled at the start of each episode. An episode that ends early is followed by another.
    """
    oracle = jax.vmap(family.oracle)(tasks)
    sample_z = lambda key: oracle if config.context == "oracle" else posterior.sample(key)
    start_key, z_key, key = jax.random.split(key, 3)

    def step(carry, key):
        state, z = carry
        action_key, start_key, z_key = jax.random.split(key, 3)
        action, _ = policy(agent, state.observation, z).sample_and_log_prob(action_key)
        after, broken = intact(state, jax.vmap(family.step)(state, action))
        ended = after.terminated
        transition = Transition(
            observation=state.observation,
            action=action,
            reward=after.reward,
            training_reward=jax.vmap(family.training_reward)(after),
            next_observation=after.observation,
            terminated=ended.astype(jnp.float32),
        )
        restart = lambda: (reset(family, tasks, start_key), sample_z(z_key))
        # a start may be as dear as a step, so it is skipped while no episode ends
        fresh = jax.lax.cond(ended.any(), restart, lambda: (after, z))
        return select(ended, fresh, (after, z)), (transition, ended, broken)

    start = reset(family, tasks, start_key), sample_z(z_key)
    _, steps = jax.lax.scan(step, start, jax.random.split(key, config.episode_length))
    transitions, ended, broken = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)
    # where the simulator failed, the row before is stored once more, or the first one
    row = jax.lax.cummax(jnp.where(broken, 0, jnp.arange(config.episode_length)), axis=1)
    row = jnp.maximum(row, jnp.argmin(broken, axis=1)[:, None])
    take = jax.vmap(lambda x, row: x[row])
    return jax.tree.map(lambda x: take(x, row), transitions), ended, broken.sum()


def gather_data(
    config: Config, family: TaskFamily, state: TrainState, visits: Int[Array, " visits"], phase: str, steps: int
) -> TrainState:
    """One phase of data collection in the visited train tasks."""

    def episode(replay, key):
        context_key, unroll_key = jax.random.split(key)
        belief = prior(len(visits), config.latent_size)
        if phase != "prior" and config.context == "encoder":
            recent = buffer.sample_context(replay, visits, context_key, config.context_size)
            belief = embed(state.agent.model.encoder, context_row(config, recent))
        data, last, broken = unroll(config, family, state.agent, belief, state.train_tasks[visits], unroll_key)
        return buffer.add_to_tasks(replay, visits, data, last, context=phase != "extra"), broken

    key, phase_key = jax.random.split(state.key)
    keys = jax.random.split(phase_key, steps // config.episode_length)
    replay, broken = jax.lax.scan(episode, state.replay, keys)
    env_steps, broken = state.env_steps + len(visits) * steps, state.broken + broken.sum()
    return state._replace(replay=replay, key=key, env_steps=env_steps, broken=broken)


def fill(config: Config, family: TaskFamily, state: TrainState) -> TrainState:
    """The first data of every train task."""
    everywhere = jnp.arange(len(state.train_tasks))
    return gather_data(config, family, state, everywhere, "prior", config.initial_steps)


def collect(config: Config, family: TaskFamily, state: TrainState) -> TrainState:
    """The data of one iteration: visits to a few train tasks."""
    key, visit_key = jax.random.split(state.key)
    number = len(state.train_tasks)
    rounds = math.ceil(config.tasks_per_iteration / number)
    orders = jax.vmap(lambda key: jax.random.permutation(key, number))(jax.random.split(visit_key, rounds))
    visits = orders.reshape(-1)[: config.tasks_per_iteration]
    state = state._replace(replay=buffer.forget_context(state.replay, visits), key=key)
    for phase in ("prior", "posterior", "extra"):
        steps = getattr(config, f"{phase}_steps")
        if steps:
            state = gather_data(config, family, state, visits, phase, steps)
    return state


# ---- training -----------------------------------------------------------------------------------------------------


def sample(config: Config, state: TrainState, key: Key[Array, ""]) -> Batch:
    """Tasks, and for each transitions from all of its data, context and crops from its recent data."""
    task_key, row_key, context_key, crop_key = jax.random.split(key, 4)
    task = jax.random.randint(task_key, (config.meta_batch,), 0, len(state.train_tasks))
    data = buffer.sample_rows(state.replay, task, row_key, config.batch_size)
    context = context_row(config, buffer.sample_context(state.replay, task, context_key, config.context_size))
    if not config.contrastive:
        return Batch(task, data, context, None)
    crop_task = jnp.repeat(task, math.ceil(config.num_trajectories / config.meta_batch))
    crops, valid, episode = buffer.sample_crops(state.replay, crop_task, crop_key, config.window)
    return Batch(task, data, context, Crops(context_row(config, crops), valid, crop_task, episode))


def update(config: Config, family: TaskFamily, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step: critics and encoder, then actor and value with the new critics."""
    batch_key, z_key, action_key = jax.random.split(key, 3)
    agent, optimizers = state.agent, dict(state.optimizers)
    batch = sample(config, state, batch_key)
    oracle = jax.vmap(family.oracle)(state.train_tasks[batch.task])

    def descend(part, gradient):
        updates, optimizers[part] = make_optimizer(config).update(gradient, optimizers[part])
        return optax.apply_updates(getattr(agent, part), updates)

    gradient, (z, info) = jax.grad(model_loss, has_aux=True)(agent.model, agent, oracle, batch, z_key, config)
    agent = agent._replace(model=descend("model", gradient))

    observation = flatten(batch.transitions.observation)
    actor_gradient = jax.grad(actor_loss, has_aux=True)
    gradient, (soft_value, actor_info) = actor_gradient(agent.actor, agent, observation, z, action_key)
    agent = agent._replace(actor=descend("actor", gradient))

    loss, gradient = jax.value_and_grad(value_loss)(agent.value, observation, z, soft_value)
    agent = agent._replace(value=descend("value", gradient))

    follow = lambda rate, old, new: jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, old, new)
    agent = agent._replace(target_value=follow(config.target_rate, agent.target_value, agent.value))
    if config.contrastive:
        agent = agent._replace(key_encoder=follow(1 - config.momentum, agent.key_encoder, agent.model.encoder))
    state = state._replace(agent=agent, optimizers=optimizers, gradient_steps=state.gradient_steps + 1)
    return state, info | actor_info | {"train/value_loss": loss}


def learn(config: Config, family: TaskFamily, state: TrainState) -> tuple[TrainState, dict]:
    """The gradient steps of one iteration; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_iteration)
    state, metrics = jax.lax.scan(partial(update, config, family), state._replace(key=key), keys)
    return state, metrics | {"train/broken_steps": state.broken}


# ---- evaluation ---------------------------------------------------------------------------------------------------

SCORES = run.Scores(
    "return on test tasks",
    {
        "eval/return_adapted": "adapted",
        "eval/return_prior": "before adaptation",
        "eval/return_oracle": "told the task",
    },
)


def play(config: Config, family: TaskFamily, agent: Agent, z: Float[Array, "batch latent"], start: TaskState, record):
    """One episode from each start with mean actions. Returns record(before, action, after) of each step, time first."""

    def step(state, _):
        action = policy(agent, state.observation, z).mode()
        after, _ = intact(state, jax.vmap(family.step)(state, action))
        # a robot that fell stays as it was
        return select(state.terminated, state, after), record(state, action, after)

    return jax.lax.scan(step, start, None, length=config.episode_length)[1]


def outcome(family: TaskFamily, before: TaskState, after: TaskState) -> tuple:
    """The reward of a step, and whether the task is solved then, where the family has that notion, else None."""
    return jnp.where(before.terminated, 0, after.reward), family.solved(after) if family.solved else None


def adapt(
    config: Config, family: TaskFamily, agent: Agent, tasks: Float[Array, "batch task"], key: Key[Array, ""]
) -> tuple[Float[Array, "episodes batch"], Gaussian, Bool[Array, "episodes batch"] | None]:
    """Meets each task anew: returns of the episodes in turn, the posterior that the last one acted on, and in which
    episodes the task was solved.

    z is drawn from the prior in the first `exploration_episodes`, then from the posterior given all steps so far.
    """
    batch, time = len(tasks), config.episode_length

    def observe(before, action, after):
        ended, reward = after.terminated.astype(jnp.float32), after.reward
        transition = Transition(before.observation, action, reward, reward, after.observation, ended)
        return context_row(config, transition), ~before.terminated, outcome(family, before, after)

    def episode(carry, i):
        context, valid = carry
        start_key, z_key = jax.random.split(jax.random.fold_in(key, i))
        belief = jax.lax.cond(
            i < config.exploration_episodes,
            lambda: prior(batch, config.latent_size),
            lambda: embed(agent.model.encoder, context, valid),
        )
        start = reset(family, tasks, start_key)
        seen, counts, (rewards, solved) = play(config, family, agent, belief.sample(z_key), start, observe)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(0, 1), i * time, axis=1)
        solved = solved.any(axis=0) if family.solved else None
        return (put(context, seen), put(valid, counts)), (rewards.sum(axis=0), belief, solved)

    rows = batch, config.eval_episodes * time
    width = agent.model.encoder.layers[0].weight.shape[-1]
    empty = jnp.zeros((*rows, width)), jnp.zeros(rows, bool)
    _, (returns, beliefs, solved) = jax.lax.scan(episode, empty, jnp.arange(config.eval_episodes))
    return returns, jax.tree.map(lambda x: x[-1], beliefs), solved


def evaluate(
    config: Config, family: TaskFamily, agent: Agent, test_tasks: Float[Array, "tasks task"], key: Key[Array, ""]
) -> dict:
    """Returns on the test tasks, each met `eval_repeats` times, and the share of episodes that solved them."""
    key, _ = jax.random.split(key)
    tasks = jnp.tile(test_tasks, (config.eval_repeats, 1))
    if config.context == "oracle":
        score = lambda before, _, after: outcome(family, before, after)
        z, start = jax.vmap(family.oracle)(tasks), reset(family, tasks, key)
        rewards, solved = play(config, family, agent, z, start, score)
        success = {"eval/success_oracle": solved.any(axis=0).mean()} if family.solved else {}
        return {"eval/return_oracle": rewards.sum(axis=0).mean()} | success
    returns, _, solved = adapt(config, family, agent, tasks, key)
    success = {"eval/success_adapted": solved[-1].mean()} if family.solved else {}
    return {"eval/return_prior": returns[0].mean(), "eval/return_adapted": returns[-1].mean()} | success


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    given = run.configure(Config, RECIPES, __doc__, argv)
    family = run.make_env(given.env, TaskFamily, given.env_options)
    config = settle(given, family)
    check(config, family)
    with run.Run(given, "cocoa", RECIPES, SCORES, worlds=[family]) as log:
        train(config, family, log)


def train(config: Config, family: TaskFamily, log: run.Run) -> None:
    """Gathers the first data or resumes, then collects and learns in turns, then draws."""
    begin = log.over_seeds(partial(init, config, family))
    shapes = jax.eval_shape(begin, log.seeds)
    what = "CoCOA: PEARL with the contrastive loss" if config.contrastive else "PEARL"
    what = "SAC that is told the task" if config.context == "oracle" else what
    tasks = f"{config.num_train_tasks} train tasks, {config.num_test_tasks} test tasks, by {family.simulator}"
    log.describe(what, tasks, agent=shapes.agent[:3])
    state = log.restore(shapes)
    collect_chunk = log.compile("collect", partial(collect, config, family), shapes, donate=family.in_jax)
    learn_chunk = log.compile("learn", partial(learn, config, family), shapes, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, family), shapes.agent, shapes.test_tasks, log.seeds)
    if state is None:
        state = log.compile("fill", partial(fill, config, family), shapes, donate=True)(begin(log.seeds))
    while log.going(state):
        state, metrics = learn_chunk(collect_chunk(state))
        if log.evaluates(state):
            metrics |= score(state.agent, state.test_tasks, log.evaluation_keys(state))
        log.end_chunk(state, metrics)
    draw(config, family, *run.one_seed((state.agent, state.test_tasks)), log)


FILM_TASKS = 6
EMBEDDINGS = 100


def draw(config: Config, family: TaskFamily, agent: Agent, tasks: Float[Array, "tasks task"], log: run.Run) -> None:
    """All figures of a finished run, with the first seed's agent and test tasks."""
    log.draw("learning curve", pictures.draw_curve, log.folder, SCORES, bottom=None)
    log.progress.show("adapting to the test tasks")
    adapt_key, z_key, start_key = jax.random.split(run.evaluation_key(jax.random.key(config.seed)), 3)
    z = oracle = jax.vmap(family.oracle)(tasks)
    if config.context == "encoder":
        repeats = max(1, EMBEDDINGS // len(tasks)) if family.in_jax else 1  # each world holds some 30 MB
        _, posterior, _ = jax.jit(partial(adapt, config, family))(agent, jnp.tile(tasks, (repeats, 1)), adapt_key)
        shown = posterior.mean, np.tile(oracle, (repeats, 1)), config.env, log.folder / "embedding.png"
        log.draw("embedding", pictures.draw_embedding, *shown)
        z = posterior.sample(z_key)[: len(tasks)]
    log.draw("adapted agent", film, config, family, agent, z, tasks, start_key, str(log.folder / "rollout"))


def film(config, family: TaskFamily, agent: Agent, z, tasks, key, stem: str) -> str:
    """Draws an episode in each of the first tasks, with mean actions: the path."""
    before = lambda state, *_: state
    record = lambda z, tasks: play(config, family, agent, z, reset(family, tasks, key), before)
    states = jax.jit(record)(z[:FILM_TASKS], tasks[:FILM_TASKS])
    return family.render(jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), states), stem)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, TaskFamily, Agent]:
    """Settings, task family and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    family = run.make_env(config.env, TaskFamily, config.env_options)
    config = settle(config, family)
    return config, family, run.load_agent(partial(make_agent, config, family), folder, config, seed)


if __name__ == "__main__":
    main()
