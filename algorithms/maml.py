"""MAML with TRPO: meta-reinforcement learning by one gradient step, in one file.

Finn et al., 'Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks' (2017, arXiv 1703.03400), whose outer
step is TRPO's (Schulman et al. 2015, arXiv 1502.05477), as in the CoCOA thesis' comparison.

An agent meets tasks that differ in their rewards or their physics, and is not told which one it is in. It acts for some
episodes by its policy, takes one step of policy gradient on them, and acts by the adapted policy. Training changes the
policy so that this one step helps most: the gradient goes through the step. How far training may move the adapted
policies is bounded by a KL divergence.

    python algorithms/maml.py                                     a point finds goals it is not told (a minute)
    python algorithms/maml.py --first_order                       the inner gradient taken as constant
    python algorithms/maml.py --env half_cheetah_dir              forwards or backwards
    python algorithms/maml.py --resume runs/maml/...              go on with a run

The point tasks have a recipe (RECIPES below), for two CPU cores. Results, metrics and details: algorithms/maml.md.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from envs import TaskFamily, TaskState, intact, select
from shared import pictures, run
from shared.networks import Dense, over_batch
from shared.run import Count, Fraction, Positive, Share, Steps, Weight

# ---- config -------------------------------------------------------------------------------------------------------

RECIPES = {
    "*point_goal": """
        --total_env_steps 480_000 --episode_length 20 --num_tasks 20 --num_episodes 20 --eval_repeats 5
        --eval_every 48_000 --checkpoint_every 240_000
    """,
    "metaworld_*": "--total_env_steps 2_500_000 --num_tasks 10 --num_episodes 10",
}
"""Flags for environments whose name matches a pattern; a flag that is given overrides them."""


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    """Defaults are for the robots; where they come from: algorithms/maml.md."""

    env: str = "point_goal"
    """Task family to meta-train on: one of envs.FAMILIES."""
    total_env_steps: Steps = 20_000_000
    """Environment steps of a seed, without evaluations; rounded up to whole iterations."""
    episode_length: Count = 200
    """Time limit of an episode, in environment steps."""
    num_tasks: Count = 20
    """Train tasks in an iteration, drawn with replacement."""
    num_episodes: Annotated[int, Ge(2)] = 20
    """Episodes in each task before the inner step, and as many after it; in evaluation too."""
    num_train_tasks: Count | None = None
    """Tasks to train on; by default the family's published number."""
    num_test_tasks: Count | None = None
    """Held-out tasks to test on; by default the family's published number."""
    inner_lr: Positive = 0.1
    """Size of the inner gradient step."""
    inner_loss: Literal["ratio", "log_likelihood"] = "ratio"
    """Of the probabilities of actions, weighted by advantages: their ratio to those that acted, or their logarithm. The
    gradients are equal, what the outer gradient sees of them is not."""
    first_order: bool = False
    """Take the inner gradient as constant in the outer one."""
    max_kl: Positive = 0.01
    """Bound on the mean KL divergence of the adapted policies, from before the outer step to after it."""
    cg_iterations: Count = 10
    """Iterations of conjugate gradients for the outer step's direction."""
    damping: Weight = 1e-5
    """Added to the diagonal of the Hessian of the divergence."""
    line_search_steps: Count = 15
    """Tries of the outer step, each 0.8 times as long as the one before."""
    baseline: bool = True
    """Subtract a linear baseline, fitted to each task's episodes; without, returns are only normalised."""
    discount: Fraction = 0.99
    """Discount of future rewards of the episode."""
    gae_lambda: Share = 1.0
    """Lambda of generalised advantage estimation."""
    action_scale: Positive = 1.0
    """Multiplies actions before they are cut off at the environment's bounds; published 0.1 for robots."""
    width: Count = 64
    """Units of the policy's two hidden layers."""
    eval_repeats: Count = 1
    """Adaptations in each test task."""
    eval_every: Count = 1_000_000
    """Environment steps between evaluations; the end of the run always has one."""
    checkpoint_every: Count = 4_000_000
    """Environment steps between checkpoints; the beginning and the end always have one."""


