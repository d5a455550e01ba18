"""PPO with achievement distillation, in one file.

Moon, Yeom, Park, Song, 'Discovering Hierarchical Achievements in Reinforcement Learning via Contrastive Learning'
(NeurIPS 2023, arXiv 2307.03486), on Crafter and Craftax-Classic.

PPO acts and learns as usual. Now and then an auxiliary phase distils into the encoder what its recent episodes show
about achievements: (1) from a state and an action, predict which achievement comes next, told from the prediction at
another step of the episode (intra-trajectory prediction); (2) make one achievement look alike in two episodes, paired
by partial optimal transport between their sequences (cross-trajectory matching). The policy is held where it was by a
KL penalty. The achievement unlocked last is the policy's memory. An achievement is represented by the change of the
latent state that unlocking it made; which one it is, or what there is to achieve, is never told.

    python algorithms/ppo_ad.py                                    a small world with six achievements (90 seconds)
    python algorithms/ppo_ad.py --distill=false                    plain PPO on it
    python algorithms/ppo_ad.py --env craftax_classic_pixels       the paper's networks and budget (for a GPU)
    python algorithms/ppo_ad.py --env crafter                      the original benchmark: pip install -e '.[crafter]'
    python algorithms/ppo_ad.py --resume runs/ppo_ad/...           go on with a run

The default environment has a recipe (RECIPES below): settings that learn it on two CPU cores. Everything else has the
paper's hyperparameters. Results, metrics and details: algorithms/ppo_ad.md.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Interval
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
from ott.geometry.geometry import Geometry

from envs import AchievementEnv, VectorEnv, VectorState
from shared import pictures, run
from shared.networks import Dense, ImpalaCNN, NormedMLP, VectorEncoder
from shared.run import Count, Fraction, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "minicraft": """
        --total_env_steps 240_000 --num_envs 16 --episode_length 100 --unroll_length 128 --num_minibatches 4
        --learning_rate 1e-3 --auxiliary_epochs 3 --dense_size 64 --latent_size 64
        --num_eval_envs 128 --eval_every 30_000 --checkpoint_every 60_000
    """,
}
"""Flags for environments whose name matches a pattern; a flag that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are the paper's, unless a field says otherwise."""

    env: str = "minicraft"
    """Environment: minicraft, craftax_classic_pixels, craftax_classic_symbolic, craftax_symbolic or crafter (paper)."""
    total_env_steps: Steps = 1_000_000
    """Environment steps of a seed; rounded up to whole rollouts. Episodes that end later do not count in the scores."""
    num_envs: Count = 8
    """Environments stepped in parallel, for each seed."""
    episode_length: Count = 10_000
    """Time limit of an episode, in environment steps, in training and evaluation."""
    unroll_length: Count = 512
    """Steps of each environment in one rollout."""
    discount: Fraction = 0.95
    """Discount of future rewards."""
    gae_lambda: Share = 0.65
    """Lambda of generalised advantage estimation."""
    bootstrap_time_limit: bool = False
    """At the time limit, continue the return with the value of the last state; as published, it ends all rewards."""
    update_epochs: Count = 3
    """Passes of PPO over a rollout."""
    num_minibatches: Count = 8
    """Minibatches, and so gradient steps, in a pass; they divide num_envs x unroll_length."""
    clip: Positive = 0.2
    """PPO's limit on the change of the probability ratio."""
    value_weight: Weight = 0.5
    """Weight of the value loss in PPO's loss."""
    entropy_weight: Weight = 0.01
    """Weight of the entropy bonus in PPO's loss."""
    learning_rate: Positive = 3e-4
    """Adam's, for each of the three losses."""
    max_gradient_norm: Positive = 0.5
    """A gradient whose norm over all parameters is larger is scaled down to this."""
    distill: bool = True
    """Memory and auxiliary phase. Without, this is PPO, and --prediction, --matching and --memory have no effect."""
    prediction: bool = True
    """Intra-trajectory achievement prediction in the auxiliary phase."""
    matching: bool = True
    """Cross-trajectory achievement matching in the auxiliary phase."""
    memory: bool = True
    """Policy, value and prediction also see the representation of the achievement unlocked last."""
    achievement: Literal["change", "after"] = "change"
    """What represents an achievement: the change of the latent state at it, as published, or the latent state after."""
    auxiliary_every: Count = 8
    """Rollouts between auxiliary phases; each phase learns from these."""
    auxiliary_epochs: Count = 6
    """Passes of matching and of prediction over the episodes in an auxiliary phase."""
    auxiliary_batch_size: Count = 512
    """Steps of an episode in one minibatch of prediction, at most; longer episodes are split."""
    temperature: Positive = 0.1
    """Divides the inner products in both contrastive losses."""
    num_targets: Count = 16
    """Episodes that each episode is matched with."""
    transport_epsilon: Positive = 0.05
    """Weight of the entropy in the transport problem, in units of the cost (1 - cosine)."""
    transport_iterations: Count = 200
    """Iterations of Sinkhorn's algorithm. The published solver, a slower one, makes 100."""
    match_threshold: Annotated[float, Interval(ge=0.5, lt=1), "so that matches are one to one"] = 0.5
    """Two achievements match if the transport plan moves more than this from one to the other."""
    policy_regulariser: Weight = 1.0
    """Weight, in the auxiliary losses, of the divergence from the policy at the start of the phase."""
    value_regulariser: Weight = 1.0
    """Weight, in the auxiliary losses, of the value's squared error."""
    variant: Literal["code", "paper"] = "code"
    """Where the published code and the text differ: regularisers and negatives of matching (page, deviations)."""
    channels: Count = 64
    """Channels of the image encoder's first stack; its other two have twice as many."""
    dense_size: Count = 256
    """Units of the encoder's dense layer (two such layers where observations are not images)."""
    latent_size: Count = 1024
    """Length of the latent state, of the memory, and hidden units of the prediction networks."""
    num_eval_envs: Count = 32
    """Evaluation episodes."""
    eval_every: Count = 100_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 200_000
    """Environment steps between checkpoints; the beginning and the end always have one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the encoder's products and convolutions; on a GPU the convolutions' results are rounded to it too."""


