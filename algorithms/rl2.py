"""RL2 with PPO: meta-reinforcement learning by a recurrent network, in one file.

Duan et al., 'RL^2: Fast Reinforcement Learning via Slow Reinforcement Learning' (2016, arXiv 1611.02779), with PPO
(Schulman et al. 2017, arXiv 1707.06347), as in the CoCOA thesis' comparison.

An agent meets tasks that differ in their rewards or their physics, and is not told which one it is in. A trial is
several episodes in one task. The policy is a recurrent network that also sees its last action, its last reward and
whether the episode ended; its hidden state is kept from one episode of a trial to the next. So it can explore first and
use later what it found. PPO maximises the reward of the whole trial.

    python algorithms/rl2.py                                     a point finds goals it is not told (a minute)
    python algorithms/rl2.py --history=false                     without the last action, reward and end: it cannot know
    python algorithms/rl2.py --env half_cheetah_dir              forwards or backwards

The point tasks' recipe is for two CPU cores. Results, metrics and details: algorithms/rl2.md.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from envs import TaskFamily, TaskState, intact, select
from shared import pictures, run
from shared.networks import Dense
from shared.run import Count, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "*point_goal": """
        --total_env_steps 1_000_000 --episode_length 20 --num_trials 256 --reward_scale 0.5 --discount 0.9
        --gae_lambda 0.9 --update_epochs 6 --learning_rate 2e-3 --eval_repeats 5 --eval_every 100_000
        --checkpoint_every 500_000
    """,
    "metaworld_*": "--total_env_steps 2_500_000 --num_episodes 11 --num_trials 10 --num_minibatches 5 --width 256 "
    "--reward_scale 0.001",
}
"""Flags for environments whose name matches a pattern; a flag that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are for the robots; where they come from: algorithms/rl2.md."""

    env: str = "point_goal"
    """Task family to meta-train on: one of envs.FAMILIES."""
    total_env_steps: Steps = 10_000_000
    """Environment steps of a seed, without evaluations; rounded up to whole iterations."""
    episode_length: Count = 200
    """Time limit of an episode, in environment steps."""
    num_episodes: Annotated[int, Ge(2)] = 3
    """Episodes in a trial, in training and evaluation."""
    num_trials: Count = 40
    """Trials in an iteration, side by side, each in a train task drawn with replacement."""
    num_train_tasks: Count | None = None
    """Tasks to train on; by default the family's published number."""
    num_test_tasks: Count | None = None
    """Held-out tasks to test on; by default the family's published number."""
    history: bool = True
    """The networks see the last action, its reward and whether it ended the episode; without, zeros."""
    reward_scale: Positive = 0.1
    """Multiplies rewards, as inputs and in what PPO maximises."""
    discount: Share = 0.99
    """Discount of future rewards of the trial."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation."""
    per_episode: bool = False
    """Returns and advantages end with each episode instead of the trial."""
    update_epochs: Count = 10
    """Passes of PPO over the trials of an iteration."""
    num_minibatches: Count = 4
    """Minibatches of whole trials, and so gradient steps, in a pass."""
    clip: Positive = 0.2
    """PPO's limit on the change of the probability ratio."""
    value_weight: Weight = 0.5
    """Weight of the value loss, half a squared error."""
    entropy_weight: Weight = 0.0
    """Weight of the entropy bonus."""
    learning_rate: Positive = 1e-3
    """Adam's."""
    max_gradient_norm: Positive = 1.0
    """A gradient whose norm over all parameters is larger is scaled down to this."""
    width: Count = 64
    """Units of the recurrent layer, and of the one before it."""
    eval_repeats: Count = 1
    """Trials in each test task."""
    eval_every: Count = 500_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 2_000_000
    """Environment steps between checkpoints; the beginning and the end always have one."""


def settle(config: Config, family: TaskFamily) -> Config:
    """With the family's numbers of tasks where none are given. UserError if settings cannot work together."""
    message = f"num_minibatches is {config.num_minibatches}; it divides num_trials, which is {config.num_trials}"
    run.need(config.num_trials % config.num_minibatches == 0, message)
    return run.settle_tasks(config, family)


# ---- networks -----------------------------------------------------------------------------------------------------