# ---- policy -------------------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """All that learns: a tanh network for the mean of a Gaussian, and its log standard deviation, everywhere."""

    layers: tuple[Dense, ...]
    log_std: Float[Array, " action"]

    def mean(self, observation: Float[Array, " observation"]) -> Float[Array, " action"]:
        x = observation
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def make_agent(config: Config, family: TaskFamily, key: Key[Array, ""]) -> Policy:
    sizes = family.observation_size, config.width, config.width, family.action_size
    layers = [Dense(*ends, key) for *ends, key in zip(sizes, sizes[1:], jax.random.split(key, 3))]
    return Policy(tuple(layers), jnp.zeros(family.action_size))


def log_prob(
    mean: Float[Array, "*batch action"], log_std: Float[Array, " action"], action: Float[Array, "*batch action"]
):
    """log density of actions, before they are scaled and cut off."""
    return jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).sum(axis=-1)


def kl(mean, log_std, new_mean, new_log_std):
    """KL divergence of Gaussians, from the first to the second, (*batch)."""
    squared = jnp.exp(2 * log_std) + (mean - new_mean) ** 2
    return jnp.sum(new_log_std - log_std + squared / (2 * jnp.exp(2 * new_log_std)) - 0.5, axis=-1)


# ---- episodes -----------------------------------------------------------------------------------------------------

Series = Float[Array, "time episodes"]  # a number for each step of each episode


class Rows(NamedTuple):
    """Steps of episodes in one task, and the policy that took them."""

    observation: Float[Array, "time episodes observation"]
    action: Float[Array, "time episodes action"]
    mean: Float[Array, "time episodes action"]
    log_std: Float[Array, " action"]
    reward: Series
    valid: Bool[Array, "time episodes"]  # not after a fall: such rows count nowhere


def play(
    config: Config,
    family: TaskFamily,
    policy: Policy,
    task: Float[Array, " task"],
    sampled: bool,
    key: Key[Array, ""],
    record=lambda before, after: (),
) -> tuple[Rows, Int[Array, ""], PyTree]:
    """Episodes in a task, with sampled actions or the mean ones: their steps, in how many of them the simulator failed,
    and record(before, after) of each."""
    start_key, key = jax.random.split(key)

    def step(state, key):
        mean = over_batch(policy.mean, state.observation)
        action = mean + jnp.exp(policy.log_std) * (jax.random.normal(key, mean.shape) if sampled else 0.0)
        after = jax.vmap(family.step)(state, jnp.clip(config.action_scale * action, -1, 1))
        after, broken = intact(state, after)
        valid = ~state.terminated
        row = Rows(state.observation, action, mean, policy.log_std, jnp.where(valid, after.reward, 0), valid)
        # a robot that fell stays as it was
        return select(valid, after, state), (row, (broken & valid).sum(), record(state, after))

    start = jax.vmap(family.reset)(jax.random.split(start_key, config.num_episodes))
    start = jax.vmap(family.with_task, (0, None))(start, task)
    _, (rows, broken, recorded) = jax.lax.scan(step, start, jax.random.split(key, config.episode_length))
    return rows._replace(log_std=policy.log_std), broken.sum(), recorded


def fitted(config: Config, rows: Rows) -> Series:
    """The linear baseline of these episodes: returns regressed on the observation, its square, and powers of time.

    By the normal equations with a ridge of 1e-5, or ten times more until there is a solution; in float32 their Cholesky
    solution is right where least squares by singular values is not."""
    time = jnp.broadcast_to(jnp.arange(len(rows.reward))[:, None] / 100, rows.reward.shape)
    seen = jnp.clip(rows.observation, -10, 10)
    powers = jnp.stack([time, time**2, time**3, jnp.ones_like(time)], axis=-1)
    features = jnp.concatenate([seen, seen**2, powers], axis=-1) * rows.valid[..., None]
    returns = discounted(config.discount, rows.reward)
    x, y = features.reshape(-1, features.shape[-1]), (returns * rows.valid).reshape(-1)
    solve = lambda ridge: jax.scipy.linalg.solve(x.T @ x + ridge * jnp.eye(x.shape[1]), x.T @ y, assume_a="pos")
    weights = jax.vmap(solve)(10.0 ** jnp.arange(-5, 1))
    return features @ weights[jnp.argmax(jnp.isfinite(weights).all(axis=1))]


