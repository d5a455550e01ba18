"""PPO with achievement distillation, in one file.

Moon, Yeom, Park, Song, 'Discovering Hierarchical Achievements in Reinforcement Learning via Contrastive Learning'
(NeurIPS 2023, arXiv 2307.03486), on Crafter and Craftax-Classic.

PPO acts and learns as usual. Now and then an auxiliary phase distils into the encoder what its recent episodes show
about achievements: (1) from a state and an action, predict which achievement comes next, told from the prediction at
another step of the episode (intra-trajectory prediction); (2) make one achievement look alike in two episodes, paired
by partial optimal transport between their sequences (cross-trajectory matching). The policy is held where it was by a
KL penalty. The achievement unlocked last is the policy's memory. An achievement is represented by the change of the
latent state that unlocking it made; which one it is, or what there is to achieve, is never told.

    python algorithms/ppo_ad.py                                    a small world with six achievements (3 minutes)
    python algorithms/ppo_ad.py --distill=false                    plain PPO on it
    python algorithms/ppo_ad.py --env craftax_classic_pixels       the paper's networks and budget (for a GPU)
    python algorithms/ppo_ad.py --env crafter                      the original benchmark: pip install -e '.[crafter]'
    python algorithms/ppo_ad.py --resume runs/ppo_ad/...           go on with a run

The default environment has a recipe (RECIPES below): settings that learn it on two CPU cores. Everything else has the
paper's hyperparameters. Results, metrics and details: algorithms/ppo_ad.md.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
from ott.geometry.geometry import Geometry

from envs import AchievementEnv, VectorEnv, VectorState
from shared import pictures, run
from shared.networks import Dense, ImpalaCNN, NormedDense, VectorEncoder, unit_weights
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
    """Environment: minicraft, craftax_classic_pixels, craftax_classic_symbolic or crafter. Paper: crafter."""
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
    """At the time limit, continue the return with the value of the last state. Without, as published, the time limit
    counts as the end of all rewards."""
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
    """Achievement distillation: the memory and the auxiliary phase. Without, this is PPO, and --prediction, --matching
    and --memory have no effect."""
    prediction: bool = True
    """Intra-trajectory achievement prediction in the auxiliary phase."""
    matching: bool = True
    """Cross-trajectory achievement matching in the auxiliary phase."""
    memory: bool = True
    """Policy, value and prediction also see the representation of the achievement unlocked last."""
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
    transport: Literal["sinkhorn", "dykstra"] = "sinkhorn"
    """Solver of the partial optimal transport: converging scalings on ott-jax, or step by step that of the published
    code. Their matches agree in 95 to 100 of 100 instances."""
    transport_epsilon: Positive = 0.05
    """Weight of the entropy in the transport problem, in units of the cost (1 - cosine)."""
    transport_iterations: Count | None = None
    """Iterations of the solver; by default 200 of sinkhorn, and 100 of dykstra, as published."""
    match_threshold: Annotated[float, Interval(ge=0.5, lt=1), "so that matches are one to one"] = 0.5
    """Two achievements match if the transport plan moves more than this from one to the other."""
    policy_regulariser: Weight = 1.0
    """Weight, in the auxiliary losses, of the divergence from the policy at the start of the phase."""
    value_regulariser: Weight = 1.0
    """Weight, in the auxiliary losses, of the value's squared error."""
    variant: Literal["code", "paper"] = "code"
    """Where the published code and the text differ (page, deviations): divergence KL(new || old) and value error from
    the returns, negatives of matching any achievement; or KL(old || new), half the squared change of the value,
    negatives unmatched achievements."""
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
    probe: bool = False
    """At each evaluation, also fit a linear classifier of the next achievement to the frozen encoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the encoder's products and convolutions; on a GPU the convolutions' results are rounded to it too."""


def check(config: Config) -> None:
    """UserError, in one line, if settings cannot work together."""
    run.need(
        config.num_eval_envs >= 2 or not config.probe,
        "num_eval_envs is 1; the probe is fitted to half of the environments and tested on the others, so it needs 2",
    )
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


def transport_iterations(config: Config) -> int:
    default = {"sinkhorn": 200, "dykstra": 100}
    return default[config.transport] if config.transport_iterations is None else config.transport_iterations


# ---- networks -----------------------------------------------------------------------------------------------------


class MLP(eqx.Module):
    """LayerNorm, linear, ReLU, linear."""

    hidden: NormedDense
    out: Dense

    def __init__(self, in_size: int, hidden_size: int, out_size: int, key: Key[Array, ""]):
        hidden_key, out_key, weight_key = jax.random.split(key, 3)
        self.hidden = NormedDense(in_size, hidden_size, 1.4, hidden_key)
        out = Dense(hidden_size, out_size, out_key)
        self.out = eqx.tree_at(lambda layer: layer.weight, out, unit_weights(weight_key, out.weight.shape, 1.0))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.out(self.hidden(x))


class Agent(eqx.Module):
    """Everything that learns."""

    encoder: ImpalaCNN | VectorEncoder
    policy: Dense
    value: Dense
    film: MLP | None
    """Action -> scale and shift of the latent state (FiLM)."""
    predictor: MLP | None
    """Modulated latent state and memory -> the next achievement's representation."""


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
        film=MLP(env.num_actions, latent, 2 * latent, film_key) if predicts else None,
        predictor=MLP(features, latent, latent, predictor_key) if predicts else None,
    )


def encode(agent: Agent, observation: Shaped[Array, "batch ..."]) -> Float[Array, "batch latent"]:
    """phi(o), non-negative; images in bytes are first scaled to [0, 1]."""
    if observation.dtype == jnp.uint8:
        observation = observation.astype(jnp.float32) / 255
    return jax.vmap(agent.encoder)(observation)


def act(
    agent: Agent, latent: Float[Array, "batch latent"], memory: Float[Array, "batch memory"]
) -> tuple[Float[Array, "batch actions"], Float[Array, " batch"]]:
    """log pi(. | o, m) and the value head's output, which is normalised: both linear in phi(o) and m."""
    features = jnp.concatenate([latent, memory], axis=-1)
    return jax.nn.log_softmax(jax.vmap(agent.policy)(features)), jax.vmap(agent.value)(features)[:, 0]