def check(config: Config) -> None:
    """UserError, in one line, if settings cannot work together."""
    steps = rollout_steps(config)
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    run.need(
        steps % config.num_minibatches == 0,
        f"num_minibatches is {config.num_minibatches}; it divides num_envs x unroll_length ({steps}), "
        f"as {min(divisors, key=lambda n: abs(n - config.num_minibatches))} does",
    )
    run.need(steps > 1, "num_envs x unroll_length is 1; advantages are standardised over at least 2 steps")
    run.need(
        not (config.distill and config.unroll_length * config.auxiliary_every < 3),
        "auxiliary_every x unroll_length is below 3 steps, in which no episode begins, unlocks something and ends",
    )


def rollout_steps(config: Config) -> int:
    """Environment steps of one seed in one rollout."""
    return config.num_envs * config.unroll_length


# ---- networks -----------------------------------------------------------------------------------------------------


class Agent(eqx.Module):
    """Everything that learns."""

    encoder: ImpalaCNN | VectorEncoder
    policy: Dense
    value: Dense
    film: NormedMLP | None  # action -> scale and shift of the latent state (FiLM)
    predictor: NormedMLP | None  # modulated latent state and memory -> the next achievement's representation


Vectors = Float[Array, "... latent"]
Scalar = Float[Array, ""]
Batch = Float[Array, " batch"]
Loss = tuple[Scalar, tuple]  # and what else comes of it: the normaliser, and metrics
Latents = Float[Array, "batch latent"]
Memories = Float[Array, "batch memory"]


def memory_size(config: Config) -> int:
    return config.latent_size if config.distill and config.memory else 0


def make_agent(config: Config, env: AchievementEnv, key: Key[Array, ""]) -> Agent:
    """The networks of section 3 and appendix, or PPO's only (without `distill`)."""
    encoder_key, policy_key, value_key, film_key, predictor_key = jax.random.split(key, 5)
    latent, features = config.latent_size, config.latent_size + memory_size(config)
    if len(env.observation_shape) == 3:
        channels = (config.channels, 2 * config.channels, 2 * config.channels)
        encoder = ImpalaCNN(env.observation_shape, channels, config.dense_size, latent, encoder_key, config.dtype)
    else:
        encoder = VectorEncoder(env.observation_size, config.dense_size, latent, encoder_key, config.dtype)

    def head(out_size, gain, key):
        layer = Dense(features, out_size, key)
        weight = jax.nn.initializers.orthogonal(gain)(key, layer.weight.shape)
        return eqx.tree_at(lambda layer: layer.weight, layer, weight)

    predicts = config.distill and config.prediction
    return Agent(
        encoder=encoder,
        policy=head(env.num_actions, 0.01, policy_key),
        value=head(1, 0.1, value_key),
        film=NormedMLP(env.num_actions, latent, 2 * latent, film_key) if predicts else None,
        predictor=NormedMLP(features, latent, latent, predictor_key) if predicts else None,
    )


def encode(agent: Agent, observation: Shaped[Array, "batch ..."]) -> Latents:
    """phi(o), non-negative; images in bytes are first scaled to [0, 1]."""
    if observation.dtype == jnp.uint8:
        observation = observation.astype(jnp.float32) / 255
    return jax.vmap(agent.encoder)(observation)


def act(agent: Agent, latent: Latents, memory: Memories) -> tuple[Float[Array, "batch actions"], Batch]:
    """log pi(. | o, m) and the value head's output, which is normalised: both linear in phi(o) and m."""
    features = jnp.concatenate([latent, memory], axis=-1)
    return jax.nn.log_softmax(jax.vmap(agent.policy)(features)), jax.vmap(agent.value)(features)[:, 0]


def predict(agent: Agent, latent: Latents, action: Int[Array, " batch"], memory: Memories) -> Latents:
    """psi(o, a, m): the predicted representation of the next achievement, a unit vector."""
    one_hot = jax.nn.one_hot(action, len(agent.policy.bias))
    scale, shift = jnp.split(jax.vmap(agent.film)(one_hot), 2, axis=-1)
    return unit(jax.vmap(agent.predictor)(jnp.concatenate([(1 + scale) * latent + shift, memory], axis=-1)))


def unit(x: Vectors) -> Vectors:
    """x / |x|; a zero vector stays zero, and gets no gradient."""
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    zero = squared < 1e-24
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.where(zero, 1, squared)))


def represent(config: Config, before: Vectors, after: Vectors) -> Vectors:
    """What stands for an achievement that was unlocked between two latent states, a unit vector."""
    return unit(after - before if config.achievement == "change" else after)


# ---- losses -------------------------------------------------------------------------------------------------------


