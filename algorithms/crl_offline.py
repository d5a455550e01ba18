"""Contrastive RL from data that are given, in one file; with behaviour cloning and a quasimetric for comparison.

'Contrastive Learning as Goal-Conditioned Reinforcement Learning' (Eysenbach et al. 2022, arXiv 2206.07568) as OGBench
(Park et al. 2024, arXiv 2410.20092) runs it on data sets, and two of OGBench's agents it is compared with: GCBC (Lynch
et al. 2020; Ghosh et al. 2019) and QRL (Wang et al. 2023, arXiv 2304.01203).

The critic is the inner product of an embedding of state and action and one of a goal, phi(s, a) . psi(g). Trained to
tell the state that came later in the same episode from those of others, by binary NCE, it grows with the probability
that a leads from s to g. The actor maximises it, and stays near the actions of the data (DDPG+BC).

    python algorithms/crl_offline.py                                    the scripted expert's data of a medium maze
    python algorithms/crl_offline.py --agent qrl                        quasimetric RL on them
    python algorithms/crl_offline.py --env pointmaze_large --depth 16   the residual networks of crl.py
    python algorithms/crl_offline.py --data pointmaze-medium-navigate-v0.npz      a file of OGBench

The settings are OGBench's. Results, metrics and details: algorithms/crl_offline.md.
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
from annotated_types import Ge, MultipleOf
from jaxtyping import Array, Float, Int, Key

from envs import OGBENCH, GoalEnv
from envs.ogbench_point import PointMaze
from shared import evaluation, offline, pictures, run
from shared.networks import Dense, ResidualMLP, over_batch
from shared.run import Count, Fraction, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "--mixed_loss": "--bc_weight 0.05 --width 1024 --latent_size 16",
    "*maze_giant": "--discount 0.995",
}
"""Flags for environments whose name matches a pattern, or for a flag that is on; one that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are OGBench's for its point mazes, data 'navigate'."""

    env: str = "pointmaze_medium"
    """Environment of data and scores: pointmaze_medium, _large, _giant, _teleport; antmaze_ the same, with a file."""
    data: str = "navigate"
    """'navigate' or 'stitch', which the scripted expert makes for each seed anew, or an OGBench file (.npz)."""
    data_rows: Count = 1_000_000
    """Steps that the expert makes, rounded up to whole episodes; without effect on a file."""
    agent: Literal["crl", "gcbc", "qrl"] = "crl"
    """Contrastive RL, goal-conditioned behaviour cloning, or quasimetric RL."""
    total_gradient_steps: Steps = 1_000_000
    """Gradient steps of a seed; rounded up to whole chunks."""
    chunk: Count = 1000
    """Gradient steps in one call of the compiled program."""
    batch_size: Count = 1024
    """Rows in a gradient step."""
    discount: Fraction = 0.99
    """How far ahead the critic's goals of crl are: offset k has probability proportional to discount^k."""
    random_goals: Share | None = None
    """Share of the actor's goals that are any state of the data, not later ones; by default OGBench's (page)."""
    bc_weight: Weight | None = None
    """Weight alpha of the data's actions in the actor's loss; gcbc has nothing else. By default OGBench's (page)."""
    mixed_loss: bool = False
    """The actor's loss as in 2022, bc_weight (-log pi) + (1 - bc_weight)(-q), without dividing by the size of q."""
    latent_size: Annotated[int, Ge(8), MultipleOf(8)] = 512
    """Length of an embedding of crl and qrl."""
    width: Count = 512
    """Units in each layer."""
    depth: Annotated[int, Ge(0), MultipleOf(4)] = 0
    """Layers in residual blocks, as in crl.py; 0: OGBench's three hidden layers."""
    learning_rate: Positive = 3e-4
    """Adam's, for all networks."""
    episode_length: Count = 1000
    """Time limit of an episode that is scored, in steps."""
    num_eval_episodes: Count = 50
    """Episodes of each of the five tasks in an evaluation."""
    eval_every: Count = 100_000
    """Gradient steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 100_000
    """Gradient steps between checkpoints; the beginning and the end always have one."""


def settle(config: Config) -> Config:
    """With OGBench's settings where none are given. UserError if mixed_loss has nothing to mix."""
    explore, stitch = (kind in Path(config.data).name for kind in ("explore", "stitch"))
    # in point mazes, in ant mazes, and where the ant explored
    usual = {"crl": (0.03, 0.1, 0.003), "qrl": (0.0003, 0.003, 0.001), "gcbc": (1.0, 1.0, 1.0)}[config.agent]
    weight = usual[2 if explore else config.env.startswith("antmaze")] if config.bc_weight is None else config.bc_weight
    anywhere = 0.0 if config.agent == "gcbc" else 1.0 if explore else 0.5 * stitch
    random = anywhere if config.random_goals is None else config.random_goals
    fits = not config.mixed_loss or (config.agent != "gcbc" and weight <= 1)
    run.need(fits, f"mixed_loss mixes crl or qrl with a bc_weight of at most 1; these are {config.agent} and {weight}")
    return dataclasses.replace(config, bc_weight=weight, random_goals=random)


