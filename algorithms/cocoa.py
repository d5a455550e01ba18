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
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

import envs
from envs import State, TaskFamily
from shared import replay as buffer
from shared import run
from shared.networks import Dense, SquashedGaussian, all_finite, count_parameters

# ---- config -------------------------------------------------------------------------------------------------------

ONE_WAY = dict(meta_batch=4, context_size=256, eval_repeats=4)
RECIPES = {
    "*point_goal": dict(
        total_env_steps=60_000,
        episode_length=20,
        initial_steps=200,
        tasks_per_iteration=16,
        prior_steps=40,
        posterior_steps=80,
        extra_steps=0,
        updates_per_iteration=500,
        batch_size=32,
        context_size=40,
        temperature=100.0,
        latent_size=8,
        discount=0.9,
        reward_scale=20.0,
        target_rate=0.02,
        learning_rate=2e-3,
        final_lr_fraction=0.05,
        width=64,
        encoder_width=128,
        replay_size=80_000,
        exploration_episodes=4,
        eval_episodes=8,
        eval_repeats=5,
        eval_every=10_000,
        checkpoint_every=20_000,
    ),
    "sparse_point_goal": dict(exploration_episodes=5, eval_episodes=20),
    "half_cheetah_dir": dict(
        total_env_steps=5_004_000, initial_steps=2000, prior_steps=1000, extra_steps=1000, **ONE_WAY
    ),
    "half_cheetah_vel": dict(total_env_steps=2_700_000, context_size=100),
    "ant_dir": dict(total_env_steps=2_504_000, updates_per_iteration=4000, **ONE_WAY),
    "ant_goal": dict(
        total_env_steps=2_800_000,
        meta_batch=10,
        updates_per_iteration=4000,
        context_size=256,
        kl_weight=1.0,
        contrastive_kl_weight=1.0,
    ),
    "humanoid_dir": dict(total_env_steps=2_700_000, updates_per_iteration=4000, context_size=256),
    "walker_params": dict(
        total_env_steps=2_580_000,
        meta_batch=10,
        updates_per_iteration=4000,
        context_size=100,
        next_observation_in_context=True,
        eval_repeats=2,
    ),
}
"""Settings for environments whose name matches a pattern; a flag overrides each."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are PEARL's, and the thesis' where it gives a value; the others are ours (algorithms/cocoa.md)."""

    env: str = "point_goal"
    """Task family to meta-train on: one of envs.FAMILIES."""
    env_options: str = ""
    """Options of the family (envs/README.md), e.g. 'forward_backward=false'."""
    seed: int = 0
    """First seed."""
    num_seeds: int = 1
    """Number of seeds (seed, seed + 1, ...), trained side by side in one program."""
    total_env_steps: int = 2_500_000
    """Environment steps of a seed, without evaluations; rounded up to whole iterations."""
    episode_length: int = 200
    """Time limit of an episode, in environment steps."""
    num_train_tasks: int | None = None
    """Tasks to train on; by default the family's published number."""
    num_test_tasks: int | None = None
    """Held-out tasks to test on; by default the family's published number."""
    initial_steps: int = 2000
    """Steps in each train task before the first gradient step, z from the prior; rounded up to whole episodes, as are
    the next three."""
    tasks_per_iteration: int = 5
    """Visits to train tasks in an iteration, side by side; no task has two before all have one."""
    prior_steps: int = 400
    """Steps of a visit with z from the prior; they replace the task's context."""
    posterior_steps: int = 0
    """Steps of a visit with z from the posterior that join the context."""
    extra_steps: int = 600
    """Steps of a visit with z from the posterior that are not for context."""
    updates_per_iteration: int = 2000
    """Gradient steps in an iteration."""
    meta_batch: int = 16
    """Tasks in a gradient step, drawn with replacement."""
    batch_size: int = 256
    """Transitions of each task in a gradient step, from all of its data."""
    replay_size: int = 5_000_000
    """Rows kept, over all train tasks together."""
    context: Literal["encoder", "oracle"] = "encoder"
    """What z is: a sample of the encoder's posterior; or the task itself, told, and then there is no encoder."""
    context_size: int = 64
    """Transitions of a task's recent data that z is inferred from in training."""
    next_observation_in_context: bool = False
    """Transitions in the context include the next observation."""
    contrastive: bool = True
    """CoCOA's loss on the encoder. Without, this is PEARL, and the next eight flags have no effect."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss."""
    contrastive_kl_weight: float = 0.1
    """Weight of the mean divergence of the query crops' posteriors from the prior."""
    similarity: Literal["mahalanobis", "bhattacharyya", "bilinear", "wasserstein"] = "mahalanobis"
    """Of two embeddings: the thesis' form, the whole Bhattacharyya distance, a learned product of means, or the
    2-Wasserstein distance."""
    temperature: float = 1.0
    """Divides the similarities; what suits one form does not suit another."""
    num_trajectories: int = 16
    """Trajectories in a contrastive batch, rounded up to as many for each task of the meta-batch."""
    window: int | None = None
    """Steps in a crop; by default 0.32 of episode_length. The thesis gives no value."""
    momentum: float = 0.995
    """Of the key encoder, which follows the encoder: 0 is the encoder itself. The thesis gives no value."""
    negatives: Literal["all", "other_tasks"] = "all"
    """Keys that a query is told from: those of all other trajectories, or only those of other tasks."""
    latent_size: int = 5
    """Length of z."""
    kl_weight: float = 0.1
    """Weight of the information bottleneck, summed over the tasks of a meta-batch."""
    discount: float = 0.99
    """Discount of future rewards, in [0, 1)."""
    reward_scale: float = 5.0
    """Multiplies rewards in the critics' targets; the entropy bonus has weight 1."""
    target_rate: float = 0.005
    """Of the target value network, each gradient step towards the value network."""
    learning_rate: float = 3e-4
    """Adam's, for all networks."""
    final_lr_fraction: float = 1.0
    """The learning rate falls along a cosine to this share of its start by the end of the run, in [0, 1] (PEARL: 1)."""
    width: int = 300
    """Units in the three hidden layers of policy, critics and value."""
    encoder_width: int = 200
    """Units in the three hidden layers of the encoder."""
    exploration_episodes: int = 2
    """At a test task, episodes with z from the prior, before the posterior is first used."""
    eval_episodes: int = 3
    """Episodes at a test task in all; the last one is scored."""
    eval_repeats: int = 1
    """Times that each test task is met anew in an evaluation."""
    eval_every: int = 100_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: int = 500_000
    """Environment steps between checkpoints; the beginning and the end always have one."""
    probe: bool = False
    """At each evaluation, also read the task from the embedding by a linear map fitted on train tasks (no effect with
    the oracle)."""
    matmul_precision: Literal["default", "float32", "tensorfloat32", "bfloat16"] = "default"
    """JAX's precision of float32 matrix products; default is float32 on a CPU, and may be less on a GPU."""
    run_dir: str = ""
    """Run folder; by default runs/cocoa/ENV/SEED-TIME."""
    resume: str = ""
    """Run folder to go on with; its settings are in force."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder (pip install -e '.[tensorboard]')."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install -e '.[wandb]')."""