def discounted(discount: float, x: Series) -> Series:
    """Of each step, x and all later ones, discounted."""
    add = lambda later, now: (now + discount * later,) * 2
    return jax.lax.scan(add, jnp.zeros_like(x[0]), x, reverse=True)[1]


def advantages(config: Config, rows: Rows) -> Series:
    """Generalised advantages (Schulman et al. 2016) over episodes after which there is nothing, of mean 0 and deviation
    1 over the task's steps."""
    value = fitted(config, rows) if config.baseline else jnp.zeros_like(rows.reward)
    following = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])  # 0 after a fall too
    delta = (rows.reward + config.discount * following - value) * rows.valid
    advantage = discounted(config.discount * config.gae_lambda, delta)
    centred = advantage - jnp.mean(advantage, where=rows.valid)
    return centred / (jnp.std(advantage, where=rows.valid) + 1e-8)


# ---- losses -------------------------------------------------------------------------------------------------------


def mean_over(rows: Rows, x: Series) -> Float[Array, ""]:
    return jnp.sum(x * rows.valid) / rows.valid.sum()


def surrogate(policy: Policy, rows: Rows, advantage: Series, kind: str) -> Float[Array, ""]:
    """What a policy gradient step descends: minus the mean of advantages weighted by the actions' probabilities."""
    new = log_prob(over_batch(policy.mean, rows.observation), policy.log_std, rows.action)
    if kind == "log_likelihood":
        return -mean_over(rows, new * advantage)
    return -mean_over(rows, jnp.exp(new - log_prob(rows.mean, rows.log_std, rows.action)) * advantage)


def adapt(config: Config, policy: Policy, rows: Rows, advantage: Series) -> Policy:
    """The policy after the inner step on episodes in a task."""
    gradient = jax.grad(surrogate)(policy, rows, advantage, config.inner_loss)
    if config.first_order:
        gradient = jax.lax.stop_gradient(gradient)
    return jax.tree.map(lambda x, g: x - config.inner_lr * g, policy, gradient)


class Data(NamedTuple):
    """Of each task: episodes before and after the inner step, and their advantages."""

    before: Rows
    before_advantage: Float[Array, "tasks time episodes"]
    after: Rows
    after_advantage: Float[Array, "tasks time episodes"]