class Normaliser(NamedTuple):
    """Exponential means of returns and squared returns, not yet divided by `weight` to correct their start at 0."""

    mean: Scalar
    square: Scalar
    weight: Scalar

    def update(self, returns: Batch, weight: Shaped[Array, " batch"]) -> "Normaliser":
        """Takes in a weighted minibatch with decay 0.99."""
        mix = lambda old, new: 0.99 * old + 0.01 * new
        mean, square = weighted_mean(returns, weight), weighted_mean(returns**2, weight)
        return Normaliser(mix(self.mean, mean), mix(self.square, square), mix(self.weight, 1.0))

    def moments(self) -> tuple[Scalar, Scalar]:
        """Mean and standard deviation of returns; the variance is at least 0.01."""
        weight = jnp.maximum(self.weight, 0.01)
        mean = self.mean / weight
        return mean, jnp.sqrt(jnp.maximum(self.square / weight - mean**2, 0.01))

    def normalise(self, returns: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        mean, deviation = self.moments()
        return (returns - mean) / deviation

    def denormalise(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        mean, deviation = self.moments()
        return mean + deviation * values


def weighted_mean(x: Float[Array, "*batch"], weight: Shaped[Array, "*batch"]) -> Scalar:
    """Mean with weights that are whole numbers, or booleans; 0 if all are 0."""
    return jnp.sum(weight * x) / jnp.maximum(jnp.sum(weight), 1)


def advantages(
    reward: Float[Array, "time envs"], value: Float[Array, "all envs"], done: Bool[Array, "time envs"], config: Config
) -> Float[Array, "time envs"]:
    """Generalised advantage estimation (Schulman et al. 2016): A_t = delta_t + discount lambda A_{t+1} within episodes,
    delta_t = r_t + discount v_{t+1} - v_t, without v_{t+1} and A_{t+1} where step t ended the episode."""

    def backward(later, step):
        reward, value, next_value, goes_on = step
        advantage = reward + goes_on * config.discount * (next_value + config.gae_lambda * later) - value
        return advantage, advantage

    steps = reward, value[:-1], value[1:], 1.0 - done
    return jax.lax.scan(backward, jnp.zeros_like(reward[0]), steps, reverse=True)[1]


class Step(NamedTuple):
    """What is stored of a step: in rollouts (time, envs, ...), minibatches (batch, ...), windows (envs, time, ...)."""

    observation: Shaped[Array, "..."]
    action: Int[Array, "*batch"]
    memory: Float[Array, "*batch memory"]  # as it was when the step was taken; it is not computed anew
    log_probs: Float[Array, "*batch actions"]  # by the policy that acted; in an auxiliary phase, by that at its start
    value: Float[Array, "*batch"]  # output of the value head, normalised, of the same agent
    reward: Float[Array, "*batch"]
    done: Bool[Array, "*batch"]  # the action ended the episode
    unlocked: Bool[Array, "*batch"]  # the action unlocked something, and the episode went on
    achievements: Bool[Array, "*batch achievements"]  # what the episode has unlocked, this step included
    episode_return: Float[Array, "*batch"]  # sum of rewards in the episode, this step included
    episode_steps: Int[Array, "*batch"]  # this one included
    advantage: Float[Array, "*batch"]  # standardised over the rollout; it and the returns are 0 until `learn`
    returns: Float[Array, "*batch"]


def no_steps(config: Config, env: AchievementEnv, *batch: int) -> Step:
    """Zeros, for the arrays of a batch."""
    zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((*batch, *shape), dtype)
    fields = dict.fromkeys(Step._fields, zeros()) | {
        "observation": zeros(*env.observation_shape, dtype=env.observation_dtype),
        "action": zeros(dtype=jnp.int32),
        "memory": zeros(memory_size(config)),
        "log_probs": zeros(env.num_actions),
        "achievements": zeros(len(env.achievement_names), dtype=bool),
        "episode_steps": zeros(dtype=jnp.int32),
    }
    return Step(**fields | dict.fromkeys(("done", "unlocked"), zeros(dtype=bool)))


def ppo_loss(agent: Agent, normaliser: Normaliser, steps: Step, config: Config) -> Loss:
    """Clipped surrogate (Schulman et al. 2017), value loss in normalised units, entropy bonus."""
    log_probs, value = act(agent, encode(agent, steps.observation), steps.memory)
    change = jnp.take_along_axis(log_probs - steps.log_probs, steps.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(change)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.mean(jnp.minimum(ratio * steps.advantage, clipped * steps.advantage))
    normaliser = normaliser.update(steps.returns, jnp.ones_like(steps.returns))
    value_loss = jnp.mean((value - normaliser.normalise(steps.returns)) ** 2)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
    loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
    info = {
        "train/loss": loss,
        "train/policy_loss": policy_loss,
        "train/value_loss": value_loss,
        "train/entropy": entropy,
        "train/kl": jnp.mean(ratio - 1 - change),
        "train/clipped": jnp.mean((jnp.abs(ratio - 1) > config.clip).astype(jnp.float32)),
    }
    return loss, (normaliser, info)


class Prediction(NamedTuple):
    """A minibatch of prediction: steps of an episode. All arrays are padded to one length."""

    rows: Int[Array, " rows"]  # each step once, as a position in the window
    weight: Int[Array, " rows"]  # how often it is a positive or a negative
    index: Int[Array, "4 rows"]  # entries of `rows`: positive, negative, before and after the next unlocking
    follows: Bool[Array, " rows"]  # whether there is one; if not, 'before' is the episode's last step
    valid: Bool[Array, " rows"]


class Matching(NamedTuple):
    """A minibatch of matching: the achievements of an episode and of others. The first two are padded to one length."""

    rows: Int[Array, " rows"]  # steps of the episode, each once, as positions in the window
    their_rows: Int[Array, " rows"]  # of the others
    own: Int[Array, "2 own"]  # entries of `rows`: before and after each achievement
    theirs: Int[Array, "2 targets theirs"]  # the same of `their_rows`
    counts: Int[Array, " episodes"]  # achievements of the episode, and of each other
    drawn: Int[Array, "targets own"]  # entries of `rows`: a random step for each match that there can be
    noise: Float[Array, "targets own theirs"]  # the largest number draws the negative


def regularisers(
    agent: Agent, normaliser: Normaliser, latent: Latents, steps: Step, weight: Shaped[Array, " batch"], config: Config
) -> Loss:
    """What keeps the policy where it was and fits the value, while the encoder changes under both."""
    log_probs, value = act(agent, latent, steps.memory)
    normaliser = normaliser.update(steps.returns, weight)
    if config.variant == "code":
        divergence = jnp.sum(jnp.exp(log_probs) * (log_probs - steps.log_probs), axis=1)
        value_error = (value - normaliser.normalise(steps.returns)) ** 2
    else:
        divergence = jnp.sum(jnp.exp(steps.log_probs) * (steps.log_probs - log_probs), axis=1)
        value_error = 0.5 * (value - steps.value) ** 2
    divergence, value_error = weighted_mean(divergence, weight), weighted_mean(value_error, weight)
    loss = config.policy_regulariser * divergence + config.value_regulariser * value_error
    return loss, (normaliser, {"policy_divergence": divergence, "value_error": value_error})


def contrast(
    anchor: Vectors, positive: Vectors, negative: Vectors, valid: Bool[Array, "*batch"], config: Config
) -> tuple[Scalar, dict]:
    """Mean of -log(e^p / (e^p + e^n)), p and n the inner products of the anchor with the positive and the negative over
    the temperature (eq. 3 and 5); accuracy is the share of anchors for which p > n."""
    margin = jnp.sum(anchor * (positive - negative), axis=-1) / config.temperature
    loss = weighted_mean(jax.nn.softplus(-margin), valid)
    accuracy = weighted_mean((margin > 0).astype(jnp.float32), valid)
    return loss, {"loss": loss, "accuracy": accuracy, "steps": valid.any().astype(jnp.float32)}


def prediction_loss(agent: Agent, normaliser: Normaliser, window: Step, batch: Prediction, config: Config) -> Loss:
    """Intra-trajectory prediction: the next achievement (anchor) is nearer to the prediction at a step before it than
    to that at another step of the episode."""
    steps = jax.tree.map(lambda x: x[batch.rows], window)
    latent = encode(agent, steps.observation)
    predicted = predict(agent, latent, steps.action, steps.memory)
    positive, negative, before, after = batch.index
    anchor = represent(config, latent[before], jnp.where(batch.follows[:, None], latent[after], 0))
    loss, info = contrast(jax.lax.stop_gradient(anchor), predicted[positive], predicted[negative], batch.valid, config)
    extra, (normaliser, more) = regularisers(agent, normaliser, latent, steps, batch.weight, config)
    return loss + extra, (normaliser, info | more)


def matching_loss(agent: Agent, normaliser: Normaliser, window: Step, batch: Matching, config: Config) -> Loss:
    """Cross-trajectory matching: an achievement of the episode (anchor) is nearer to the one it is matched with in
    another episode than to some achievement there. As many steps of the episode as there are matches regularise."""
    steps = jax.tree.map(lambda x: x[batch.rows], window)
    latent = encode(agent, steps.observation)
    own = represent(config, *latent[batch.own])
    theirs = encode(jax.lax.stop_gradient(agent), window.observation[batch.their_rows])
    theirs = represent(config, *theirs[batch.theirs])

    cost = 1 - jnp.einsum("ud,tvd->tuv", jax.lax.stop_gradient(own), theirs)
    plan = jax.vmap(partial(transport_plan, config), (0, None, 0))(cost, batch.counts[0], batch.counts[1:])
    matches = plan > config.match_threshold  # at most one in a row, and in a column
    free = jnp.arange(theirs.shape[1]) < batch.counts[1:, None]
    if config.variant == "paper":
        free &= ~matches.any(axis=1)
    negative = jnp.where(free[:, None], batch.noise, -1).argmax(axis=2)
    valid = matches.any(axis=2) & free.any(axis=1, keepdims=True)

    of = lambda index: jnp.take_along_axis(theirs, index[..., None], axis=1)
    loss, info = contrast(own[None], of(matches.argmax(axis=2)), of(negative), valid, config)
    weight = jnp.zeros(len(latent)).at[batch.drawn].add(valid)
    extra, (normaliser, more) = regularisers(agent, normaliser, latent, steps, weight, config)
    return loss + extra, (normaliser, info | more)


def transport_plan(
    config: Config, cost: Float[Array, "size size"], rows: Int[Array, ""], columns: Int[Array, ""]
) -> Float[Array, "size size"]:
    """The entropic partial transport plan between `rows` and `columns` points, padded to `size` (eq. 4):
    min <P, C> + epsilon sum P log P,  P >= 0, row sums <= 1, column sums <= 1, total mass min(rows, columns).

    By Sinkhorn's scalings. The longer side has sums of at most 1: there, the half-update of ott-jax is cut at 0, so
    that a point that receives less is not scaled up. The shorter one, of sums 1, comes last: so the mass is exact."""
    swap = rows > columns
    geometry = Geometry(cost_matrix=jnp.where(swap, cost.T, cost), epsilon=config.transport_epsilon)
    row, column = (jnp.arange(len(cost)) < count for count in (jnp.minimum(rows, columns), jnp.maximum(rows, columns)))
    log_mass = jnp.zeros(len(cost))

    def iterate(_, potentials):
        f, g = potentials
        g = geometry.update_potential(f, g, log_mass, axis=0)
        g = jnp.where(column, jnp.where(rows == columns, g, jnp.minimum(g, 0)), -jnp.inf)
        f = jnp.where(row, geometry.update_potential(f, g, log_mass, axis=1), -jnp.inf)
        return f, g

    start = jnp.where(row, 0.0, -jnp.inf), jnp.where(column, 0.0, -jnp.inf)
    f, g = jax.lax.fori_loop(0, config.transport_iterations, iterate, start)
    plan = jnp.exp((f[:, None] + g - geometry.cost_matrix) / config.transport_epsilon)
    return jnp.where(swap, plan.T, plan)


# ---- acting -------------------------------------------------------------------------------------------------------


class Acting(NamedTuple):
    """The environments, and what the agent carries from step to step in each."""

    envs: VectorState
    latent: Float[Array, "envs latent"]  # phi of the present observation
    memory: Float[Array, "envs memory"]  # the change of phi made by the episode's last unlocking, a unit vector; or 0
    episode_return: Float[Array, " envs"]  # sum of rewards in the episode so far
    key: Key[Array, ""]  # where the next rollout draws from


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    normaliser: Normaliser
    optimizers: dict[str, optax.OptState]  # Adam of each loss: 'ppo', 'matching', 'prediction'
    acting: Acting
    window: Step | None  # the last `auxiliary_every` rollouts, each environment's in order
    episodes: Int[Array, ""]  # training episodes that have ended so far, as the benchmark's score counts them
    successes: Int[Array, " achievements"]  # of these, those that unlocked each achievement
    env_steps: Int[Array, ""]
    ppo_steps: Int[Array, ""]  # gradient steps of PPO
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(config.learning_rate))


def start_acting(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""]) -> Acting:
    reset_key, key = jax.random.split(key)
    envs, n = vector.reset(reset_key), vector.num_envs
    return Acting(
        envs=envs,
        latent=encode(agent, envs.env.observation),
        memory=jnp.zeros((n, memory_size(config))),
        episode_return=jnp.zeros(n),
        key=key,
    )


def init(config: Config, vector: VectorEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent, normaliser = make_agent(config, vector.env, agent_key), Normaliser(*jnp.zeros(3))
    window = no_steps(config, vector.env, config.num_envs, config.auxiliary_every * config.unroll_length)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        agent=agent,
        normaliser=normaliser,
        optimizers={name: make_optimizer(config).init(agent) for name in ("ppo", *auxiliary_losses(config))},
        acting=start_acting(config, vector, agent, env_key),
        window=window if auxiliary_losses(config) else None,
        episodes=zero,
        successes=jnp.zeros(len(vector.env.achievement_names), jnp.int32),
        env_steps=zero,
        ppo_steps=zero,
        key=key,
    )


def recall(config: Config, acting: Acting, latent: Latents, changed: Bool[Array, " batch"]) -> Memories:
    """The memory after a step that led to this latent state: of the achievement, where the step unlocked one."""
    unlocked = represent(config, acting.latent, latent)[:, : acting.memory.shape[1]]  # no numbers, or all of them
    return jnp.where(changed[:, None], unlocked, acting.memory)


def step(
    config: Config, vector: VectorEnv, agent: Agent, normaliser: Normaliser, acting: Acting, key: Key[Array, ""]
) -> tuple[Acting, Step]:
    """Acts once in every environment, with actions drawn from the policy."""
    current = acting.envs
    log_probs, value = act(agent, acting.latent, acting.memory)
    action = jax.random.categorical(key, log_probs)
    envs, after, truncated = vector.step(current, action)
    done = after.terminated | truncated
    changed = jnp.any(after.achievements != current.env.achievements, axis=1)
    episode_return = acting.episode_return + after.reward

    reward = after.reward
    if config.bootstrap_time_limit:
        last = encode(agent, after.observation)
        last_value = normaliser.denormalise(act(agent, last, recall(config, acting, last, changed))[1])
        reward = reward + jnp.where(truncated, config.discount * last_value, 0)
    # where the simulator failed, nothing is better or worse than expected: the advantage is 0
    reward = jnp.where(envs.broken > current.broken, normaliser.denormalise(value), reward)
    taken = no_steps(config, vector.env, vector.num_envs)._replace(
        observation=current.env.observation,
        action=action,
        memory=acting.memory,
        log_probs=log_probs,
        value=value,
        reward=reward,
        done=done,
        unlocked=changed & ~done,
        achievements=after.achievements,
        episode_return=episode_return,
        episode_steps=current.steps + 1,
    )
    latent = encode(agent, envs.env.observation)
    acting = Acting(
        envs=envs,
        latent=latent,
        memory=jnp.where(done[:, None], 0, recall(config, acting, latent, changed)),
        episode_return=jnp.where(done, 0, episode_return),
        key=acting.key,
    )
    return acting, taken


def collect(config: Config, vector: VectorEnv, state: TrainState) -> tuple[Acting, Step]:
    """A rollout: `unroll_length` steps of every environment."""
    key, rollout_key = jax.random.split(state.acting.key)
    acting = state.acting._replace(latent=encode(state.agent, state.acting.envs.env.observation), key=key)
    keys = jax.random.split(rollout_key, config.unroll_length)
    return jax.lax.scan(partial(step, config, vector, state.agent, state.normaliser), acting, keys)


# ---- training -----------------------------------------------------------------------------------------------------


def learn(config: Config, state: TrainState, acting: Acting, steps: Step) -> tuple[TrainState, dict]:
    """PPO on a rollout that led to `acting`; the rollout joins the window of the next auxiliary phase."""
    last_value = act(state.agent, acting.latent, acting.memory)[1]
    value = state.normaliser.denormalise(jnp.concatenate([steps.value, last_value[None]]))
    advantage = advantages(steps.reward, value, steps.done, config)
    standard = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    standard = jnp.where(advantage == 0, 0, standard)  # where the simulator failed
    steps = steps._replace(advantage=standard, returns=advantage + value[:-1])

    def one_pass(carry, key):
        order = jax.random.permutation(key, rollout_steps(config)).reshape(config.num_minibatches, -1)
        take = lambda at: jax.tree.map(lambda x: x[at // config.num_envs, at % config.num_envs], steps)
        return jax.lax.scan(lambda carry, at: update(config, ppo_loss, carry, take(at)), carry, order)

    key, update_key = jax.random.split(state.key)
    carry = state.agent, state.normaliser, state.optimizers["ppo"]
    carry, info = jax.lax.scan(one_pass, carry, jax.random.split(update_key, config.update_epochs))
    agent, normaliser, optimizer = carry

    start = state.env_steps // config.num_envs % (config.auxiliary_every * config.unroll_length)
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(0, 1), start, axis=1)
    episodes, successes, scores = score_episodes(config, state, steps)
    state = state._replace(
        agent=agent,
        normaliser=normaliser,
        optimizers=state.optimizers | {"ppo": optimizer},
        acting=acting,
        window=jax.tree.map(put, state.window, steps) if state.window else None,
        episodes=episodes,
        successes=successes,
        env_steps=state.env_steps + rollout_steps(config),
        ppo_steps=state.ppo_steps + config.update_epochs * config.num_minibatches,
        key=key,
    )
    return state, jax.tree.map(jnp.mean, info) | scores | {"train/broken_steps": acting.envs.broken.sum()}


def update(config: Config, loss, carry: tuple, *batch) -> tuple[tuple, dict]:
    """One gradient step of a loss with its own Adam; none where nothing matches. The carry: agent, normaliser, Adam."""
    agent, normaliser, optimizer = carry
    gradient, (normaliser, info) = jax.grad(loss, has_aux=True)(agent, normaliser, *batch, config)
    updates, optimizer = make_optimizer(config).update(gradient, optimizer)
    after = optax.apply_updates(agent, updates), normaliser, optimizer
    return jax.tree.map(lambda new, old: jnp.where(info.get("steps", 1) > 0, new, old), after, carry), info


def score_episodes(config: Config, state: TrainState, steps: Step) -> tuple:
    """Counts the episodes that ended in a rollout, up to the step budget. Returns episodes and successes so far."""
    time = state.env_steps // config.num_envs + 1 + jnp.arange(config.unroll_length)
    ended = steps.done & (time * config.num_envs <= config.total_env_steps)[:, None]
    episodes = state.episodes + ended.sum(dtype=jnp.int32)
    successes = state.successes + jnp.sum(steps.achievements & ended[..., None], axis=(0, 1), dtype=jnp.int32)
    mean = lambda x: (jnp.sum(jnp.where(ended, x, 0.0)), ended.sum())
    info = {
        "train/return": mean(steps.episode_return),
        "train/episode_length": mean(steps.episode_steps),
        "train/episodes": episodes,
        "train/score": (AchievementEnv.score(successes / jnp.maximum(episodes, 1)), episodes > 0),
    }
    return episodes, successes, info


# ---- the auxiliary phase ------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """A whole episode in which something was unlocked, as positions in the flattened window."""

    start: int
    end: int
    count: int  # steps that unlocked something
    unlocks: Int[np.ndarray, " achievements"]  # these steps, in order; the last one is repeated


def find_episodes(window: Step) -> list[Episode]:
    """Cuts a window into episodes. Those that began before it or went on after it are left out."""
    episodes, (envs, time, most) = [], window.achievements.shape
    first, unlocked = np.asarray(window.episode_steps) == 1, np.asarray(window.unlocked)
    for env in range(envs):
        for start, end in itertools.pairwise(env * time + np.flatnonzero(first[env])):
            unlocks = start + np.flatnonzero(unlocked.flat[start:end])
            if len(unlocks):
                repeated = np.pad(unlocks, (0, most - len(unlocks)), mode="edge")
                episodes.append(Episode(start, end, len(unlocks), repeated))
    return episodes


def prediction_batches(
    config: Config, rng: np.random.Generator, episodes: list[Episode], i: int, size: int = 128
) -> Iterator[Prediction]:
    """The minibatches of episode i: its steps in random order, each with another one as negative."""
    start, end, count, unlocks = episodes[i]
    steps, others = (start + rng.permutation(end - start) for _ in range(2))
    ends = np.append(unlocks[:count], end - 1)
    for at in range(0, end - start, config.auxiliary_batch_size):
        positive, negative = (x[at : at + config.auxiliary_batch_size] for x in (steps, others))
        before = ends[np.searchsorted(ends, positive)]
        rows, index = np.unique([positive, negative, before, np.minimum(before + 1, end - 1)], return_inverse=True)
        weight = np.bincount(index[:2].ravel(), minlength=len(rows))
        arrays = rows, weight, index, before < end - 1, np.ones(len(positive), bool)
        yield Prediction(*pad(size, *arrays))


def matching_batches(
    config: Config, rng: np.random.Generator, episodes: list[Episode], i: int, size: int = 128
) -> Iterator[Matching]:
    """The minibatch of episode i, to be matched with others, if there are any."""
    start, end, count, own = episodes[i]
    others = rng.permutation(np.delete(np.arange(len(episodes)), i))[: config.num_targets]
    if not len(others):
        return
    shape = config.num_targets, len(own)
    theirs, counts, drawn = np.full(shape, own[0]), np.zeros(1 + shape[0], int), np.full(shape, start)
    theirs[: len(others)] = [episodes[j].unlocks for j in others]
    counts[: 1 + len(others)] = [episodes[j].count for j in (i, *others)]
    drawn[: len(others), :count] = rng.integers(start, end, (len(others), count))
    rows, index = np.unique([own, own + 1, *drawn], return_inverse=True)
    their_rows, their_index = np.unique([theirs, theirs + 1], return_inverse=True)
    noise = rng.random((*shape, len(own)), np.float32)
    yield Matching(*pad(size, rows, their_rows), index[:2], their_index, counts, index[2:], noise)


def pad(size: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """Zeros behind the last axes, up to one length: `size`, or the first of its doubles that is long enough."""
    while size < max(x.shape[-1] for x in arrays):
        size *= 2
    return [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in arrays]


AUXILIARY = {"matching": (matching_batches, matching_loss), "prediction": (prediction_batches, prediction_loss)}
METRICS = ("loss", "accuracy", "policy_divergence", "value_error")


def auxiliary_losses(config: Config) -> dict:
    """Name -> (minibatches, loss), in the order of their passes. Without any there is no auxiliary phase."""
    return {name: both for name, both in AUXILIARY.items() if config.distill and getattr(config, name)}


def distil(config: Config, programs: dict, show, state: TrainState) -> tuple[TrainState, dict]:
    """The auxiliary phase (algorithm 1) of one seed: passes of matching and of prediction over the window's episodes.

    Which steps form a minibatch does not depend on the weights, so that is decided here, on lists of exact length.
    `programs`: of `compile_phase`; `show` shows progress. Returns the state without its window, and metrics."""
    key, phase_key = jax.random.split(state.key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(phase_key)))
    episodes = find_episodes(state.window)
    window = programs["remember"](state.agent, state.window)
    agent, normaliser, optimizers = state.agent, state.normaliser, dict(state.optimizers)
    infos = {name: [] for name in auxiliary_losses(config)}
    for epoch in range(config.auxiliary_epochs):
        for name, (batches, _) in auxiliary_losses(config).items():
            show(f"auxiliary phase: {name} of {len(episodes)} episodes, pass {epoch + 1} of {config.auxiliary_epochs}")
            for i in rng.permutation(len(episodes)).tolist():
                for batch in batches(config, rng, episodes, i):
                    carry = agent, normaliser, optimizers[name]
                    (agent, normaliser, optimizers[name]), info = programs[name, len(batch.rows)](carry, window, batch)
                    infos[name].append(info)
    after = state._replace(agent=agent, normaliser=normaliser, optimizers=optimizers, window=None, key=key)
    mean = lambda values: (np.sum(values), len(values))
    metrics = {"auxiliary/episodes": len(episodes), "auxiliary/achievements": mean([e.count for e in episodes])}
    for name, seen in jax.device_get(infos).items():
        taken = [info for info in seen if info["steps"]]
        metrics[f"auxiliary/{name}_steps"] = len(taken)
        metrics |= {f"auxiliary/{name}_{metric}": mean([info[metric] for info in taken]) for metric in METRICS}
    return after, metrics


def remember(agent: Agent, window: Step) -> Step:
    """The window in one axis, with what policy and value are at the start of the phase."""
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), window)

    def heads(step):
        log_probs, value = act(agent, encode(agent, step.observation[None]), step.memory[None])
        return log_probs[0], value[0]

    log_probs, value = jax.lax.map(heads, flat, batch_size=min(512, len(flat.action)))
    return flat._replace(log_probs=log_probs, value=value)