def check(config: Config, family: TaskFamily) -> None:
    """UserError, in one line, if a setting cannot work."""

    def need(fine, message):
        if not fine:
            raise run.UserError(message)

    counts = "num_seeds episode_length initial_steps tasks_per_iteration prior_steps updates_per_iteration meta_batch"
    counts += " batch_size context_size latent_size width encoder_width eval_repeats eval_every checkpoint_every"
    for name in counts.split():
        need(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}; it is at least 1")
    weights = "posterior_steps extra_steps contrastive_weight contrastive_kl_weight kl_weight"
    for name in weights.split():
        need(getattr(config, name) >= 0, f"{name} is {getattr(config, name)}; it is at least 0")
    for name in ("temperature", "reward_scale", "learning_rate"):
        need(getattr(config, name) > 0, f"{name} is {getattr(config, name)}; it is above 0")
    for name in ("discount", "momentum"):
        need(0 <= getattr(config, name) < 1, f"{name} is {getattr(config, name)}; it lies in [0, 1)")
    need(0 <= config.final_lr_fraction <= 1, f"final_lr_fraction is {config.final_lr_fraction}; it lies in [0, 1]")
    need(0 < config.target_rate <= 1, f"target_rate is {config.target_rate}; it lies in (0, 1]")
    need(
        config.context == "oracle" or 1 <= config.exploration_episodes < config.eval_episodes,
        f"exploration_episodes is {config.exploration_episodes}; it lies in 1 to eval_episodes - 1 "
        f"({config.eval_episodes - 1})",
    )
    need(
        not contrasts(config) or 1 <= window(config) <= config.episode_length,
        f"window is {window(config)}; it lies in 1 to episode_length ({config.episode_length}), the longest trajectory",
    )
    need(
        not contrasts(config) or config.num_trajectories >= 2,
        f"num_trajectories is {config.num_trajectories}; a trajectory is told from others, so it is at least 2",
    )
    for name, number in zip(("num_train_tasks", "num_test_tasks"), num_tasks(config, family)):
        need(number >= 1, f"{name} is {number}; it is at least 1")
    try:
        jax.eval_shape(lambda: family.tasks(jax.random.key(0), *num_tasks(config, family)))
    except ValueError as error:
        raise run.UserError(str(error)) from None
    train_tasks = num_tasks(config, family)[0]
    for name, number in (("num_train_tasks", train_tasks), ("meta_batch", config.meta_batch)):
        need(
            not contrasts(config) or config.negatives == "all" or number >= 2,
            f"{name} is {number}; --negatives=other_tasks needs at least 2",
        )
    needed = max(initial_steps(config), most_in_an_iteration(config, family))
    need(
        capacity(config, family) >= needed,
        f"replay_size is {config.replay_size}, {capacity(config, family)} rows for each of {train_tasks} train tasks; "
        f"each needs {needed}: make it {train_tasks * needed} or more, or take fewer tasks",
    )
    first = first_steps(config, family)
    need(
        config.total_env_steps > first,
        f"total_env_steps is {config.total_env_steps}; it must exceed the first {first} (train tasks x initial_steps, "
        "in whole episodes)",
    )