def outer_loss(policy: Policy, data: Data, config: Config) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Means over tasks: the surrogate of the adapted policies, and their divergence from those that acted."""

    def of_task(data: Data):
        adapted = adapt(config, policy, data.before, data.before_advantage)
        rows = data.after
        mean = over_batch(adapted.mean, rows.observation)
        divergence = mean_over(rows, kl(rows.mean, rows.log_std, mean, adapted.log_std))
        return surrogate(adapted, rows, data.after_advantage, "ratio"), divergence

    return jax.tree.map(jnp.mean, jax.vmap(of_task)(data))


def trpo_step(policy: Policy, data: Data, config: Config) -> tuple[Policy, dict]:
    """The longest step along the natural gradient that lowers the loss and keeps to max_kl, of `line_search_steps`
    tries; if none does, none is taken."""
    losses = partial(outer_loss, data=data, config=config)
    loss, gradient = jax.value_and_grad(lambda policy: losses(policy)[0])(policy)
    _, curved = jax.linearize(jax.grad(lambda policy: losses(policy)[1]), policy)
    hessian = lambda vector: jax.tree.map(lambda h, v: h + config.damping * v, curved(vector), vector)

    direction, _ = jax.scipy.sparse.linalg.cg(hessian, gradient, maxiter=config.cg_iterations, tol=0.0)
    curvature = sum(jnp.vdot(*pair) for pair in zip(jax.tree.leaves(direction), jax.tree.leaves(hessian(direction))))
    length = jnp.where(curvature > 0, jnp.sqrt(2 * config.max_kl / jnp.maximum(curvature, 1e-30)), 0.0)
    moved = lambda tries: jax.tree.map(lambda x, d: x - 0.8**tries * length * d, policy, direction)

    def fits(tries):
        new_loss, divergence = losses(moved(tries))
        return (new_loss < loss) & (divergence <= config.max_kl)

    goes_on = lambda tries: (tries < config.line_search_steps) & ~fits(tries)
    tries = jax.lax.while_loop(goes_on, lambda tries: tries + 1, jnp.zeros((), jnp.int32))
    new = select(tries < config.line_search_steps, moved(tries), policy)
    new_loss, divergence = losses(new)
    return new, {"train/loss": loss, "train/improvement": loss - new_loss, "train/kl": divergence, "train/tries": tries}


# ---- state --------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that a seed's run is; what a checkpoint holds."""

    agent: Policy
    train_tasks: Float[Array, "train_tasks task"]
    test_tasks: Float[Array, "test_tasks task"]
    env_steps: Int[Array, ""]
    outer_steps: Int[Array, ""]
    broken: Int[Array, ""]  # steps in which the simulator failed
    key: Key[Array, ""]


def init(config: Config, family: TaskFamily, key: Key[Array, ""]) -> TrainState:
    """The state of one seed before its first step."""
    agent_key, task_key, key, _ = jax.random.split(key, 4)  # the fourth is for evaluations
    train_tasks, test_tasks = family.tasks(task_key, config.num_train_tasks, config.num_test_tasks)
    return TrainState(
        agent=make_agent(config, family, agent_key),
        train_tasks=jnp.copy(train_tasks),
        test_tasks=jnp.copy(test_tasks),
        env_steps=jnp.zeros((), jnp.int32),
        outer_steps=jnp.zeros((), jnp.int32),
        broken=jnp.zeros((), jnp.int32),
        key=key,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def learn(config: Config, family: TaskFamily, state: TrainState) -> tuple[TrainState, dict]:
    """An iteration: episodes before and after the inner step in some train tasks, then the outer step."""
    key, task_key, *play_keys = jax.random.split(state.key, 4)
    tasks = jax.random.choice(task_key, state.train_tasks, (config.num_tasks,))

    def of_task(task, before_key, after_key):
        before, broken, _ = play(config, family, state.agent, task, True, before_key)
        advantage = advantages(config, before)
        adapted = adapt(config, state.agent, before, advantage)
        after, more_broken, _ = play(config, family, adapted, task, True, after_key)
        return Data(before, advantage, after, advantages(config, after)), broken + more_broken

    data, broken = jax.vmap(of_task)(tasks, *(jax.random.split(key, config.num_tasks) for key in play_keys))
    agent, metrics = trpo_step(state.agent, data, config)
    state = state._replace(
        agent=agent,
        env_steps=state.env_steps + data.before.reward.size + data.after.reward.size,
        outer_steps=state.outer_steps + 1,
        broken=state.broken + broken.sum(),
        key=key,
    )
    mean_return = lambda rows: rows.reward.sum(axis=1).mean()
    metrics |= {"train/return_prior": mean_return(data.before), "train/return_adapted": mean_return(data.after)}
    return state, metrics | {"train/std": jnp.exp(agent.log_std).mean(), "train/broken_steps": state.broken}


# ---- evaluation ---------------------------------------------------------------------------------------------------

SCORES = run.Scores(
    "return on test tasks",
    {
        "eval/return_adapted": "adapted",
        "eval/return_adapted_by_two": "adapted by two episodes",
        "eval/return_prior": "before adaptation",
    },
)


def adapted_policies(
    config: Config,
    family: TaskFamily,
    agent: Policy,
    tasks: Float[Array, "batch task"],
    episodes: int,
    key: Key[Array, ""],
) -> Policy:
    """The policy after its inner step on so many episodes in each task."""

    def of_task(task, key):
        rows, *_ = play(dataclasses.replace(config, num_episodes=episodes), family, agent, task, True, key)
        return adapt(config, agent, rows, advantages(config, rows))

    return jax.vmap(of_task)(tasks, jax.random.split(key, len(tasks)))


def evaluate(
    config: Config, family: TaskFamily, agent: Policy, test_tasks: Float[Array, "tasks task"], key: Key[Array, ""]
) -> dict:
    """Returns on the test tasks with mean actions: before adaptation, after the inner step on `num_episodes` episodes
    with sampled actions, and after the inner step on two."""
    tasks = jnp.tile(test_tasks, (config.eval_repeats, 1))
    key, play_key = jax.random.split(key)
    solved = lambda _, after: family.solved(after) if family.solved else ()

    def score(policies):
        of_task = lambda policy, task, key: play(config, family, policy, task, False, key, solved)
        rows, _, successes = jax.vmap(of_task)(policies, tasks, jax.random.split(play_key, len(tasks)))
        return rows.reward.sum(axis=1).mean(), successes

    unadapted = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(tasks), *x.shape)), agent)
    adapted, successes = score(adapted_policies(config, family, agent, tasks, config.num_episodes, key))
    metrics = {
        "eval/return_prior": score(unadapted)[0],
        "eval/return_adapted": adapted,
        "eval/return_adapted_by_two": score(adapted_policies(config, family, agent, tasks, 2, key))[0],
    }
    return metrics | ({"eval/success_adapted": successes.any(axis=1).mean()} if family.solved else {})