class Recurrent(eqx.Module):
    """A tanh layer, a gated recurrent unit (Cho et al. 2014), a linear head."""

    first: Dense
    cell: eqx.nn.GRUCell
    head: Dense

    def __init__(self, in_size: int, width: int, out_size: int, key: Key[Array, ""]):
        first_key, cell_key, head_key = jax.random.split(key, 3)
        self.first = Dense(in_size, width, first_key)
        self.cell = eqx.nn.GRUCell(width, width, key=cell_key)
        self.head = Dense(width, out_size, head_key)

    def __call__(
        self, hidden: Float[Array, "trials hidden"], x: Float[Array, "trials in"], valid: Bool[Array, " trials"]
    ) -> tuple[Float[Array, "trials hidden"], Float[Array, "trials out"]]:
        """A step. Where it is not valid, the hidden state stays."""
        hidden = select(valid, jax.vmap(self.cell)(jnp.tanh(jax.vmap(self.first)(x)), hidden), hidden)
        return hidden, jax.vmap(self.head)(hidden)

    def whole(
        self, x: Float[Array, "time trials in"], valid: Bool[Array, "time trials"]
    ) -> Float[Array, "time trials out"]:
        """All steps of trials."""
        hidden = jnp.zeros((x.shape[1], self.cell.hidden_size))
        return jax.lax.scan(lambda hidden, step: self(hidden, *step), hidden, (x, valid))[1]


class Agent(NamedTuple):
    """All that learns."""

    actor: Recurrent  # history -> mean of the action
    log_std: Float[Array, " action"]  # of the action's Gaussian, everywhere
    critic: Recurrent  # history -> value of the rest of the trial, with scaled rewards


def make_agent(config: Config, family: TaskFamily, key: Key[Array, ""]) -> Agent:
    actor_key, critic_key = jax.random.split(key)
    in_size, action = family.observation_size + family.action_size + 2, family.action_size
    network = lambda out_size, key: Recurrent(in_size, config.width, out_size, key)
    return Agent(network(action, actor_key), jnp.zeros(action), network(1, critic_key))


def log_prob(
    agent: Agent, mean: Float[Array, "*batch action"], action: Float[Array, "*batch action"]
) -> Float[Array, "*batch"]:
    """log pi of actions, before they are cut off at the environment's bounds."""
    return jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(agent.log_std)).sum(axis=-1)


Series = Float[Array, "time trials"]  # a number for each step of each trial

# ---- trials -------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Steps of trials, the episodes of a trial one after another."""

    inputs: Float[Array, "time trials in"]
    action: Float[Array, "time trials action"]
    log_prob: Series
    reward: Series
    valid: Bool[Array, "time trials"]  # not after a fall: such rows count nowhere, and the hidden state rests


def inputs(
    config: Config, state: TaskState, action: Float[Array, "trials action"], reward: Float[Array, " trials"]
) -> Float[Array, "trials in"]:
    """What the networks see: the observation, and the action, reward and end that led to it."""
    before = jnp.concatenate([action, config.reward_scale * reward[:, None], state.terminated[:, None]], axis=1)
    return jnp.concatenate([state.observation, before * config.history], axis=1)


def play(
    config: Config,
    family: TaskFamily,
    agent: Agent,
    tasks: Float[Array, "trials task"],
    sampled: bool,
    key: Key[Array, ""],
    record=lambda before, after: (),
) -> tuple[Rows, Int[Array, ""], PyTree]:
    """A trial in each task, with sampled actions or the mean ones: its steps, how many of them the simulator failed in,
    and record(before, after) of each, (episode, time, trials, ...)."""
    trials = len(tasks)

    def step(carry, key):
        state, hidden, x = carry
        valid = ~state.terminated
        hidden, mean = agent.actor(hidden, x, valid)
        noise = jax.random.normal(key, mean.shape) if sampled else 0.0
        action = mean + jnp.exp(agent.log_std) * noise
        after, broken = intact(state, jax.vmap(family.step)(state, jnp.clip(action, -1, 1)))
        reward = jnp.where(valid, after.reward, 0)
        row = Rows(x, action, log_prob(agent, mean, action), reward, valid)
        x = inputs(config, after, action, reward)
        # a robot that fell stays as it was
        return (select(valid, after, state), hidden, x), (row, (broken & valid).sum(), record(state, after))

    def episode(hidden, key):
        start_key, key = jax.random.split(key)
        state = jax.vmap(family.reset)(jax.random.split(start_key, trials))
        state = jax.vmap(family.with_task)(state, tasks)
        # nothing led to the first observation of an episode, also of a later one
        x = inputs(config, state, jnp.zeros((trials, family.action_size)), jnp.zeros(trials))
        keys = jax.random.split(key, config.episode_length)
        (_, hidden, _), steps = jax.lax.scan(step, (state, hidden, x), keys)
        return hidden, steps

    hidden = jnp.zeros((trials, config.width))
    _, (rows, broken, recorded) = jax.lax.scan(episode, hidden, jax.random.split(key, config.num_episodes))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows), broken.sum(), recorded