def window(config: Config) -> int:
    return max(1, int(0.32 * config.episode_length)) if config.window is None else config.window


def num_tasks(config: Config, family: TaskFamily) -> tuple[int, int]:
    """Train and test tasks."""
    given = lambda number, default: default if number is None else number
    train = given(config.num_train_tasks, family.num_train_tasks)
    return train, given(config.num_test_tasks, family.num_test_tasks)


def capacity(config: Config, family: TaskFamily) -> int:
    """Rows that the replay holds of each task."""
    return config.replay_size // num_tasks(config, family)[0]


def episodes(config: Config, steps: int) -> int:
    """Time limits that fill so many steps."""
    return math.ceil(steps / config.episode_length)


def initial_steps(config: Config) -> int:
    return episodes(config, config.initial_steps) * config.episode_length


def first_steps(config: Config, family: TaskFamily) -> int:
    """Environment steps before the first iteration."""
    return num_tasks(config, family)[0] * initial_steps(config)


def iterations(config: Config, family: TaskFamily) -> int:
    """Iterations in the whole run."""
    steps = config.total_env_steps - first_steps(config, family)
    return math.ceil(steps / (config.tasks_per_iteration * visit_steps(config)))


def visit_steps(config: Config) -> int:
    """Environment steps of one visit to a task."""
    phases = config.prior_steps, config.posterior_steps, config.extra_steps
    return sum(episodes(config, steps) for steps in phases) * config.episode_length


def most_in_an_iteration(config: Config, family: TaskFamily) -> int:
    """Rows that an iteration adds to a task at most."""
    return math.ceil(config.tasks_per_iteration / num_tasks(config, family)[0]) * visit_steps(config)


# ---- networks -----------------------------------------------------------------------------------------------------


class MLP(eqx.Module):
    """Three hidden layers with ReLU, with rlkit's initial weights.

    Hidden weights are uniform in +-1/sqrt(width), width being the layer's own rather than its input's, and biases 0.1;
    the last layer's are all uniform in +-final.
    """

    layers: tuple[Dense, ...]

    def __init__(self, in_size: int, width: int, out_size: int, final: float, key: Key[Array, ""]):
        *keys, bias_key = jax.random.split(key, 5)
        sizes = [in_size, width, width, width, out_size]
        limits = [1 / math.sqrt(width)] * 3 + [final]
        biases = [jnp.full(width, 0.1)] * 3 + [jax.random.uniform(bias_key, (out_size,), minval=-final, maxval=final)]
        layers = []
        for i, (layer_key, limit, bias) in enumerate(zip(keys, limits, biases)):
            layer = Dense(sizes[i], sizes[i + 1], layer_key)
            weight = layer.weight * limit * math.sqrt(sizes[i])  # from +-1/sqrt(in_size)
            layers.append(eqx.tree_at(lambda x: (x.weight, x.bias), layer, (weight, bias)))
        self.layers = tuple(layers)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


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
    policy: MLP
    """(s, z) -> mean and log-std."""
    value: MLP
    """V(s, z)."""
    target_value: MLP
    key_encoder: MLP | None


def latent_size(config: Config, family: TaskFamily) -> int:
    return family.oracle_size if config.context == "oracle" else config.latent_size


def contrasts(config: Config) -> bool:
    return config.contrastive and config.context == "encoder"


def make_agent(config: Config, family: TaskFamily, key: Key[Array, ""]) -> Agent:
    encoder_key, critic_key, policy_key, value_key = jax.random.split(key, 4)
    state, action, latent = family.observation_size, family.action_size, latent_size(config, family)
    transition = state + action + 1 + (state if config.next_observation_in_context else 0)
    encoder = None
    if config.context == "encoder":
        encoder = MLP(transition, config.encoder_width, 2 * latent, 3e-3, encoder_key)
    critic = lambda key: MLP(state + action + latent, config.width, 1, 3e-3, key)
    value = MLP(state + latent, config.width, 1, 3e-3, value_key)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # a donated carry may not name one buffer twice
    return Agent(
        model=Model(
            encoder=encoder,
            critics=eqx.filter_vmap(critic)(jax.random.split(critic_key)),
            bilinear=jnp.eye(latent) if contrasts(config) and config.similarity == "bilinear" else None,
        ),
        policy=MLP(state + latent, config.width, 2 * action, 1e-3, policy_key),
        value=value,
        target_value=copy(value),
        key_encoder=copy(encoder) if contrasts(config) else None,
    )