def compile_phase(config: Config, compile, state: TrainState) -> dict:
    """The programs of the phase: `remember`, and a gradient step for each loss and size of minibatches.

    `compile` is `Run.compile_jitted`; `state` are the shapes of a seed's."""
    window = jax.eval_shape(remember, state.agent, state.window)
    programs = {"remember": compile("remember", jax.jit(remember, donate_argnums=1), state.agent, state.window)}
    most = state.window.achievements.shape[2]
    longest = min(config.episode_length, 2 * (config.auxiliary_batch_size + most + 1))
    largest = {"matching": 2 * most * (1 + config.num_targets), "prediction": longest}
    two = [Episode(0, 2, 1, np.zeros(most, int))] * 2
    for name, (batches, loss) in auxiliary_losses(config).items():
        jitted = jax.jit(partial(update, config, loss), donate_argnums=0)
        carry = state.agent, state.normaliser, state.optimizers[name]
        sizes = [128]
        while sizes[-1] < largest[name]:
            sizes.append(2 * sizes[-1])
        for size in sizes:
            (batch,) = batches(config, np.random.default_rng(0), two, 0, size)
            programs[name, size] = compile(f"{name}, {size} rows", jitted, carry, window, batch)
    return programs


# ---- evaluation ---------------------------------------------------------------------------------------------------