# ---- main ---------------------------------------------------------------------------------------------------------


@run.command
def main(argv: list[str] | None = None) -> None:
    given = run.configure(Config, RECIPES, __doc__, argv)
    family = run.make_env(given.env, TaskFamily, given.env_options)
    config = run.settle_tasks(given, family)
    with run.Run(given, "maml", RECIPES, SCORES, worlds=[family]) as log:
        train(config, family, log)


def train(config: Config, family: TaskFamily, log: run.Run) -> None:
    """Begins or resumes, then learns, then draws."""
    begin = log.over_seeds(partial(init, config, family))
    shapes = jax.eval_shape(begin, log.seeds)
    tasks = f"{config.num_train_tasks} train tasks, {config.num_test_tasks} test tasks, by {family.simulator}"
    log.describe("first-order MAML" if config.first_order else "MAML", tasks, policy=shapes.agent)
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
    log.draw("adapted agent", film, config, family, agent, tasks, key, str(log.folder / "rollout"))


def film(config: Config, family: TaskFamily, agent: Policy, tasks, key: Key[Array, ""], stem: str) -> str:
    """Draws an episode of the adapted policy in each of the first six tasks, with mean actions: the path."""

    def record(agent, tasks):
        policies = adapted_policies(config, family, agent, tasks, config.num_episodes, key)
        one = lambda policy, task: play(config, family, policy, task, False, key, lambda before, _: before)[2]
        return jax.vmap(one)(policies, tasks)

    states: TaskState = jax.device_get(jax.jit(record)(agent, tasks[:6]))
    return family.render(jax.tree.map(lambda x: x[:, :, 0], states), stem)


def load(folder: str | Path, seed: int | None = None) -> tuple[Config, TaskFamily, Policy]:
    """Settings, task family and policy of a run, of its first seed or another; only reads (see the README)."""
    config = run.load_config(Config, folder)
    family = run.make_env(config.env, TaskFamily, config.env_options)
    config = run.settle_tasks(config, family)
    return config, family, run.load_agent(partial(make_agent, config, family), folder, config, seed)


if __name__ == "__main__":
    main()