def act(
    policy: MLP, observation: Float[Array, "batch observation"], z: Float[Array, "batch latent"]
) -> SquashedGaussian:
    """pi(. | s, z), batched."""
    mean, log_std = jnp.split(jax.vmap(policy)(jnp.concatenate([observation, z], axis=-1)), 2, axis=-1)
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
    encoder: MLP, context: Float[Array, "tasks rows transition"], valid: Bool[Array, "tasks rows"] | None = None
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
    query: Gaussian, key: Gaussian, kind: str, bilinear: Float[Array, "latent latent"] | None
) -> Float[Array, "queries keys"]:
    """Entry (i, j) belongs to query i and key j.

    mahalanobis (thesis, eq. 4.2): -d' S^-1 d, where d is the difference of the means and S the mean of the variances;
    bhattacharyya: -(d' S^-1 d / 8 + ln(det S / sqrt(det V_q det V_k)) / 2);
    wasserstein: -(|d|^2 + |sqrt V_q - sqrt V_k|^2);  bilinear: M_q' W M_k.
    """
    if kind == "bilinear":
        return query.mean @ bilinear @ key.mean.T
    (query_mean, query_variance), (key_mean, key_variance) = (x[:, None] for x in query), key
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

    rows: Float[Array, "2 trajectories window transition"]
    """Query and key."""
    valid: Bool[Array, "trajectories window"]
    task: Int[Array, " trajectories"]
    episode: Int[Array, " trajectories"]
    """Of the task's episodes, which."""


class Batch(NamedTuple):
    """Data for one gradient step; flattened rows are those of the tasks in turn."""

    task: Int[Array, " tasks"]
    rows: "Row"  # (tasks, batch, ...)
    context: Float[Array, "tasks rows transition"]
    crops: Crops | None


def contrastive_loss(model: Model, key_encoder: MLP, crops: Crops, config: Config) -> tuple[Float[Array, ""], dict]:
    """CoCOA's part of the encoder's loss: InfoNCE of queries and keys, and the queries' mean divergence from the
    prior, which the thesis adds because embeddings would drift apart without bound."""
    query = embed(model.encoder, crops.rows[0], crops.valid)
    key = jax.lax.stop_gradient(embed(key_encoder, crops.rows[1], crops.valid))
    logits = similarity(query, key, config.similarity, model.bilinear) / config.temperature
    same_task = crops.task[:, None] == crops.task
    same_episode = same_task & (crops.episode[:, None] == crops.episode)
    loss, accuracy = info_nce(logits, same_task if config.negatives == "other_tasks" else same_episode)
    divergence = kl_from_prior(query).mean()
    info = {
        "train/contrastive_loss": loss,
        "train/contrastive_accuracy": accuracy,
        "train/query_kl": divergence,
        "train/logit_range": logits.max() - logits.min(),
    }
    return config.contrastive_weight * loss + config.contrastive_kl_weight * divergence, info


def model_loss(
    model: Model, agent: Agent, told: Float[Array, "tasks oracle"], batch: Batch, key: Key[Array, ""], config: Config
) -> tuple[Float[Array, ""], tuple]:
    """The critics' squared errors (thesis, eq. 3.6), which reach the encoder through z; the information bottleneck
    (eq. 3.7); the contrast (eq. 4.3).

    Only `model` gets gradients. Returns z of every row too.
    """
    info, extra = {}, 0.0
    z = told
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
    if contrasts(config):
        loss, more = contrastive_loss(model, agent.key_encoder, batch.crops, config)
        extra, info = extra + loss, info | more
    rows = jax.tree.map(flatten, batch.rows)
    z = jnp.repeat(z, batch.rows.reward.shape[1], axis=0)
    next_value = values(agent.target_value, rows.next_observation, jax.lax.stop_gradient(z))
    target = config.reward_scale * rows.training_reward + (1 - rows.terminated) * config.discount * next_value
    q = q_values(model.critics, rows.observation, rows.action, z)
    critic_loss = jnp.sum(jnp.mean((q - jax.lax.stop_gradient(target)) ** 2, axis=1))
    info = {"train/critic_loss": critic_loss, "train/q": q.mean(), **info}
    return critic_loss + extra, (z, info)


def policy_loss(
    policy: MLP,
    critics: MLP,
    observation: Float[Array, "batch observation"],
    z: Float[Array, "batch latent"],
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], tuple]:
    """mean(log pi(a | s, z) - min Q(s, a, z)), and small penalties of the pre-tanh mean and of the log-std.

    Returns min Q - log pi of each row too, which the value learns.
    """
    distribution = act(policy, observation, z)
    action, log_prob = distribution.sample_and_log_prob(key)
    soft_value = q_values(critics, observation, action, z).min(axis=0) - log_prob
    penalty = 1e-3 * jnp.mean(distribution.mean**2) + 1e-3 * jnp.mean(distribution.log_std**2)
    info = {"train/policy_loss": -soft_value.mean(), "train/entropy": -log_prob.mean()}
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


class Row(NamedTuple):
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
    model_optimizer: optax.OptState
    policy_optimizer: optax.OptState
    value_optimizer: optax.OptState
    replay: buffer.TaskReplay
    train_tasks: Float[Array, "train_tasks task"]
    test_tasks: Float[Array, "test_tasks task"]
    iterations: Int[Array, ""]
    key: Key[Array, ""]


def adam(config: Config, family: TaskFamily) -> optax.GradientTransformation:
    updates = iterations(config, family) * config.updates_per_iteration
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, updates, config.final_lr_fraction))