def predict(
    agent: Agent,
    latent: Float[Array, "batch latent"],
    action: Int[Array, " batch"],
    memory: Float[Array, "batch memory"],
) -> Float[Array, "batch latent"]:
    """psi(o, a, m): the predicted representation of the next achievement, a unit vector."""
    actions = agent.policy.weight.shape[0]
    scale, shift = jnp.split(jax.vmap(agent.film)(jax.nn.one_hot(action, actions)), 2, axis=-1)
    return unit(jax.vmap(agent.predictor)(jnp.concatenate([(1 + scale) * latent + shift, memory], axis=-1)))


def unit(x: Float[Array, "*batch latent"]) -> Float[Array, "*batch latent"]:
    """x / |x|; a zero vector stays zero, and gets no gradient."""
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    zero = squared < 1e-24
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.where(zero, 1, squared)))


# ---- losses -------------------------------------------------------------------------------------------------------


class Normaliser(NamedTuple):
    """Exponential means of returns and squared returns, not yet divided by `weight` to correct their start at 0."""

    mean: Float[Array, ""]
    square: Float[Array, ""]
    weight: Float[Array, ""]

    def update(self, returns: Float[Array, " batch"], valid: Bool[Array, " batch"]) -> "Normaliser":
        """Takes in a minibatch with decay 0.99."""
        mix = lambda old, new: 0.99 * old + 0.01 * new
        mean, square = masked_mean(returns, valid), masked_mean(returns**2, valid)
        return Normaliser(mix(self.mean, mean), mix(self.square, square), mix(self.weight, 1.0))

    def moments(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
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


def masked_mean(x: Float[Array, " batch"], valid: Bool[Array, " batch"]) -> Float[Array, ""]:
    """Mean over the valid entries; 0 if there is none."""
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(jnp.sum(valid), 1)


def advantages(
    reward: Float[Array, "time envs"],
    value: Float[Array, "time_and_one envs"],
    done: Bool[Array, "time envs"],
    discount: float,
    gae_lambda: float,
) -> Float[Array, "time envs"]:
    """Generalised advantage estimation (Schulman et al. 2016): A_t = delta_t + discount lambda A_{t+1} within episodes,
    delta_t = r_t + discount v_{t+1} - v_t, without v_{t+1} and A_{t+1} where step t ended the episode."""

    def backward(later, step):
        reward, value, next_value, goes_on = step
        advantage = reward + goes_on * discount * (next_value + gae_lambda * later) - value
        return advantage, advantage

    steps = reward, value[:-1], value[1:], 1.0 - done
    return jax.lax.scan(backward, jnp.zeros_like(reward[0]), steps, reverse=True)[1]


class Batch(NamedTuple):
    """Steps for one gradient step of PPO."""

    observation: Shaped[Array, "batch ..."]
    action: Int[Array, " batch"]
    log_prob: Float[Array, " batch"]
    """Of the action, at the time."""
    memory: Float[Array, "batch memory"]
    advantage: Float[Array, " batch"]
    """Standardised over the rollout."""
    returns: Float[Array, " batch"]


def ppo_loss(agent: Agent, normaliser: Normaliser, batch: Batch, config: Config) -> tuple[Float[Array, ""], tuple]:
    """Clipped surrogate (Schulman et al. 2017), value loss in normalised units, entropy bonus."""
    log_probs, value = act(agent, encode(agent, batch.observation), batch.memory)
    log_prob = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.mean(jnp.minimum(ratio * batch.advantage, clipped * batch.advantage))
    normaliser = normaliser.update(batch.returns, jnp.ones_like(batch.returns, bool))
    value_loss = jnp.mean((value - normaliser.normalise(batch.returns)) ** 2)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
    loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
    info = {
        "train/loss": loss,
        "train/policy_loss": policy_loss,
        "train/value_loss": value_loss,
        "train/entropy": entropy,
        "train/kl": jnp.mean(ratio - 1 - jnp.log(ratio)),
        "train/clipped": jnp.mean((jnp.abs(ratio - 1) > config.clip).astype(jnp.float32)),
    }
    return loss, (normaliser, info)


class Rows(NamedTuple):
    """Steps of past episodes, with what the policy and the value were at the start of the auxiliary phase."""

    observation: Shaped[Array, "rows ..."]
    action: Int[Array, " rows"]
    memory: Float[Array, "rows memory"]
    """As it was when the step was taken; it is not computed anew."""
    returns: Float[Array, " rows"]
    old_log_probs: Float[Array, "rows actions"]
    old_value: Float[Array, " rows"]


def regularisers(
    agent: Agent,
    normaliser: Normaliser,
    latent: Float[Array, "rows latent"],
    rows: Rows,
    valid: Bool[Array, " rows"],
    config: Config,
) -> tuple[Float[Array, ""], tuple]:
    """What keeps the policy where it was and fits the value, while the encoder changes under both."""
    log_probs, value = act(agent, latent, rows.memory)
    normaliser = normaliser.update(rows.returns, valid)
    if config.variant == "code":
        divergence = jnp.sum(jnp.exp(log_probs) * (log_probs - rows.old_log_probs), axis=1)
        value_error = (value - normaliser.normalise(rows.returns)) ** 2
    else:
        divergence = jnp.sum(jnp.exp(rows.old_log_probs) * (rows.old_log_probs - log_probs), axis=1)
        value_error = 0.5 * (value - rows.old_value) ** 2
    divergence, value_error = masked_mean(divergence, valid), masked_mean(value_error, valid)
    loss = config.policy_regulariser * divergence + config.value_regulariser * value_error
    return loss, (normaliser, {"policy_divergence": divergence, "value_error": value_error})


def contrast(
    anchor: Float[Array, "batch latent"],
    positive: Float[Array, "batch latent"],
    negative: Float[Array, "batch latent"],
    valid: Bool[Array, " batch"],
    temperature: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean of -log(e^p / (e^p + e^n)), p and n the inner products of the anchor with the positive and the negative over
    the temperature (eq. 3 and 5); and the share of anchors for which p > n."""
    margin = jnp.sum(anchor * (positive - negative), axis=-1) / temperature
    return masked_mean(jax.nn.softplus(-margin), valid), masked_mean((margin > 0).astype(jnp.float32), valid)


def prediction_loss(
    agent: Agent,
    normaliser: Normaliser,
    rows: Rows,
    positive: Int[Array, " batch"],
    negative: Int[Array, " batch"],
    anchor: Float[Array, "batch latent"],
    valid: Bool[Array, " batch"],
    config: Config,
) -> tuple[Float[Array, ""], tuple]:
    """Intra-trajectory prediction: the next achievement (anchor) is nearer to the prediction at a step before it than
    to that at another step of the episode. `positive` and `negative` index the rows."""
    latent = encode(agent, rows.observation)
    predicted = predict(agent, latent, rows.action, rows.memory)
    anchor = jax.lax.stop_gradient(anchor)
    loss, accuracy = contrast(anchor, predicted[positive], predicted[negative], valid, config.temperature)
    used = jnp.zeros(len(latent), bool).at[positive].max(valid).at[negative].max(valid)
    extra, (normaliser, info) = regularisers(agent, normaliser, latent, rows, used, config)
    return loss + extra, (normaliser, {"loss": loss, "accuracy": accuracy, **info})


def matching_loss(
    agent: Agent,
    normaliser: Normaliser,
    before: Shaped[Array, "goals ..."],
    after: Shaped[Array, "goals ..."],
    source: Int[Array, " batch"],
    positive: Float[Array, "batch latent"],
    negative: Float[Array, "batch latent"],
    valid: Bool[Array, " batch"],
    rows: Rows,
    config: Config,
) -> tuple[Float[Array, ""], tuple]:
    """Cross-trajectory matching: an achievement of the source episode, whose observations before and after are given,
    is nearer to the one it is matched with in another episode than to some achievement of that episode.

    `source` indexes the achievements of the source; the rows, as many as matches, are steps of the source.
    """
    # one call of the encoder, which is most of the compile time
    latent = encode(agent, jnp.concatenate([before, after, rows.observation]))
    before, after, latent = jnp.split(latent, [len(before), 2 * len(before)])
    positive, negative = jax.lax.stop_gradient((positive, negative))
    anchor = unit(after - before)[source]
    loss, accuracy = contrast(anchor, positive, negative, valid, config.temperature)
    extra, (normaliser, info) = regularisers(agent, normaliser, latent, rows, valid, config)
    return loss + extra, (normaliser, {"loss": loss, "accuracy": accuracy, **info})


def represent(
    agent: Agent, before: Shaped[Array, "goals ..."], after: Shaped[Array, "goals ..."]
) -> Float[Array, "goals latent"]:
    """nu: the direction in which unlocking an achievement changed the latent state."""
    latent = encode(agent, jnp.concatenate([before, after]))
    return unit(latent[len(before) :] - latent[: len(before)])


# ---- partial optimal transport ------------------------------------------------------------------------------------


def transport_plan(
    cost: Float[Array, "size size"], rows: Int[Array, ""], columns: Int[Array, ""], config: Config
) -> Float[Array, "size size"]:
    """The entropic partial transport plan between `rows` and `columns` points, padded to `size` (eq. 4):

    min <P, C> + epsilon sum P log P,  P >= 0, row sums <= 1, column sums <= 1, total mass min(rows, columns).
    """
    return {"sinkhorn": sinkhorn_plan, "dykstra": dykstra_plan}[config.transport](cost, rows, columns, config)


def sinkhorn_plan(cost, rows, columns, config: Config):
    """Sinkhorn's scalings. The shorter side has sums of 1, the longer one sums of at most 1: there, the half-update of
    ott-jax is cut at 0, so that a point that receives less than 1 is not scaled up. The shorter side comes last, as
    rows, so that the total mass is exact.
    """
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
    f, g = jax.lax.fori_loop(0, transport_iterations(config), iterate, start)
    plan = jnp.exp((f[:, None] + g - geometry.cost_matrix) / config.transport_epsilon)
    return jnp.where(swap, plan.T, plan)


def dykstra_plan(cost, rows, columns, config: Config):
    """Dykstra's projections, each iterate that of POT's `entropic_partial_wasserstein`."""
    valid = (jnp.arange(len(cost)) < rows)[:, None] & (jnp.arange(len(cost)) < columns)
    mass = jnp.minimum(rows, columns).astype(cost.dtype)
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 1)
    to_mass = lambda plan: plan * ratio(mass, plan.sum())
    at_most_one = lambda plan, axis: plan * jnp.minimum(ratio(1.0, plan.sum(axis, keepdims=True)), 1)

    projections = partial(at_most_one, axis=1), partial(at_most_one, axis=0), to_mass

    def iterate(_, carry):
        plan, corrections = carry
        updated = []
        for project, correction in zip(projections, corrections):
            before, plan = plan, project(plan * correction)
            updated.append(correction * ratio(before, plan))
        return plan, tuple(updated)

    plan = to_mass(jnp.where(valid, jnp.exp(-cost / config.transport_epsilon), 0))
    return jax.lax.fori_loop(0, transport_iterations(config), iterate, (plan, (jnp.ones_like(plan),) * 3))[0]


# ---- state --------------------------------------------------------------------------------------------------------


class Acting(NamedTuple):
    """The environments, and what the agent carries from step to step in each."""

    envs: VectorState
    latent: Float[Array, "envs latent"]
    """phi of the observation before the present one."""
    memory: Float[Array, "envs memory"]
    """At the step before."""
    unlocked: Bool[Array, " envs"]
    """The step before unlocked something, and the episode went on."""
    first: Bool[Array, " envs"]
    """The step before ended an episode."""
    episode_return: Float[Array, " envs"]
    """Sum of rewards in the episode so far."""
    episode_steps: Int[Array, " envs"]
    key: Key[Array, ""]
    """Where the next rollout draws from."""


class Window(NamedTuple):
    """What the auxiliary phase learns from: the last `auxiliary_every` rollouts, each environment's in order."""

    observation: Shaped[Array, "envs time ..."]
    action: Int[Array, "envs time"]
    memory: Float[Array, "envs time memory"]
    returns: Float[Array, "envs time"]
    first: Bool[Array, "envs time"]
    """The observation is the first of an episode that followed another."""
    unlocked: Bool[Array, "envs time"]
    """The action unlocked something, and the episode went on."""


class Scores(NamedTuple):
    """Training episodes that have ended so far, as the benchmark's score counts them."""

    episodes: Int[Array, ""]
    successes: Int[Array, " achievements"]
    """Episodes that unlocked each achievement."""


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    normaliser: Normaliser
    ppo_optimizer: optax.OptState
    prediction_optimizer: optax.OptState | None
    matching_optimizer: optax.OptState | None
    acting: Acting
    window: Window | None
    scores: Scores
    env_steps: Int[Array, ""]
    ppo_steps: Int[Array, ""]
    """Gradient steps of PPO."""
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(config.learning_rate))


def start_acting(config: Config, vector: VectorEnv, key: Key[Array, ""]) -> Acting:
    reset_key, key = jax.random.split(key)
    current, n = vector.reset(reset_key), vector.num_envs
    return Acting(
        envs=current,
        latent=jnp.zeros((n, config.latent_size)),
        memory=jnp.zeros((n, memory_size(config))),
        unlocked=jnp.zeros(n, bool),
        first=jnp.zeros(n, bool),
        episode_return=jnp.zeros(n),
        episode_steps=jnp.zeros(n, jnp.int32),
        key=key,
    )


def init(config: Config, vector: VectorEnv, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, env_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    env = vector.env
    agent = make_agent(config, env, agent_key)
    optimizer = lambda wanted: make_optimizer(config).init(agent) if wanted else None
    shape = config.num_envs, config.auxiliary_every * config.unroll_length
    window = Window(
        observation=jnp.zeros((*shape, *env.observation_shape), env.observation_dtype),
        action=jnp.zeros(shape, jnp.int32),
        memory=jnp.zeros((*shape, memory_size(config))),
        returns=jnp.zeros(shape),
        first=jnp.zeros(shape, bool),
        unlocked=jnp.zeros(shape, bool),
    )
    return TrainState(
        agent=agent,
        normaliser=Normaliser(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())),
        ppo_optimizer=optimizer(True),
        prediction_optimizer=optimizer(config.distill and config.prediction),
        matching_optimizer=optimizer(config.distill and config.matching),
        acting=start_acting(config, vector, env_key),
        window=window if distills(config) else None,
        scores=Scores(jnp.zeros((), jnp.int32), jnp.zeros(len(env.achievement_names), jnp.int32)),
        env_steps=jnp.zeros((), jnp.int32),
        ppo_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


def distills(config: Config) -> bool:
    """Whether there are auxiliary phases."""
    return config.distill and (config.prediction or config.matching)


# ---- acting -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of every environment."""

    observation: Shaped[Array, "envs ..."]
    action: Int[Array, " envs"]
    log_prob: Float[Array, " envs"]
    memory: Float[Array, "envs memory"]
    value: Float[Array, " envs"]
    """In units of the return."""
    reward: Float[Array, " envs"]
    first: Bool[Array, " envs"]
    done: Bool[Array, " envs"]
    unlocked: Bool[Array, " envs"]
    achievements: Bool[Array, "envs achievements"]
    """What the episode has unlocked, this step included."""
    episode_return: Float[Array, " envs"]
    """Sum of rewards in the episode, this step included."""
    episode_steps: Int[Array, " envs"]
    """Steps in the episode, this one included."""


def recall(acting: Acting, latent: Float[Array, "envs latent"]) -> Float[Array, "envs memory"]:
    """The memory of the present state, whose latent is given: the change made by the last unlocking; at first 0."""
    if not acting.memory.shape[1]:
        return acting.memory
    memory = jnp.where(acting.unlocked[:, None], unit(latent - acting.latent), acting.memory)
    return jnp.where(acting.first[:, None], 0, memory)


def step(
    config: Config, vector: VectorEnv, agent: Agent, normaliser: Normaliser, acting: Acting, key: Key[Array, ""]
) -> tuple[Acting, Step]:
    """Acts once in every environment, with actions drawn from the policy."""
    current = acting.envs
    latent = encode(agent, current.env.observation)
    memory = recall(acting, latent)
    log_probs, value = act(agent, latent, memory)
    action = jax.random.categorical(key, log_probs)
    envs, after, truncated = vector.step(current, action)
    done = after.terminated | truncated
    changed = jnp.any(after.achievements != current.env.achievements, axis=1)
    unlocked = changed & ~done
    episode_return, episode_steps = acting.episode_return + after.reward, acting.episode_steps + 1

    reward = after.reward
    if config.bootstrap_time_limit:

        def value_at_the_end():
            last = encode(agent, after.observation)
            ended = acting._replace(latent=latent, memory=memory, unlocked=changed, first=jnp.zeros_like(done))
            return normaliser.denormalise(act(agent, last, recall(ended, last))[1])

        value_at_end = jax.lax.cond(truncated.any(), value_at_the_end, lambda: jnp.zeros_like(reward))
        reward = reward + jnp.where(truncated, config.discount * value_at_end, 0)

    row = Step(
        observation=current.env.observation,
        action=action,
        log_prob=jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0],
        memory=memory,
        value=normaliser.denormalise(value),
        reward=reward,
        first=acting.first,
        done=done,
        unlocked=unlocked,
        achievements=after.achievements,
        episode_return=episode_return,
        episode_steps=episode_steps,
    )
    acting = Acting(
        envs=envs,
        latent=latent,
        memory=memory,
        unlocked=unlocked,
        first=done,
        episode_return=jnp.where(done, 0, episode_return),
        episode_steps=jnp.where(done, 0, episode_steps),
        key=acting.key,
    )
    return acting, row


class Rollout(NamedTuple):
    """`unroll_length` steps of every environment."""

    steps: Step  # every leaf (time, envs, ...)
    last_value: Float[Array, " envs"]
    """Of the state after the last step."""


def collect(
    config: Config, vector: VectorEnv, agent: Agent, normaliser: Normaliser, acting: Acting
) -> tuple[Acting, Rollout]:
    """A rollout. The memory for the first step of the next one is made here, with the weights that acted here."""
    key, rollout_key = jax.random.split(acting.key)
    keys = jax.random.split(rollout_key, config.unroll_length)
    acting = acting._replace(key=key)
    acting, steps = jax.lax.scan(partial(step, config, vector, agent, normaliser), acting, keys)
    latent = encode(agent, acting.envs.env.observation)
    memory = recall(acting, latent)
    last_value = normaliser.denormalise(act(agent, latent, memory)[1])
    acting = acting._replace(memory=memory, unlocked=jnp.zeros_like(acting.unlocked))
    return acting, Rollout(steps, last_value)


# ---- training -----------------------------------------------------------------------------------------------------


def learn(config: Config, state: TrainState, acting: Acting, rollout: Rollout) -> tuple[TrainState, dict]:
    """PPO on one rollout; the rollout joins the window of the next auxiliary phase."""
    steps = rollout.steps
    values = jnp.concatenate([steps.value, rollout.last_value[None]])
    advantage = advantages(steps.reward, values, steps.done, config.discount, config.gae_lambda)
    returns = advantage + steps.value
    standard = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    data = Batch(steps.observation, steps.action, steps.log_prob, steps.memory, standard, returns)
    data = jax.tree.map(flatten, data)

    def one_step(carry, indices):
        agent, normaliser, optimizer = carry
        batch = jax.tree.map(lambda x: x[indices], data)
        gradient, (normaliser, info) = jax.grad(ppo_loss, has_aux=True)(agent, normaliser, batch, config)
        agent, optimizer = descend(config, agent, gradient, optimizer)
        return (agent, normaliser, optimizer), info

    def one_pass(carry, key):
        indices = jax.random.permutation(key, rollout_steps(config)).reshape(config.num_minibatches, -1)
        return jax.lax.scan(one_step, carry, indices)

    key, update_key = jax.random.split(state.key)
    carry = state.agent, state.normaliser, state.ppo_optimizer
    carry, info = jax.lax.scan(one_pass, carry, jax.random.split(update_key, config.update_epochs))
    agent, normaliser, optimizer = carry

    scores, episode_info = score_episodes(config, state, steps)
    info = jax.tree.map(jnp.mean, info) | episode_info
    state = state._replace(
        agent=agent,
        normaliser=normaliser,
        ppo_optimizer=optimizer,
        acting=acting,
        window=None if state.window is None else extend(config, state.window, state.env_steps, steps, returns),
        scores=scores,
        env_steps=state.env_steps + rollout_steps(config),
        ppo_steps=state.ppo_steps + config.update_epochs * config.num_minibatches,
        key=key,
    )
    return state, info


def flatten(x: Shaped[Array, "a b ..."]) -> Shaped[Array, "a*b ..."]:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def descend(config: Config, agent: Agent, gradient: Agent, optimizer: optax.OptState) -> tuple[Agent, optax.OptState]:
    updates, optimizer = make_optimizer(config).update(gradient, optimizer)
    return optax.apply_updates(agent, updates), optimizer


def extend(config: Config, window: Window, env_steps: Int[Array, ""], steps: Step, returns) -> Window:
    """Writes a rollout to its place in the window."""
    new = Window(steps.observation, steps.action, steps.memory, returns, steps.first, steps.unlocked)
    start = env_steps // config.num_envs % (config.auxiliary_every * config.unroll_length)
    put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.swapaxes(0, 1), start, axis=1)
    return jax.tree.map(put, window, new)