# ---- networks -----------------------------------------------------------------------------------------------------

States = Float[Array, "batch state"]


class Tower(eqx.Module):
    """OGBench's network: three hidden layers of GELU, and LayerNorm after each in critics."""

    layers: list[Dense]
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, in_size: int, width: int, out_size: int, norm: bool, final: float, key: Key[Array, ""]):
        def layer(fan_in, fan_out, variance, key):  # over the mean of both fans
            dense, scale = Dense(fan_in, fan_out, key), math.sqrt(6 * variance * fan_in / (fan_in + fan_out))
            return eqx.tree_at(lambda x: x.weight, dense, scale * dense.weight)

        sizes = [(in_size, width, 1), (width, width, 1), (width, width, 1), (width, out_size, final)]
        self.layers = [layer(*size, key) for size, key in zip(sizes, jax.random.split(key, 4))]
        self.norms = [eqx.nn.LayerNorm(width, eps=1e-6) for _ in range(3 * norm)]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        for i, layer in enumerate(self.layers[:-1]):
            x = jax.nn.gelu(layer(x))
            x = self.norms[i](x) if self.norms else x
        return self.layers[-1](x)


class Agent(NamedTuple):
    """All that learns; None where the agent has no such network."""

    actor: Tower | ResidualMLP  # (s, g) -> mean of the action
    phi: Tower | ResidualMLP | None  # CRL: (s, a) -> embedding, two of them. QRL: (z, a) -> the change of z
    psi: Tower | ResidualMLP | None  # CRL: g -> embedding, two of them. QRL: s -> z
    scalars: Float[Array, "2"] | None
    """QRL: before the sigmoid, the share of the mean in the distance; the logarithm of the multiplier lambda."""


def make_agent(config: Config, env: GoalEnv, key: Key[Array, ""]) -> Agent:
    actor_key, phi_key, psi_key = jax.random.split(key, 3)
    state, action, latent = env.observation_size, env.action_size, config.latent_size

    def network(in_size, out_size, key, norm=True, final=1.0):
        if config.depth:
            return ResidualMLP(in_size, config.width, config.depth, out_size, key)
        return Tower(in_size, config.width, out_size, norm, final, key)

    actor = network(2 * state, action, actor_key, norm=False, final=0.01)
    if config.agent == "gcbc":
        return Agent(actor, None, None, None)
    if config.agent == "qrl":
        return Agent(actor, network(latent + action, latent, phi_key), network(state, latent, psi_key), jnp.zeros(2))
    two = lambda in_size, key: eqx.filter_vmap(lambda key: network(in_size, latent, key))(jax.random.split(key))
    return Agent(actor, two(state + action, phi_key), two(state, psi_key), None)


class UnitGaussian(NamedTuple):
    """The policy: a Gaussian of variance 1; the environment gets its actions clipped to [-1, 1]."""

    mean: Float[Array, "*batch action"]

    def mode(self) -> Float[Array, "*batch action"]:
        return jnp.clip(self.mean, -1, 1)

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch action"]:
        return jnp.clip(self.mean + jax.random.normal(key, self.mean.shape), -1, 1)

    def log_prob(self, action: Float[Array, "*batch action"]) -> Float[Array, "*batch"]:
        return jax.scipy.stats.norm.logpdf(action, self.mean).sum(axis=-1)