def init(config: Config, family: TaskFamily, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, task_key, key, _ = jax.random.split(key, 4)  # the fourth is evaluation_key's
    agent = make_agent(config, family, agent_key)
    train_tasks, test_tasks = family.tasks(task_key, *num_tasks(config, family))
    observation, scalar = jnp.zeros(family.observation_size), jnp.zeros(())
    row = Row(observation, jnp.zeros(family.action_size), scalar, scalar, observation, scalar)
    return TrainState(
        agent=agent,
        model_optimizer=adam(config, family).init(agent.model),
        policy_optimizer=adam(config, family).init(agent.policy),
        value_optimizer=adam(config, family).init(agent.value),
        replay=buffer.init_tasks(row, len(train_tasks), capacity(config, family)),
        train_tasks=jnp.copy(train_tasks),
        test_tasks=jnp.copy(test_tasks),
        iterations=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- collection ---------------------------------------------------------------------------------------------------


def transition(config: Config, row: Row) -> Float[Array, "*batch transition"]:
    """What the encoder sees of a step."""
    parts = [row.observation, row.action, row.reward[..., None]]
    return jnp.concatenate(parts + [row.next_observation] * config.next_observation_in_context, axis=-1)


def begin(family: TaskFamily, tasks: Float[Array, "batch task"], key: Key[Array, ""]) -> State:
    """A start in each task."""
    state = jax.vmap(family.reset)(jax.random.split(key, len(tasks)))
    return jax.vmap(family.with_goal)(state, tasks)


def where(condition: Bool[Array, " batch"], new, old):
    """`new` in the entries of the leading axis where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def unroll(
    config: Config,
    family: TaskFamily,
    policy: MLP,
    belief: Gaussian,
    told: Float[Array, "batch oracle"],
    tasks: Float[Array, "batch task"],
    key: Key[Array, ""],
) -> tuple[Row, Bool[Array, "batch time"]]:
    """`episode_length` steps from fresh starts with sampled actions, and which of them ended an episode.

    z is drawn from the belief at the start of each episode. An episode that ends early is followed by another.
    """
    draw = lambda key: told if config.context == "oracle" else belief.sample(key)
    start_key, z_key, key = jax.random.split(key, 3)

    def step(carry, key):
        state, z = carry
        action_key, start_key, z_key = jax.random.split(key, 3)
        action, _ = act(policy, state.observation, z).sample_and_log_prob(action_key)
        after = jax.vmap(family.step)(state, action)
        rewards = after.reward, jax.vmap(family.training_reward)(after)
        ended = after.terminated
        row = Row(state.observation, action, *rewards, after.observation, ended.astype(jnp.float32))
        restart = lambda: (begin(family, tasks, start_key), draw(z_key))
        # a start may be as dear as a step, so it is skipped while no episode ends
        fresh = jax.lax.cond(ended.any(), restart, lambda: (after, z))
        return where(ended, fresh, (after, z)), (row, ended)

    start = begin(family, tasks, start_key), draw(z_key)
    _, steps = jax.lax.scan(step, start, jax.random.split(key, config.episode_length))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), steps)


def gather_data(
    config: Config, family: TaskFamily, state: TrainState, visits: Int[Array, " visits"], phase: str, steps: int
) -> TrainState:
    """One phase of data collection in the visited train tasks."""
    latent = latent_size(config, family)
    tasks = state.train_tasks[visits]
    told = jax.vmap(family.oracle)(tasks)

    def episode(replay, key):
        context_key, unroll_key = jax.random.split(key)
        belief = prior(len(visits), latent)
        if phase != "prior" and config.context == "encoder":
            rows = buffer.sample_context(replay, visits, context_key, config.context_size)
            belief = embed(state.agent.model.encoder, transition(config, rows))
        rows, last = unroll(config, family, state.agent.policy, belief, told, tasks, unroll_key)
        return buffer.add_to_tasks(replay, visits, rows, last, context=phase != "extra"), None

    key, phase_key = jax.random.split(state.key)
    keys = jax.random.split(phase_key, episodes(config, steps))
    replay, _ = jax.lax.scan(episode, state.replay, keys)
    return state._replace(replay=replay, key=key)


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
    """Tasks, and for each rows from all of its data, context and crops from its recent data."""
    task_key, row_key, context_key, crop_key = jax.random.split(key, 4)
    task = jax.random.randint(task_key, (config.meta_batch,), 0, len(state.train_tasks))
    rows = buffer.sample_rows(state.replay, task, row_key, config.batch_size)
    context = transition(config, buffer.sample_context(state.replay, task, context_key, config.context_size))
    if not contrasts(config):
        return Batch(task, rows, context, None)
    crop_task = jnp.repeat(task, math.ceil(config.num_trajectories / config.meta_batch))
    crop_rows, valid, episode = buffer.sample_crops(state.replay, crop_task, crop_key, window(config))
    return Batch(task, rows, context, Crops(transition(config, crop_rows), valid, crop_task, episode))


def update(config: Config, family: TaskFamily, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step: critics and encoder, then policy and value with the new critics."""
    batch_key, z_key, action_key = jax.random.split(key, 3)
    batch = sample(config, state, batch_key)
    told = jax.vmap(family.oracle)(state.train_tasks[batch.task])
    agent = state.agent

    def descend(parameters, gradient, optimizer):
        updates, optimizer = adam(config, family).update(gradient, optimizer)
        return optax.apply_updates(parameters, updates), optimizer

    gradient, (z, info) = jax.grad(model_loss, has_aux=True)(agent.model, agent, told, batch, z_key, config)
    model, model_optimizer = descend(agent.model, gradient, state.model_optimizer)

    observation = flatten(batch.rows.observation)
    gradient, (soft_value, more) = jax.grad(policy_loss, has_aux=True)(
        agent.policy, model.critics, observation, z, action_key
    )
    policy, policy_optimizer = descend(agent.policy, gradient, state.policy_optimizer)

    loss, gradient = jax.value_and_grad(value_loss)(agent.value, observation, z, soft_value)
    value, value_optimizer = descend(agent.value, gradient, state.value_optimizer)

    follow = lambda rate, old, new: jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, old, new)
    agent = Agent(
        model=model,
        policy=policy,
        value=value,
        target_value=follow(config.target_rate, agent.target_value, value),
        key_encoder=follow(1 - config.momentum, agent.key_encoder, model.encoder) if contrasts(config) else None,
    )
    state = state._replace(
        agent=agent,
        model_optimizer=model_optimizer,
        policy_optimizer=policy_optimizer,
        value_optimizer=value_optimizer,
    )
    return state, {**info, **more, "train/value_loss": loss}


def learn(config: Config, family: TaskFamily, state: TrainState) -> tuple[TrainState, dict]:
    """The gradient steps of one iteration; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.updates_per_iteration)
    state = state._replace(key=key, iterations=state.iterations + 1)
    return jax.lax.scan(partial(update, config, family), state, keys)


# ---- evaluation ---------------------------------------------------------------------------------------------------


def evaluation_key(seed: Int[Array, ""]) -> Key[Array, ""]:
    """Evaluations draw from a key of their own, so that evaluating more or less often changes nothing else."""
    return jax.random.split(jax.random.key(seed), 4)[3]


def play(config: Config, family: TaskFamily, policy: MLP, z: Float[Array, "batch latent"], start: State, record):
    """One episode from each start with mean actions. Returns record(before, action, after) of each step, time first."""

    def step(state, _):
        action = act(policy, state.observation, z).mode()
        after = jax.vmap(family.step)(state, action)
        # a robot that fell stays as it was
        return where(state.terminated, state, after), record(state, action, after)

    return jax.lax.scan(step, start, None, length=config.episode_length)[1]


def adapt(
    config: Config, family: TaskFamily, agent: Agent, tasks: Float[Array, "batch task"], key: Key[Array, ""]
) -> tuple[Float[Array, "episodes batch"], Gaussian]:
    """Meets each task anew: returns of the episodes in turn, and the belief that the last one acted on.

    z is drawn from the prior in the first `exploration_episodes`, then from the posterior given all steps so far.
    """
    batch, time = len(tasks), config.episode_length

    def observe(before, action, after):
        shown = after.terminated.astype(jnp.float32)
        row = Row(before.observation, action, after.reward, after.reward, after.observation, shown)
        return transition(config, row), ~before.terminated, jnp.where(before.terminated, 0, after.reward)

    def episode(carry, i):
        context, valid = carry
        start_key, z_key = jax.random.split(jax.random.fold_in(key, i))
        belief = jax.lax.cond(
            i < config.exploration_episodes,
            lambda: prior(batch, config.latent_size),
            lambda: embed(agent.model.encoder, context, valid),
        )
        start = begin(family, tasks, start_key)
        seen, counts, rewards = play(config, family, agent.policy, belief.sample(z_key), start, observe)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(0, 1), i * time, axis=1)
        return (put(context, seen), put(valid, counts)), (rewards.sum(axis=0), belief)

    rows = batch, config.eval_episodes * time
    width = agent.model.encoder.layers[0].weight.shape[-1]
    empty = jnp.zeros((*rows, width)), jnp.zeros(rows, bool)
    _, (returns, beliefs) = jax.lax.scan(episode, empty, jnp.arange(config.eval_episodes))
    return returns, jax.tree.map(lambda x: x[-1], beliefs)


def evaluate(
    config: Config,
    family: TaskFamily,
    agent: Agent,
    train_tasks: Float[Array, "train_tasks task"],
    test_tasks: Float[Array, "test_tasks task"],
    key: Key[Array, ""],
) -> dict:
    """Returns on the test tasks, each met `eval_repeats` times."""
    test_key, train_key = jax.random.split(key)
    again = lambda tasks: jnp.tile(tasks, (config.eval_repeats, 1))
    tasks = again(test_tasks)
    if config.context == "oracle":
        start, z = begin(family, tasks, test_key), jax.vmap(family.oracle)(tasks)
        score = lambda before, _, after: jnp.where(before.terminated, 0, after.reward)
        return {"eval/return_oracle": play(config, family, agent.policy, z, start, score).sum(axis=0).mean()}
    returns, belief = adapt(config, family, agent, tasks, test_key)
    info = {"eval/return_prior": returns[0].mean(), "eval/return_adapted": returns[-1].mean()}
    if config.probe:
        _, known = adapt(config, family, agent, again(train_tasks), train_key)
        facts = [jax.vmap(family.oracle)(again(x)) for x in (train_tasks, test_tasks)]
        info["eval/probe_r2"] = probe(known.mean, facts[0], belief.mean, facts[1])
    return info


def probe(
    train_x: Float[Array, "train latent"],
    train_y: Float[Array, "train oracle"],
    test_x: Float[Array, "test latent"],
    test_y: Float[Array, "test oracle"],
) -> Float[Array, ""]:
    """R^2 on test tasks of a linear map from embeddings to tasks: ridge regression on standardised train embeddings."""
    centre, spread = train_x.mean(axis=0), train_x.std(axis=0) + 1e-6
    inputs = lambda x: jnp.concatenate([(x - centre) / spread, jnp.ones((len(x), 1))], axis=1)
    x = inputs(train_x)
    ridge = 1e-3 * len(x) * jnp.eye(x.shape[1])
    weights = jnp.linalg.solve(x.T @ x + ridge, x.T @ train_y)
    error = jnp.sum((inputs(test_x) @ weights - test_y) ** 2)
    return 1 - error / jnp.sum((test_y - test_y.mean(axis=0)) ** 2)


# ---- pictures -----------------------------------------------------------------------------------------------------

FILM_TASKS = 6
EMBEDDINGS = 100


def draw_embedding(belief: Gaussian, facts: Float[np.ndarray, "tasks oracle"], title: str, path) -> None:
    """Embeddings of tasks on their first two principal components, coloured by the task: of its numbers, by the two
    that are most nearly linear in the embedding."""
    from matplotlib import pyplot

    centred = np.asarray(belief.mean) - np.mean(belief.mean, axis=0)
    left, spread, components = np.linalg.svd(centred, full_matrices=False)
    x = centred @ components[:2].T
    x = np.pad(x, ((0, 0), (0, 2 - x.shape[1])))
    share = np.sum(spread[:2] ** 2) / np.sum(spread**2)
    if facts.shape[1] > 2:
        apart = facts - facts.mean(axis=0)
        explained = np.sum((left.T @ apart) ** 2, axis=0) / (np.sum(apart**2, axis=0) + 1e-9)
        facts = facts[:, np.argsort(-explained)[:2]]
    scaled = (facts - facts.min(axis=0)) / (np.ptp(facts, axis=0) + 1e-9)
    one, two = scaled[:, 0], scaled[:, -1]
    colours = pyplot.get_cmap("viridis")(one) if facts.shape[1] == 1 else np.stack([one, 0 * one + 0.2, two], axis=1)
    figure, (embeddings, tasks) = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    embeddings.scatter(*x.T, c=colours, s=25)
    embeddings.set(title=f"{title}: embeddings", xlabel=f"two components, {share:.0%} of the variance")
    tasks.scatter(facts[:, 0], facts[:, 1] if facts.shape[1] > 1 else 0 * facts[:, 0], c=colours, s=25)
    tasks.set(title="the tasks themselves")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw(config: Config, family: TaskFamily, state: TrainState, log: run.Run) -> None:
    """All figures of a finished run; of several seeds, the first one's agent."""
    if config.context == "oracle":
        curves = {"eval/return_oracle": "told the task"}
    else:
        curves = {"eval/return_adapted": "adapted", "eval/return_prior": "before adaptation"}
    log.print(f"learning curve  {run.plot_curve(log.folder, curves, 'return on test tasks', bottom=None)}")

    agent, tasks = jax.tree.map(lambda x: x[0], (state.agent, state.test_tasks))
    log.progress.show("drawing the agent")
    adapt_key, z_key, start_key = jax.random.split(evaluation_key(jnp.array(config.seed)), 3)
    facts = jax.vmap(family.oracle)(tasks)
    z = facts
    if config.context == "encoder":
        repeats = max(1, EMBEDDINGS // len(tasks))
        _, belief = jax.jit(partial(adapt, config, family))(agent, jnp.tile(tasks, (repeats, 1)), adapt_key)
        draw_embedding(belief, np.tile(facts, (repeats, 1)), config.env, log.folder / "embedding.png")
        log.print(f"embedding       {log.folder / 'embedding.png'}")
        z = belief.sample(z_key)[: len(tasks)]
    start = begin(family, tasks[:FILM_TASKS], start_key)
    film = jax.jit(lambda start, z: play(config, family, agent.policy, z, start, lambda before, *_: before))
    states = jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), film(start, z[:FILM_TASKS]))
    log.print(f"adapted agent   {family.render(states, str(log.folder / 'rollout'))}")