def score_episodes(config: Config, state: TrainState, steps: Step) -> tuple[Scores, dict]:
    """Counts the episodes that ended in a rollout, up to the step budget."""
    time = state.env_steps // config.num_envs + 1 + jnp.arange(config.unroll_length)
    ended = steps.done & (time * config.num_envs <= config.total_env_steps)[:, None]
    successes = jnp.sum(steps.achievements & ended[..., None], axis=(0, 1), dtype=jnp.int32)
    scores = Scores(state.scores.episodes + ended.sum(dtype=jnp.int32), state.scores.successes + successes)
    mean = lambda x: jnp.sum(jnp.where(ended, x, 0)) / ended.sum()  # NaN if none ended
    return scores, {
        "train/return": mean(steps.episode_return),
        "train/episode_length": mean(steps.episode_steps),
        "train/episodes": scores.episodes,
        "train/score": crafter_score(scores.successes / scores.episodes),
    }


def crafter_score(success: Float[Array, " achievements"]) -> Float[Array, ""]:
    """Crafter's score in percent: the geometric mean of success rates with an offset of 1 % (Hafner 2022, eq. 1)."""
    return jnp.exp(jnp.mean(jnp.log1p(100 * success))) - 1


# ---- the auxiliary phase ------------------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """The whole episodes of a window in which something was unlocked, as positions in the flattened window."""

    count: Int[Array, ""]
    """How many there are; later entries of the other fields mean nothing."""
    start: Int[Array, " most"]
    length: Int[Array, " most"]
    goals: Int[Array, "most achievements"]
    """The steps that unlocked something, in order."""
    num_goals: Int[Array, " most"]