SCORES = run.Scores("Crafter score, %", {"eval/score": "evaluation", "train/score": "all training episodes so far"})


def evaluate(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""]) -> dict:
    """One fresh episode in each environment of `vector`, with actions drawn from the policy."""
    start_key, step_key = jax.random.split(key)
    act_once = partial(step, config, vector, agent, Normaliser(*jnp.zeros(3)))

    def body(carry):
        acting, ended, last, t = carry
        acting, taken = act_once(acting, jax.random.fold_in(step_key, t))
        ends = taken.done & ~ended
        keep = lambda old, new: jnp.where(ends.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return acting, ended | ends, jax.tree.map(keep, last, taken), t + 1

    last = no_steps(config, vector.env, vector.num_envs)
    start = start_acting(config, vector, agent, start_key), last.done, last, 0
    _, _, last, _ = jax.lax.while_loop(lambda carry: ~carry[1].all(), body, start)
    success = last.achievements.mean(axis=0)
    return {
        "eval/score": AchievementEnv.score(success),
        "eval/return": last.episode_return.mean(),
        "eval/episode_length": last.episode_steps.mean(),
        **{f"eval/success/{name}": rate for name, rate in zip(vector.env.achievement_names, success)},
    }


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, RECIPES, __doc__, argv)
    check(config)
    env = run.make_env(config.env, AchievementEnv, config.env_options)
    run.need(
        env.in_jax or config.num_seeds == 1,
        f"num_seeds is {config.num_seeds}; {config.env} runs outside of JAX, so it is 1",
    )
    vectors = [env.vectorise(n, config.episode_length) for n in (config.num_envs, config.num_eval_envs)]
    with run.Run(config, "ppo_ad", RECIPES, SCORES, worlds=vectors) as log:
        agent = train(config, *vectors, log)
        draw(config, vectors[1], agent, log)