# ---- main ---------------------------------------------------------------------------------------------------------


def make_family(config: Config) -> TaskFamily:
    """The task family; UserError if the environment is none."""
    try:
        family = envs.make(config.env, **run.parse_options(config.env_options))
    except ValueError as error:
        raise run.UserError(str(error)) from None
    if not isinstance(family, TaskFamily):
        raise run.UserError(f"{config.env} is not a task family; take one of {', '.join(envs.FAMILIES)}")
    return family


def count(config: Config, family: TaskFamily, state: TrainState) -> dict[str, int]:
    """Steps of one seed so far."""
    done = int(state.iterations[0])
    return {
        "env_steps": first_steps(config, family) + done * config.tasks_per_iteration * visit_steps(config),
        "gradient_steps": done * config.updates_per_iteration,
    }


def check_finite(config: Config, before: int, metrics: dict[str, np.ndarray], state: TrainState) -> None:
    """UserError if a loss of a chunk, of shape (num_seeds, updates), or a parameter after it is NaN or infinite."""
    losses = metrics["train/critic_loss"]
    bad = np.argwhere(~np.isfinite(losses).T)  # by step, seed
    if not len(bad) and all_finite(state.agent):
        return
    what = f"a parameter is not finite after gradient step {before + losses.shape[1]}"
    if len(bad):
        step, seed = bad[0]
        value = losses[seed, step]
        what = f"train/critic_loss is {value} at gradient step {before + step + 1} of seed {config.seed + seed}"
    raise run.UserError(f"{what}; training stopped, the last good checkpoint is kept. Try a lower learning rate anew")


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, RECIPES, __doc__, argv)
    family = make_family(config)
    check(config, family)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    with run.Run(config, "cocoa") as log:
        train(config, family, log)