def policy(agent: Agent, observation: Float[Array, "*batch state"], goal: Float[Array, "*batch state"]) -> UnitGaussian:
    """pi(. | s, g)."""
    return UnitGaussian(over_batch(agent.actor, jnp.concatenate([observation, goal], axis=-1)))


def both(networks, x: Float[Array, "batch in"]) -> Float[Array, "2 batch out"]:
    return jax.vmap(lambda network: over_batch(network, x))(networks)


def logits(
    agent: Agent,
    observation: States,
    action: Float[Array, "batch action"],
    goal: Float[Array, "goals state"],
    pairs: str = "kid,kjd->kij",
) -> Float[Array, "2 batch *goals"]:
    """CRL: phi(s_i, a_i) . psi(g_j) / sqrt(latent) of both critics, for all pairs or each row's own."""
    phi = both(agent.phi, jnp.concatenate([observation, action], axis=-1))
    return jnp.einsum(pairs, phi, both(agent.psi, goal)) / math.sqrt(phi.shape[-1])


def distance(
    agent: Agent, x: Float[Array, "*batch latent"], y: Float[Array, "*batch latent"]
) -> Float[Array, "*batch"]:
    """QRL's d(x, y), an interval quasimetric (Wang and Isola 2022): in groups of 8, the length of the union of the
    intervals [x_k, y_k]; then a learned mixture of the groups' mean and maximum."""
    low, high = (z.reshape(*z.shape[:-1], -1, 8) for z in (x, jnp.maximum(x, y)))
    # [..., k, j]: interval j begins before interval k, or with it and has the lower number
    before = low[..., None, :] < low[..., None]
    before |= (low[..., None, :] == low[..., None]) & jnp.tri(8, k=-1, dtype=bool)
    covered = jnp.max(high[..., None, :], axis=-1, initial=-jnp.inf, where=before)
    length = jnp.maximum(high - jnp.maximum(low, covered), 0).sum(axis=-1)
    share = jax.nn.sigmoid(agent.scalars[0])
    return share * length.mean(axis=-1) + (1 - share) * length.max(axis=-1)


def q_value(
    config: Config, agent: Agent, observation: States, action: Float[Array, "batch action"], goal: States
) -> Float[Array, " batch"]:
    """What the actor maximises: the smaller of CRL's two logits; minus QRL's distance from the predicted next state."""
    if config.agent == "crl":
        return logits(agent, observation, action, goal, "kid,kid->ki").min(axis=0)
    z = over_batch(agent.psi, observation)
    following = z + over_batch(agent.phi, jnp.concatenate([z, action], axis=-1))
    return -distance(agent, following, over_batch(agent.psi, goal))


# ---- losses -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of the data, and goals for them."""

    observation: States
    action: Float[Array, "batch action"]
    next_observation: States
    future: States  # later in the episode, at a geometric distance
    anywhere: States  # any state of the data
    actor_goal: States


def contrastive_loss(agent: Agent, batch: Batch) -> tuple[Float[Array, ""], dict]:
    """Binary NCE: the mean over all pairs (i, j) of the cross-entropy of the logit with the label 'i is j'."""
    pairs = logits(agent, batch.observation, batch.action, batch.future)
    own = jnp.eye(pairs.shape[-1])
    loss = optax.sigmoid_binary_cross_entropy(pairs, own).mean()
    info = {
        "train/critic_loss": loss,
        "train/logits_pos": jnp.sum(pairs * own) / jnp.sum(own) / 2,
        "train/logits_neg": jnp.sum(pairs * (1 - own)) / jnp.sum(1 - own) / 2,
        "train/accuracy": jnp.mean(pairs.argmax(axis=2) == jnp.arange(pairs.shape[-1])),
    }
    return loss, info