def train(config: Config, vector: VectorEnv, eval_vector: VectorEnv, log: run.Run) -> Agent:
    """Begins or resumes; then rollouts, PPO, and now and then an auxiliary phase. Returns the first seed's agent."""
    begin = log.over_seeds(partial(init, config, vector))
    shapes = jax.eval_shape(begin, log.seeds)
    switches = [*auxiliary_losses(config), *(["memory"] if memory_size(config) else [])]
    what = f"PPO with {', '.join(switches)}" if switches else "plain PPO"
    log.describe(what, f"simulator: {vector.env.simulator}", agent=shapes.agent, encoder=shapes.agent.encoder)
    state = log.restore(shapes)
    # donates nothing, so that the state outlives an environment that fails, and is saved
    collect_rollout = log.compile("collect", partial(collect, config, vector), shapes)
    learn_rollout = log.compile("learn", partial(learn, config), shapes, *collect_rollout.output, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, eval_vector), shapes.agent, log.seeds)
    if auxiliary_losses(config):
        programs = compile_phase(config, log.compile_jitted, jax.eval_shape(run.one_seed, shapes))
        log.columns += ["auxiliary/episodes", "auxiliary/achievements"]
        log.columns += [f"auxiliary/{name}_{x}" for name in auxiliary_losses(config) for x in ("steps", *METRICS)]
    if state is None:
        state = begin(log.seeds)
    elif not vector.env.in_jax:
        log.progress.show("replaying the episodes that were going on")
        vector.restore(run.one_seed(state.acting.envs))
    while log.going(state):
        rollout = jax.block_until_ready(collect_rollout(state))
        state, metrics = learn_rollout(state, *rollout)
        rollouts = int(run.one_seed(state.env_steps)) // rollout_steps(config)
        if auxiliary_losses(config) and rollouts % config.auxiliary_every == 0:
            phase = partial(distil, config, programs, log.progress.show)
            phases = [phase(run.one_seed(state, i)) for i in range(config.num_seeds)]
            after, auxiliary = jax.tree.map(lambda *seeds: jnp.stack(seeds), *phases)
            state, metrics = after._replace(window=state.window), metrics | auxiliary
        if log.evaluates(state):
            metrics |= jax.block_until_ready(score(state.agent, log.evaluation_keys(state)))
            eval_vector.close()
        log.end_chunk(state, metrics)
    return run.one_seed(state.agent)