# ---- losses -------------------------------------------------------------------------------------------------------


def advantages(config: Config, rows: Rows, value: Series) -> Series:
    """Generalised advantages over whole trials (Schulman et al. 2016), after which there is nothing. Steps that are not
    valid take no time. With per_episode, there is nothing after each episode either."""
    last = jnp.arange(1, len(value) + 1) % config.episode_length == 0

    def backward(after, step):
        reward, value, valid, last = step
        next_value, next_advantage = select(last & config.per_episode, jax.tree.map(jnp.zeros_like, after), after)
        advantage = reward + config.discount * (next_value + config.gae_lambda * next_advantage) - value
        after = select(valid, (value, advantage), (next_value, next_advantage))
        return after, jnp.where(valid, advantage, 0)

    nothing = jnp.zeros_like(value[0]), jnp.zeros_like(value[0])
    steps = config.reward_scale * rows.reward, value, rows.valid, jnp.broadcast_to(last[:, None], value.shape)
    return jax.lax.scan(backward, nothing, steps, reverse=True)[1]


def ppo_loss(agent: Agent, rows: Rows, advantage: Series, returns: Series, config: Config) -> tuple[Array, dict]:
    """PPO's clipped loss, half the squared error of the value, and the entropy bonus: means over valid steps.

    The networks run through whole trials again, from the hidden state that a trial starts with."""
    mean = lambda x: jnp.sum(x * rows.valid) / rows.valid.sum()
    new = log_prob(agent, agent.actor.whole(rows.inputs, rows.valid), rows.action)
    ratio = jnp.exp(new - rows.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -mean(jnp.minimum(ratio * advantage, clipped * advantage))
    value = agent.critic.whole(rows.inputs, rows.valid)[..., 0]
    value_loss = 0.5 * mean((value - returns) ** 2)
    entropy = jnp.sum(agent.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e))
    info = {
        "train/policy_loss": policy_loss,
        "train/value_loss": value_loss,
        "train/entropy": entropy,
        "train/kl": mean(ratio - 1 - (new - rows.log_prob)),
        "train/clipped": mean(jnp.abs(ratio - 1) > config.clip),
    }
    return policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy, info


# ---- state --------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Agent
    optimizer: optax.OptState
    train_tasks: Float[Array, "train_tasks task"]
    test_tasks: Float[Array, "test_tasks task"]
    env_steps: Int[Array, ""]
    gradient_steps: Int[Array, ""]
    broken: Int[Array, ""]  # steps in which the simulator failed
    key: Key[Array, ""]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(config.learning_rate))