def describe(config: Config, family: TaskFamily, state: TrainState, log: run.Run) -> None:
    log.print(f"run folder {log.folder}")
    recipe = run.recipe_for(config.env, RECIPES)
    if recipe:
        log.print(f"recipe for {config.env}: " + " ".join(f"{k}={getattr(config, k)}" for k in recipe))
    what = "CoCOA: PEARL with the contrastive loss" if contrasts(config) else "PEARL"
    log.print("SAC that is told the task" if config.context == "oracle" else what)
    parameters = count_parameters((state.agent.model, state.agent.policy, state.agent.value)) // config.num_seeds
    train_tasks, test_tasks = num_tasks(config, family)
    log.print(f"{parameters:,} parameters; {train_tasks} train tasks, {test_tasks} test tasks")
    device = f"{run.device_name()}; matmul precision {config.matmul_precision}; {config.num_seeds} seed(s)"
    log.print(f"{config.env} by {family.simulator}; {device}")


def train(config: Config, family: TaskFamily, log: run.Run) -> None:
    """The run: set up or resume, then iterations with evaluations and checkpoints between them, then the figures."""
    seed_numbers = config.seed + jnp.arange(config.num_seeds)
    seeds = jax.vmap(jax.random.key)(seed_numbers)
    batched = partial(run.over_seeds, config.num_seeds)
    begin_run = jax.jit(batched(partial(init, config, family)))
    shapes = jax.eval_shape(begin_run, seeds)
    describe(config, family, shapes, log)
    compiled = lambda name, function: log.compile(
        name, jax.jit(batched(partial(function, config, family)), donate_argnums=0), shapes
    )
    collecting, learning = compiled("collect", collect), compiled("learn", learn)
    tasks = shapes.train_tasks, shapes.test_tasks
    score = log.compile("evaluate", jax.jit(batched(partial(evaluate, config, family))), shapes.agent, *tasks, seeds)
    columns = [*learning.out_info[1], *score.out_info]

    state, steps = log.restore(shapes) if log.resumed else (None, None)
    if state is None:
        filling = compiled("fill", fill)
        log.progress.show("first data of all train tasks")
        state = filling(begin_run(seeds))
        steps = count(config, family, state)
        log.save(state, steps)

    result = ""
    log.start_clock(steps["env_steps"])
    while steps["env_steps"] < config.total_env_steps and not log.stopping:
        before = steps
        state, info = learning(collecting(state))
        info = jax.tree.map(np.asarray, info)
        steps = count(config, family, state)
        check_finite(config, before["gradient_steps"], info, state)
        metrics = {name: entries.mean(axis=1) for name, entries in info.items()}
        if log.due(config.eval_every, before, steps):
            keys = jax.vmap(lambda seed, step: jax.random.fold_in(evaluation_key(seed), step), (0, None))(
                seed_numbers, steps["gradient_steps"]
            )
            metrics |= jax.tree.map(np.asarray, score(state.agent, state.train_tasks, state.test_tasks, keys))
            result = summary(metrics)
            log.print(f"env steps {steps['env_steps']:>9,}  {result}")
        log.log(steps, metrics, columns)
        log.show(steps["env_steps"], result)
        if log.due(config.checkpoint_every, before, steps):
            log.save(state, steps)

    if log.stopping:
        log.save(state, steps)
        log.stopped(f"at env step {steps['env_steps']:,}")
    draw(config, family, state, log)
    log.print(str(log.folder))


def summary(metrics: dict[str, np.ndarray]) -> str:
    """An evaluation in one line, means over seeds."""
    shown = {name.removeprefix("eval/").replace("_", " "): x for name, x in metrics.items() if name.startswith("eval/")}
    return "  ".join(f"{name} {x.mean():.4g}" for name, x in shown.items())


if __name__ == "__main__":
    main()