def draw(config: Config, vector: VectorEnv, agent: Agent, log: run.Run) -> None:
    """All figures of a finished run."""
    log.draw("learning curve", pictures.draw_curve, log.folder, SCORES)
    title = f"{config.env}: last evaluation of {config.num_eval_envs} episodes"
    log.draw("success rates", pictures.draw_success, log.folder, vector.env.achievement_names, title)
    log.progress.show("filming the policy")
    record = jax.jit(partial(record_episodes, config, vector))
    states, done = record(agent, run.evaluation_key(jax.random.key(config.seed)))
    log.draw("policy", pictures.film_first_episodes, vector.env, states, done, str(log.folder / "rollout"))


def record_episodes(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""], episodes=4, steps=500):
    """States (time, episodes, ...) of the first environments of `vector`, and which steps ended an episode."""
    start_key, key = jax.random.split(key)

    def body(acting, key):
        after, taken = step(config, vector, agent, Normaliser(*jnp.zeros(3)), acting, key)
        return after, jax.tree.map(lambda x: x[:episodes], (acting.envs.env, taken.done))

    keys = jax.random.split(key, min(config.episode_length, steps))
    return jax.lax.scan(body, start_acting(config, vector, agent, start_key), keys)[1]


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, AchievementEnv, Agent]:
    """Settings, environment and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    env = run.make_env(config.env, AchievementEnv, config.env_options)
    return config, env, run.load_agent(partial(make_agent, config, env), folder, config, seed)


if __name__ == "__main__":
    main()