def init(config: Config, family: TaskFamily, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, task_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    agent = make_agent(config, family, agent_key)
    train_tasks, test_tasks = family.tasks(task_key, config.num_train_tasks, config.num_test_tasks)
    return TrainState(
        agent=agent,
        optimizer=make_optimizer(config).init(agent),
        train_tasks=jnp.copy(train_tasks),
        test_tasks=jnp.copy(test_tasks),
        env_steps=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def learn(config: Config, family: TaskFamily, state: TrainState) -> tuple[TrainState, dict]:
    """An iteration: trials in train tasks, then the passes of PPO over them. Metrics have one entry a gradient step."""
    key, task_key, play_key, update_key = jax.random.split(state.key, 4)
    tasks = jax.random.choice(task_key, state.train_tasks, (config.num_trials,))
    rows, broken, _ = play(config, family, state.agent, tasks, True, play_key)
    value = state.agent.critic.whole(rows.inputs, rows.valid)[..., 0]
    advantage = advantages(config, rows, value)
    returns = advantage + value
    mean = jnp.mean(advantage, where=rows.valid)
    advantage = (advantage - mean) / (jnp.std(advantage, where=rows.valid) + 1e-8)

    def one_step(carry, trials):
        agent, optimizer = carry
        minibatch = jax.tree.map(lambda x: x[:, trials], (rows, advantage, returns))
        gradient, info = jax.grad(ppo_loss, has_aux=True)(agent, *minibatch, config)
        updates, optimizer = make_optimizer(config).update(gradient, optimizer)
        return (optax.apply_updates(agent, updates), optimizer), info

    keys = jax.random.split(update_key, config.update_epochs)
    minibatches = jax.vmap(lambda key: jax.random.permutation(key, config.num_trials))(keys)
    minibatches = minibatches.reshape(config.update_epochs * config.num_minibatches, -1)
    (agent, optimizer), metrics = jax.lax.scan(one_step, (state.agent, state.optimizer), minibatches)
    state = state._replace(
        agent=agent,
        optimizer=optimizer,
        env_steps=state.env_steps + rows.reward.size,
        gradient_steps=state.gradient_steps + len(minibatches),
        broken=state.broken + broken,
        key=key,
    )
    metrics |= dict(zip(("train/return_first", "train/return_last"), first_and_last(config, rows)))
    return state, metrics | {"train/broken_steps": state.broken}


def first_and_last(config: Config, rows: Rows) -> Float[Array, "2"]:
    """Mean returns of the first and the last episode of trials."""
    returns = rows.reward.reshape(config.num_episodes, config.episode_length, -1).sum(axis=1).mean(axis=1)
    return returns[jnp.array([0, -1])]


# ---- evaluation ---------------------------------------------------------------------------------------------------

SCORES = run.Scores(
    "return on test tasks", {"eval/return_adapted": "last episode of a trial", "eval/return_prior": "first episode"}
)


def evaluate(
    config: Config, family: TaskFamily, agent: Agent, test_tasks: Float[Array, "tasks task"], key: Key[Array, ""]
) -> dict:
    """Returns of first and last episodes of trials in the test tasks, mean actions; success where a family knows it."""
    tasks = jnp.tile(test_tasks, (config.eval_repeats, 1))
    solved = lambda _, after: family.solved(after) if family.solved else ()
    rows, _, solved = play(config, family, agent, tasks, False, key, solved)
    metrics = dict(zip(("eval/return_prior", "eval/return_adapted"), first_and_last(config, rows)))
    return metrics | ({"eval/success_adapted": solved[-1].any(axis=0).mean()} if family.solved else {})


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    given = run.configure(Config, RECIPES, __doc__, argv)
    family = run.make_env(given.env, TaskFamily, given.env_options)
    config = settle(given, family)
    with run.Run(given, "rl2", RECIPES, SCORES, worlds=[family]) as log:
        train(config, family, log)


def train(config: Config, family: TaskFamily, log: run.Run) -> None:
    """Begins or resumes, then learns, then draws."""
    begin = log.over_seeds(partial(init, config, family))
    shapes = jax.eval_shape(begin, log.seeds)
    tasks = f"{config.num_train_tasks} train tasks, {config.num_test_tasks} test tasks, by {family.simulator}"
    log.describe(
        f"a trial is {config.num_episodes} episodes in one task",
        tasks,
        actor=shapes.agent[:2],
        critic=shapes.agent.critic,
    )
    state = log.restore(shapes)
    learn_chunk = log.compile("learn", partial(learn, config, family), shapes, donate=family.in_jax)
    score = log.compile("evaluate", partial(evaluate, config, family), shapes.agent, shapes.test_tasks, log.seeds)
    if state is None:
        state = begin(log.seeds)
    while log.going(state):
        state, metrics = learn_chunk(state)
        if log.evaluates(state):
            metrics |= score(state.agent, state.test_tasks, log.evaluation_keys(state))
        log.end_chunk(state, metrics)
    log.draw("learning curve", pictures.draw_curve, log.folder, SCORES, bottom=None)
    agent, tasks = run.one_seed((state.agent, state.test_tasks))
    key = run.evaluation_key(jax.random.key(config.seed))
    log.draw("last episode", film, config, family, agent, tasks, key, str(log.folder / "rollout"))


def film(config: Config, family: TaskFamily, agent: Agent, tasks, key: Key[Array, ""], stem: str) -> str:
    """Draws the last episode of a trial in each of the first six tasks, with mean actions: the path."""
    record = lambda agent, tasks: play(config, family, agent, tasks, False, key, lambda before, _: before)[2]
    states: TaskState = jax.device_get(jax.jit(record)(agent, tasks[:6]))
    return family.render(jax.tree.map(lambda x: x[-1].swapaxes(0, 1), states), stem)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, TaskFamily, Agent]:
    """Settings, task family and networks of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    family = run.make_env(config.env, TaskFamily, config.env_options)
    config = settle(config, family)
    return config, family, run.load_agent(partial(make_agent, config, family), folder, config, seed)


if __name__ == "__main__":
    main()