def quasimetric_loss(agent: Agent, batch: Batch) -> tuple[Float[Array, ""], dict]:
    """QRL: states are pushed apart, but a step is not longer than 1 (a Lagrangian with multiplier lambda, which the
    last term raises); and the next latent state is predicted."""
    z, following, goal = (over_batch(agent.psi, x) for x in (batch.observation, batch.next_observation, batch.anywhere))
    apart = jnp.mean(100 * jax.nn.softplus(5 - distance(agent, z, goal) / 100))
    excess = jnp.mean(jax.nn.relu(distance(agent, z, following) - 1) ** 2) - 0.05
    multiplier, fixed = jnp.exp(agent.scalars[1]), jax.lax.stop_gradient
    lagrangian = apart + fixed(multiplier) * excess - multiplier * fixed(excess)
    predicted = z + over_batch(agent.phi, jnp.concatenate([z, batch.action], axis=-1))
    dynamics = 0.5 * jnp.mean(distance(agent, following, predicted) + distance(agent, predicted, following))
    info = {
        "train/critic_loss": apart + multiplier * excess,
        "train/step_excess": excess,
        "train/lambda": multiplier,
        "train/dynamics_loss": dynamics,
    }
    return lagrangian + dynamics, info


def actor_loss(actor, agent: Agent, batch: Batch, config: Config) -> tuple[Float[Array, ""], dict]:
    """DDPG+BC: -mean q(s, mean action, g) / mean |q| - alpha mean log pi(a | s, g). GCBC: the latter alone."""
    chosen = policy(agent._replace(actor=actor), batch.observation, batch.actor_goal)
    log_prob = chosen.log_prob(batch.action).mean()
    info = {"train/log_prob": log_prob, "train/action_error": jnp.mean((chosen.mode() - batch.action) ** 2)}
    if config.agent == "gcbc":
        return -log_prob, info | {"train/actor_loss": -log_prob}
    q = q_value(config, agent, batch.observation, chosen.mode(), batch.actor_goal)
    if config.mixed_loss:
        loss = -config.bc_weight * log_prob - (1 - config.bc_weight) * q.mean()
    else:
        scale = jax.lax.stop_gradient(jnp.abs(q).mean()) + 1e-6
        loss = -q.mean() / scale - config.bc_weight * log_prob
    return loss, info | {"train/actor_loss": loss, "train/q": q.mean()}


# ---- state --------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds, but for the data."""

    agent: Agent
    optimizer: optax.OptState
    data: offline.Data
    recent: Float[Array, "3"]
    """Successes of the last three evaluations."""
    gradient_steps: Int[Array, ""]
    key: Key[Array, ""]