def find_episodes(first: Bool[Array, "envs time"], unlocked: Bool[Array, "envs time"], achievements: int) -> Episodes:
    """Cuts a window into episodes. Those that began before it or went on after it are left out."""
    num_envs, time = first.shape
    size = num_envs * time
    index = jnp.arange(time)
    nothing = jnp.full((num_envs, 1), size)
    cut_here_or_later = jax.lax.cummin(jnp.where(first, index, size), axis=1, reverse=True)
    next_cut = jnp.concatenate([cut_here_or_later[:, 1:], nothing], axis=1)
    # unlocked before each position of the flattened window, and at its end
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(unlocked.reshape(-1), dtype=jnp.int32)])
    start = jnp.arange(size).reshape(first.shape)
    end = jnp.minimum(start + next_cut - index, size)
    whole = first & (next_cut < time) & (before[end] > before[start])
    most = num_envs * max(time // 2, 1)  # an episode with something unlocked has two steps or more
    (begins,) = jnp.nonzero(whole.reshape(-1), size=most, fill_value=0)
    ends = end.reshape(-1)[begins]
    (events,) = jnp.nonzero(unlocked.reshape(-1), size=size, fill_value=0)
    goals = events[jnp.minimum(before[begins][:, None] + jnp.arange(achievements), size - 1)]
    return Episodes(whole.sum(), begins, ends - begins, goals, before[ends] - before[begins])


def shuffle(key: Key[Array, ""], count: Int[Array, ""], size: int) -> Int[Array, " size"]:
    """A uniform permutation of 0..count-1; the other entries, up to the static size, come after it."""
    order = jax.random.uniform(key, (size,))
    return jnp.argsort(jnp.where(jnp.arange(size) < count, order, jnp.inf))


def sizes(largest: int) -> list[int]:
    """Lengths that arrays of up to `largest` entries are padded to: 128, its doubles, and `largest`."""
    few = [128 * 2**i for i in range(16)]
    return [size for size in few if size < largest] + [largest]


class Learner(NamedTuple):
    """What a gradient step of the auxiliary phase changes."""

    agent: Agent
    normaliser: Normaliser
    prediction_optimizer: optax.OptState | None
    matching_optimizer: optax.OptState | None


class Past(NamedTuple):
    """A window and its episodes, time and environments in one axis."""

    rows: Rows
    episodes: Episodes


def distil(config: Config, state: TrainState) -> tuple[TrainState, dict]:
    """The auxiliary phase (algorithm 1): passes of matching and of prediction over the episodes of the window."""
    key, phase_key = jax.random.split(state.key)
    window = state.window
    episodes = find_episodes(window.first, window.unlocked, len(state.scores.successes))
    flat = jax.tree.map(flatten, window)

    def before(row):  # of the policy and the value, at the start of the phase
        observation, memory = row
        log_probs, value = act(state.agent, encode(state.agent, observation[None]), memory[None])
        return log_probs[0], value[0]

    old_log_probs, old_value = jax.lax.map(
        before, (flat.observation, flat.memory), batch_size=min(512, len(flat.action))
    )
    past = Past(Rows(flat.observation, flat.action, flat.memory, flat.returns, old_log_probs, old_value), episodes)
    learner = Learner(state.agent, state.normaliser, state.prediction_optimizer, state.matching_optimizer)

    def one_epoch(learner, key):
        matching_key, prediction_key = jax.random.split(key)
        info = {}
        if config.matching:
            learner, info["matching"] = visit(config, partial(match_episode, config), learner, past, matching_key)
        if config.prediction:
            learner, info["prediction"] = visit(config, partial(predict_episode, config), learner, past, prediction_key)
        return learner, info

    learner, sums = jax.lax.scan(one_epoch, learner, jax.random.split(phase_key, config.auxiliary_epochs))
    info = {"auxiliary/episodes": episodes.count, "auxiliary/goals": mean_goals(episodes)}
    for name, total in sums.items():
        total = jax.tree.map(lambda x: x.sum(axis=0), total)
        steps = total.pop("steps")
        # without any step these are NaN
        info |= {f"auxiliary/{name}_{metric}": value / steps for metric, value in total.items()}
        info[f"auxiliary/{name}_steps"] = steps
    return state._replace(**learner._asdict(), key=key), info


def mean_goals(episodes: Episodes) -> Float[Array, ""]:
    listed = jnp.arange(len(episodes.start)) < episodes.count
    return jnp.sum(jnp.where(listed, episodes.num_goals, 0)) / episodes.count


METRICS = ("loss", "accuracy", "policy_divergence", "value_error", "steps")


def visit(config: Config, learn_from, learner: Learner, past: Past, key: Key[Array, ""]) -> tuple[Learner, dict]:
    """`learn_from(learner, sums, past, episode, key)` for every episode, in random order. Returns sums of metrics."""
    order_key, key = jax.random.split(key)
    order = shuffle(order_key, past.episodes.count, len(past.episodes.start))

    def body(i, carry):
        return learn_from(*carry, past, order[i], jax.random.fold_in(key, i))

    sums = {name: jnp.zeros(()) for name in METRICS}
    return jax.lax.fori_loop(0, past.episodes.count, body, (learner, sums))


def apply(config: Config, learner: Learner, sums: dict, which: str, loss, *args, valid) -> tuple[Learner, dict]:
    """One gradient step of an auxiliary loss with its own Adam; none if no entry of the minibatch is valid."""
    gradient, (normaliser, info) = jax.grad(loss, has_aux=True)(learner.agent, learner.normaliser, *args, config)
    agent, optimizer = descend(config, learner.agent, gradient, getattr(learner, which))
    after = learner._replace(agent=agent, normaliser=normaliser, **{which: optimizer})
    any_valid = valid.any()
    keep = lambda old, new: jnp.where(any_valid, new, old)
    info = {**info, "steps": jnp.ones(())}
    return jax.tree.map(keep, learner, after), {name: sums[name] + jnp.where(any_valid, info[name], 0) for name in sums}


def gather(rows: Rows, positions: Int[Array, " batch"]) -> Rows:
    return jax.tree.map(lambda x: x[jnp.clip(positions, 0, len(x) - 1)], rows)


def predict_episode(config: Config, learner: Learner, sums: dict, past: Past, episode, key) -> tuple[Learner, dict]:
    """Prediction on one episode: in one minibatch if it is short, else in several."""
    time = config.auxiliary_every * config.unroll_length
    longest = min(config.episode_length, time)
    whole = sizes(min(longest, config.auxiliary_batch_size))
    length = past.episodes.length[episode]

    def in_one(size, learner, sums):
        negative = shuffle(key, length, size)
        valid = jnp.arange(size) < length
        positions = past.episodes.start[episode] + jnp.arange(size)
        return predict_steps(config, learner, sums, past, episode, positions, jnp.arange(size), negative, valid)

    def in_several(learner, sums):
        order_key, negative_key = jax.random.split(key)
        size = config.auxiliary_batch_size
        order, partner = (shuffle(k, length, longest) for k in (order_key, negative_key))
        order = jnp.pad(order, (0, -longest % size))

        def body(i, carry):
            steps = jax.lax.dynamic_slice_in_dim(order, i * size, size)
            valid = i * size + jnp.arange(size) < length
            positions = past.episodes.start[episode] + jnp.concatenate([steps, partner[steps]])
            indices = jnp.arange(size)
            return predict_steps(config, *carry, past, episode, positions, indices, size + indices, valid)

        return jax.lax.fori_loop(0, (length + size - 1) // size, body, (learner, sums))

    branches = [partial(in_one, size) for size in whole]
    if longest > config.auxiliary_batch_size:
        branches.append(in_several)
    return jax.lax.switch(jnp.searchsorted(jnp.array(whole), length), branches, learner, sums)


def predict_steps(
    config: Config, learner: Learner, sums: dict, past: Past, episode, positions, positive, negative, valid
) -> tuple[Learner, dict]:
    """One minibatch of prediction, on the steps at these positions in the window."""
    rows, episodes = past.rows, past.episodes
    goals, count = episodes.goals[episode], episodes.num_goals[episode]
    last = episodes.start[episode] + episodes.length[episode] - 1
    ends = jnp.append(goals, last)
    latent = encode(learner.agent, rows.observation[jnp.concatenate([ends, goals + 1])])
    before, after = latent[: len(ends)], latent[len(ends) :]
    goal_vectors = unit(after - before[:-1])
    no_goal = unit(-before[-1])
    step = positions[positive]
    following = jnp.sum((goals < step[:, None]) & (jnp.arange(len(goals)) < count), axis=1)
    anchor = jnp.where((following < count)[:, None], goal_vectors[jnp.minimum(following, len(goals) - 1)], no_goal)
    return apply(
        *(config, learner, sums, "prediction_optimizer", prediction_loss),
        *(gather(rows, positions), positive, negative, anchor),
        valid,
        valid=valid,
    )


def match_episode(config: Config, learner: Learner, sums: dict, past: Past, episode, key) -> tuple[Learner, dict]:
    """Matching of one episode with others, in one minibatch."""
    episodes = past.episodes
    others_key, key = jax.random.split(key)
    index = jnp.arange(len(episodes.start))
    others = (index < episodes.count) & (index != episode)
    order = jnp.where(others, jax.random.uniform(others_key, index.shape), -1.0)
    chance, targets = jax.lax.top_k(order, min(config.num_targets, len(index)))
    num_goals = jnp.where(chance >= 0, episodes.num_goals[targets], 0)
    achievements = episodes.goals.shape[1]
    few = sizes(len(targets) * achievements)

    def match(size, learner, sums):
        return match_goals(config, size, learner, sums, past, episode, targets, num_goals, key)

    branch = jnp.searchsorted(jnp.array(few), num_goals.sum())
    return jax.lax.switch(branch, [partial(match, size) for size in few], learner, sums)


def match_goals(
    config: Config, size: int, learner: Learner, sums: dict, past: Past, episode, targets, num_goals, key
) -> tuple[Learner, dict]:
    """Matches the achievements of an episode with those of its targets, of which there are at most `size`."""
    rows, episodes = past.rows, past.episodes
    negative_key, row_key = jax.random.split(key)
    most = episodes.goals.shape[1]
    source, source_goals = episodes.goals[episode], episodes.num_goals[episode]
    exists = jnp.arange(most) < num_goals[:, None]  # (targets, most)
    target_goals = episodes.goals[targets]

    # the targets' achievements, without the padding, are encoded together with the source's
    (where,) = jnp.nonzero(exists.reshape(-1), size=size, fill_value=0)
    goals = jnp.concatenate([source, target_goals.reshape(-1)[where]])
    vectors = represent(learner.agent, rows.observation[goals], rows.observation[goals + 1])
    source_vectors = vectors[:most]
    target_vectors = jnp.zeros((exists.size, vectors.shape[1])).at[where].set(vectors[most:])
    target_vectors = target_vectors.reshape(*exists.shape, -1)

    cost = 1 - jnp.einsum("ud,tvd->tuv", source_vectors, target_vectors)
    plan = jax.vmap(lambda c, n: transport_plan(c, source_goals, n, config))(cost, num_goals)
    matched = plan > config.match_threshold  # (targets, most of the source, most of the target)
    target, u, v = jnp.nonzero(matched, size=size, fill_value=0)
    valid = jnp.arange(size) < matched.sum()

    free = exists & ~matched.any(axis=1) if config.variant == "paper" else exists
    negative = jax.random.categorical(negative_key, jnp.where(free[target], 0.0, -jnp.inf))
    valid &= free.any(axis=1)[target]
    steps = jax.random.randint(row_key, (size,), 0, episodes.length[episode]) + episodes.start[episode]
    return apply(
        *(config, learner, sums, "matching_optimizer", matching_loss),
        *(rows.observation[source], rows.observation[source + 1], u),
        *(target_vectors[target, v], target_vectors[target, negative]),
        *(valid, gather(rows, steps)),
        valid=valid,
    )


# ---- evaluation ---------------------------------------------------------------------------------------------------


SCORES = run.Scores("Crafter score, %", {"eval/score": "evaluation", "train/score": "all training episodes so far"})


def evaluate(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""]) -> dict:
    """One fresh episode in each environment of `vector`, with actions drawn from the policy."""
    start_key, step_key, probe_key = jax.random.split(key, 3)
    unused = Normaliser(*jnp.zeros(3))
    empty = jnp.zeros(vector.num_envs)
    results = {"return": empty, "episode_length": empty, "success": jnp.zeros((vector.num_envs, *achievements(vector)))}

    def body(carry):
        acting, finished, results, t = carry
        acting, seen = step(config, vector, agent, unused, acting, jax.random.fold_in(step_key, t))
        new = {
            "return": seen.episode_return,
            "episode_length": seen.episode_steps.astype(jnp.float32),
            "success": seen.achievements.astype(jnp.float32),
        }
        counts = seen.done & ~finished
        pick = lambda old, new: jnp.where(counts.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        return acting, finished | seen.done, jax.tree.map(pick, results, new), t + 1

    start = start_acting(config, vector, start_key), jnp.zeros(vector.num_envs, bool), results, 0
    _, _, results, _ = jax.lax.while_loop(lambda carry: ~carry[1].all(), body, start)
    success = results["success"].mean(axis=0)
    info = {
        "eval/score": crafter_score(success),
        "eval/return": results["return"].mean(),
        "eval/episode_length": results["episode_length"].mean(),
    }
    info |= {f"eval/success/{name}": rate for name, rate in zip(vector.env.achievement_names, success)}
    return info | (probe(config, vector, agent, probe_key) if config.probe else {})


def achievements(vector: VectorEnv) -> tuple[int]:
    return (len(vector.env.achievement_names),)


PROBE_STEPS = 500
"""Steps of each environment that the probe is fitted to and tested on."""
PROBE_UPDATES = 500


def probe(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""]) -> dict:
    """How well a linear classifier on the frozen encoder tells which achievement is unlocked next (section 5.4).

    It is fitted, by full-batch Adam, to the steps of half of the environments and tested on the other half; steps
    after which nothing is unlocked before the episode or the recording ends are left out. `probe_confidence` is the
    median probability that it gives to the true achievement.
    """
    start_key, key = jax.random.split(key)
    unused = Normaliser(*jnp.zeros(3))

    def record(acting, key):
        before = acting.envs.env.achievements
        acting, seen = step(config, vector, agent, unused, acting, key)
        new = seen.achievements & ~before
        return acting, (acting.latent, jnp.where(new.any(axis=1), jnp.argmax(new, axis=1), -1), seen.done)

    acting = start_acting(config, vector, start_key)
    _, (latent, unlocked, done) = jax.lax.scan(record, acting, jax.random.split(key, PROBE_STEPS))

    def backward(following, step):
        unlocked, done = step
        following = jnp.where(unlocked >= 0, unlocked, jnp.where(done, -1, following))
        return following, following

    nothing = jnp.full(vector.num_envs, -1)
    following = jax.lax.scan(backward, nothing, (unlocked, done), reverse=True)[1]
    half = vector.num_envs // 2
    split = lambda x: (x[:, :half].reshape(-1, *x.shape[2:]), x[:, half:].reshape(-1, *x.shape[2:]))
    (train_x, test_x), (train_y, test_y) = split(latent), split(following)
    centre, spread = train_x.mean(axis=0), train_x.std(axis=0) + 1e-6
    weights = jnp.zeros((latent.shape[-1] + 1, *achievements(vector)))
    optimizer = optax.adam(0.01)

    def log_prob(weights, x, y):
        x = (x - centre) / spread
        log_probs = jax.nn.log_softmax(x @ weights[:-1] + weights[-1])
        return log_probs, jnp.take_along_axis(log_probs, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]

    def fit(carry, _):
        weights, state = carry
        loss = lambda w: -masked_mean(log_prob(w, train_x, train_y)[1], train_y >= 0)
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(fit, (weights, optimizer.init(weights)), None, length=PROBE_UPDATES)
    log_probs, of_true = log_prob(weights, test_x, test_y)
    right = (jnp.argmax(log_probs, axis=1) == test_y).astype(jnp.float32)
    return {
        "eval/probe_accuracy": masked_mean(right, test_y >= 0),
        "eval/probe_confidence": jnp.nanmedian(jnp.where(test_y >= 0, jnp.exp(of_true), jnp.nan)),
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
    with run.Run(config, "ppo_ad", SCORES) as log:
        try:
            agent = train(config, *vectors, log)
            draw(config, vectors[1], agent, log)
        except RuntimeError:
            reason = vectors[0].failure or vectors[1].failure
            if not reason:
                raise
            raise run.UserError(f"{reason}; to go on from the last checkpoint: --resume {log.folder}") from None
        finally:
            for vector in vectors:
                vector.close()


def train(config: Config, vector: VectorEnv, eval_vector: VectorEnv, log: run.Run) -> Agent:
    """Begins or resumes; then rollouts, PPO, and now and then an auxiliary phase. Returns the first seed's agent."""
    begin = log.over_seeds(partial(init, config, vector))
    shapes = jax.eval_shape(begin, log.seeds)
    switches = [name for name in ("prediction", "matching", "memory") if config.distill and getattr(config, name)]
    what = f"PPO with {', '.join(switches)}" if switches else "plain PPO"
    log.describe(RECIPES, what, f"simulator: {vector.env.simulator}", agent=shapes.agent, encoder=shapes.agent.encoder)
    state = log.restore(shapes)
    acting = shapes.agent, shapes.normaliser, shapes.acting
    # donates nothing, so that the state outlives an environment that fails
    collect_rollout = log.compile("collect", partial(collect, config, vector), *acting)
    learn_rollout = log.compile("learn", partial(learn, config), shapes, *collect_rollout.output, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, eval_vector), shapes.agent, log.seeds)
    if distills(config):
        distil_window = log.compile("distil", partial(distil, config), shapes, donate=True)
    if state is None:
        state = begin(log.seeds)
    elif not vector.env.in_jax:
        log.progress.show("replaying the episodes that were going on")
        vector.restore(jax.tree.map(lambda x: x[0], state.acting.envs))
    while log.going(state):
        try:
            rollout = jax.block_until_ready(collect_rollout(state.agent, state.normaliser, state.acting))
        except RuntimeError:
            log.save(state)
            raise
        state, metrics = learn_rollout(state, *rollout)
        if distills(config) and state.env_steps[0] // rollout_steps(config) % config.auxiliary_every == 0:
            state, auxiliary = distil_window(state)
            metrics |= auxiliary
        if log.evaluates(state):
            metrics |= jax.block_until_ready(score(state.agent, log.evaluation_keys(state)))
            eval_vector.close()
        log.end_chunk(state, metrics)
    return jax.tree.map(lambda x: x[0], state.agent)


FILM_STEPS = 500
"""The film of episodes is cut after so many steps."""
FILM_EPISODES = 4


def draw(config: Config, vector: VectorEnv, agent: Agent, log: run.Run) -> None:
    """All figures of a finished run."""
    log.print(f"learning curve  {pictures.draw_curve(log.folder, SCORES)}")
    title = f"{config.env}: last evaluation of {config.num_eval_envs} episodes"
    log.print(f"success rates   {pictures.draw_success(log.folder, vector.env.achievement_names, title)}")
    log.progress.show("filming the policy")
    key = run.evaluation_key(jax.random.key(config.seed))
    states, done = jax.jit(partial(record_episodes, config, vector))(agent, key)
    film = pictures.film_first_episodes(vector.env, states, done, str(log.folder / "rollout"))
    log.print(f"policy          {film}")


def record_episodes(config: Config, vector: VectorEnv, agent: Agent, key: Key[Array, ""]):
    """States (time, episodes, ...) of the first environments of `vector`, and which steps ended an episode."""
    start_key, key = jax.random.split(key)
    unused = Normaliser(*jnp.zeros(3))
    few = lambda x: x[:FILM_EPISODES]

    def body(acting, key):
        state = jax.tree.map(few, acting.envs.env)
        acting, seen = step(config, vector, agent, unused, acting, key)
        return acting, (state, few(seen.done))

    keys = jax.random.split(key, min(config.episode_length, FILM_STEPS))
    return jax.lax.scan(body, start_acting(config, vector, start_key), keys)[1]


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, AchievementEnv, Agent]:
    """Settings, environment and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    env = run.make_env(config.env, AchievementEnv, config.env_options)
    return config, env, run.load_agent(partial(make_agent, config, env), folder, config, seed)


if __name__ == "__main__":
    main()