def init(config: Config, env: GoalEnv, data: offline.Data, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, key, _, _ = jax.random.split(key, 4)  # the third made the data; the fourth is for evaluations
    agent = make_agent(config, env, agent_key)
    return TrainState(
        agent=agent,
        optimizer=optax.adam(config.learning_rate).init(agent),
        data=data,
        recent=jnp.full(3, jnp.nan),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def sample(config: Config, data: offline.Data, key: Key[Array, ""]) -> Batch:
    """Uniform rows; goals by OGBench's laws."""
    row_key, future_key, uniform_key, anywhere_key, random_key, mix_key = jax.random.split(key, 6)
    row = offline.rows(data, row_key, config.batch_size)
    future = offline.geometric_future(data, row, future_key, config.discount)
    later = offline.uniform_future(data, row, uniform_key)
    anywhere, random = (offline.rows(data, key, config.batch_size) for key in (anywhere_key, random_key))
    actor_goal = jnp.where(jax.random.bernoulli(mix_key, config.random_goals, row.shape), random, later)
    states = (data.observation[i] for i in (row + 1, future, anywhere, actor_goal))
    return Batch(data.observation[row], data.action[row], *states)


def update(config: Config, state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict]:
    """One gradient step of critic and actor, both at the old parameters, by one Adam."""
    agent, batch = state.agent, sample(config, state.data, key)
    actor_gradient, info = jax.grad(actor_loss, has_aux=True)(agent.actor, agent, batch, config)
    gradient = jax.tree.map(jnp.zeros_like, agent)
    if config.agent != "gcbc":
        critic_loss = contrastive_loss if config.agent == "crl" else quasimetric_loss
        gradient, critic_info = jax.grad(critic_loss, has_aux=True)(agent, batch)
        info |= critic_info
    gradient = gradient._replace(actor=actor_gradient)
    updates, optimizer = optax.adam(config.learning_rate).update(gradient, state.optimizer)
    agent = optax.apply_updates(agent, updates)
    return state._replace(agent=agent, optimizer=optimizer, gradient_steps=state.gradient_steps + 1), info


def learn(config: Config, state: TrainState) -> tuple[TrainState, dict]:
    """A chunk of gradient steps; each metric has one entry a step."""
    key, update_key = jax.random.split(state.key)
    keys = jax.random.split(update_key, config.chunk)
    return jax.lax.scan(partial(update, config), state._replace(key=key), keys)


# ---- evaluation ---------------------------------------------------------------------------------------------------

SCORES = run.Scores(
    "episodes that reach their goal", {"eval/success": "mean of five tasks", "eval/score": "last three evaluations"}
)


def evaluate(
    config: Config, env: PointMaze, agent: Agent, recent: Float[Array, "3"], key: Key[Array, ""]
) -> tuple[Float[Array, "3"], dict]:
    """Success in the five tasks with mean actions, at any step; `recent` is that of the last three evaluations."""
    reset_key, play_key = jax.random.split(key)
    tasks = jnp.repeat(jnp.arange(len(env.tasks)), config.num_eval_episodes)
    start = jax.vmap(env.begin)(tasks, jax.random.split(reset_key, len(tasks)))
    sampled, act, reached = jnp.zeros(len(tasks), bool), partial(policy, agent), lambda state: state.reward > 0
    solved = evaluation.play(env, act, start, sampled, config.episode_length, play_key, reached).any(axis=0)
    rates = solved.reshape(len(env.tasks), -1).mean(axis=1)
    recent = jnp.append(recent[1:], rates.mean())
    metrics = {f"eval/success_task{i + 1}": rate for i, rate in enumerate(rates)}
    return recent, metrics | {"eval/success": rates.mean(), "eval/score": jnp.nanmean(recent)}


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    given = run.configure(Config, RECIPES, __doc__, argv)
    env, config = run.make_env(given.env, GoalEnv, given.env_options), settle(given)
    run.need(isinstance(env, PointMaze), f"env is {config.env}; data are there for {', '.join(OGBENCH)}")
    data = None if env.in_jax and config.data in offline.SCRIPTED else offline.load(config.data, env)
    with run.Run(given, "crl_offline", RECIPES, SCORES, unsaved=("data",), worlds=[env]) as log:
        agent = train(config, env, data, log)
        value = lambda s, g: q_value(config, agent, s, policy(agent, s, g).mode(), g)  # of the mean action
        value = value if env.in_jax and config.agent != "gcbc" else None
        pictures.draw_goal_reaching(log, env, None, partial(policy, agent), value, config.episode_length)


def train(config: Config, env: PointMaze, data: offline.Data | None, log: run.Run) -> Agent:
    """Makes the data, begins or resumes, then learns. Returns the agent of the first seed."""
    if data is None:
        log.progress.show("the expert makes its data")
        make = lambda key: offline.demonstrate(env, config.data, config.data_rows, jax.random.split(key, 4)[2])
        data = jax.block_until_ready(log.over_seeds(make)(log.seeds))
    else:
        data = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_seeds, *x.shape)), data)
    begin = log.over_seeds(partial(init, config, env))
    shapes = jax.eval_shape(begin, data, log.seeds)
    log.describe(f"{config.agent} on {data.rows.shape[1]:,} steps of {config.data}", agent=shapes.agent)
    state = log.restore(shapes)
    learn_chunk = log.compile("learn", partial(learn, config), shapes, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, env), shapes.agent, shapes.recent, log.seeds)
    state = begin(data, log.seeds) if state is None else state._replace(data=data)
    while log.going(state):
        state, metrics = learn_chunk(state)
        if log.evaluates(state):
            recent, scores = score(state.agent, state.recent, log.evaluation_keys(state))
            state, metrics = state._replace(recent=recent), metrics | scores
        log.end_chunk(state, metrics)
    return run.one_seed(state.agent)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, GoalEnv, Agent]:
    """Settings, environment and networks of a run, of its first seed or another; only reads (see the README)."""
    config = settle(run.load_config(Config, folder))
    env = run.make_env(config.env, GoalEnv, config.env_options)
    return config, env, run.load_agent(partial(make_agent, config, env), folder, config, seed)


if __name__ == "__main__":
    main()
