"""A ring buffer of trajectories on the device, and discounted future states drawn from it in closed form.

The buffer belongs in a donated carry: rows are then written in place. It is never rolled or copied, and a sample reads
only the rows it returns.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree

from shared import run


class Replay(NamedTuple):
    """The last `capacity` rows of each of `num_envs` environments.

    Row number t of an environment, counted from the first ever written, lies at position t % capacity.
    """

    data: PyTree[Num[Array, "capacity num_envs ..."]]
    episode: Int[Array, "capacity num_envs"]
    """Number of the episode that a row belongs to, counted from 0 in each environment."""
    episode_end: Int[Array, "capacity num_envs"]
    """At e % capacity: number of the newest row of episode e. At most `capacity` episodes are alive, so none clash."""
    open_episode: Int[Array, " num_envs"]
    """Number of the episode that the next row will belong to."""
    count: Int[Array, ""]
    """Rows ever written per environment, also those overwritten since."""

    @property
    def capacity(self) -> int:
        return self.episode.shape[0]

    @property
    def size(self) -> Int[Array, ""]:
        """Rows held per environment."""
        return jnp.minimum(self.count, self.capacity)


def init(row: PyTree[Num[Array, "..."]], capacity: int, num_envs: int) -> Replay:
    """An empty buffer for rows shaped like `row` (one environment, one step)."""
    return Replay(
        data=jax.tree.map(lambda x: jnp.zeros((capacity, num_envs, *x.shape), x.dtype), row),
        episode=jnp.zeros((capacity, num_envs), jnp.int32),
        episode_end=jnp.zeros((capacity, num_envs), jnp.int32),
        open_episode=jnp.zeros(num_envs, jnp.int32),
        count=jnp.zeros((), jnp.int32),
    )


def add(replay: Replay, rows: PyTree[Num[Array, "time num_envs ..."]], last: Bool[Array, "time num_envs"]) -> Replay:
    """Appends `time` rows to every environment; `last` marks the rows after which an episode ended.

    Raises:
      ValueError: if there are more rows than the buffer holds.
    """
    time, num_envs = last.shape
    if time > replay.capacity:
        raise ValueError(f"{time} rows at once do not fit a replay of {replay.capacity}")
    number = replay.count + jnp.arange(time)
    position = number % replay.capacity
    ended = jnp.cumsum(last, axis=0, dtype=jnp.int32)
    episode = replay.open_episode + ended - last
    # an episode's newest row has the largest number, also among what a past episode left behind in the same place
    end = replay.episode_end.at[episode % replay.capacity, jnp.arange(num_envs)].max(number[:, None])
    return Replay(
        data=jax.tree.map(lambda old, new: old.at[position].set(new), replay.data, rows),
        episode=replay.episode.at[position].set(episode),
        episode_end=end,
        open_episode=replay.open_episode + ended[-1],
        count=replay.count + time,
    )


def truncated_geometric(
    uniform: Float[Array, "*batch"], steps: Int[Array, "*batch"], discount: float
) -> Int[Array, "*batch"]:
    """k in 1..steps with P(k) proportional to discount^k, by inverting the distribution function at u in [0, 1).

    F(k) = (1 - discount^k) / (1 - discount^steps), hence k = 1 + floor(log(1 - u (1 - discount^steps)) / log discount).
    A discount of 1 is the uniform law, infinity always takes the last. Where steps is 0, k is 0.
    """
    if discount == math.inf:
        return steps
    if discount == 1:
        return jnp.minimum(1 + jnp.floor(uniform * steps).astype(jnp.int32), steps)
    log_discount = math.log(discount)
    mass = -jnp.expm1(steps * log_discount)
    k = 1 + jnp.floor(jnp.log1p(-uniform * mass) / log_discount).astype(jnp.int32)
    return jnp.minimum(k, steps)


class Pairs(NamedTuple):
    """Sampled pairs: environments, and the numbers of two rows of one episode, the second not before the first."""

    env: Int[Array, " batch"]
    row: Int[Array, " batch"]
    future: Int[Array, " batch"]


def sample_future(replay: Replay, key: Key[Array, ""], batch_size: int, discount: float) -> Pairs:
    """Draws rows t uniformly and independently, and for each a row t + k - 1 with P(k) proportional to discount^k.

    k runs from 1 to the end of the episode (or of what is known of it), so the state that followed row t + k - 1 is the
    one k steps after row t, the episode's terminal state included: the discounted future state,
    given that the episode ends where it does. Any row qualifies, also an episode's last.

    Args:
      replay: not empty.
      key: used once.
      batch_size: any number.
      discount: in (0, 1); 1 for a uniform future, infinity for the newest row of the episode.
    """
    env_key, row_key, future_key = jax.random.split(key, 3)
    env = jax.random.randint(env_key, (batch_size,), 0, replay.episode.shape[1])
    row = replay.count - replay.size + jax.random.randint(row_key, (batch_size,), 0, replay.size)
    steps = _episode_end(replay, row, env) - row + 1
    k = truncated_geometric(jax.random.uniform(future_key, (batch_size,)), steps, discount)
    return Pairs(env, row, row + k - 1)


def sample_future_in_window(
    replay: Replay, key: Key[Array, ""], batch_size: int, discount: float, window: int
) -> Pairs:
    """The law of the published code: futures are later rows t + k, k >= 1, of one window and one episode.

    A window of that many rows is drawn uniformly, then a row in it that is not its last. A row with no later row of its
    episode in the window is its own future (k = 0). Terminal states are no rows and never drawn.

    Args:
      replay: of at least 2 rows.
      window: in rows, at least 2; a younger buffer is one window.
    """
    env_key, start_key, row_key, future_key = jax.random.split(key, 4)
    env = jax.random.randint(env_key, (batch_size,), 0, replay.episode.shape[1])
    width = jnp.minimum(window, replay.size)
    starts = jnp.maximum(replay.size - width, 1)
    start = replay.count - replay.size + jax.random.randint(start_key, (batch_size,), 0, starts)
    row = start + jax.random.randint(row_key, (batch_size,), 0, width - 1)
    steps = jnp.minimum(_episode_end(replay, row, env), start + width - 1) - row
    k = truncated_geometric(jax.random.uniform(future_key, (batch_size,)), steps, discount)
    return Pairs(env, row, row + k)


def _episode_end(replay, row, env):
    episode = replay.episode[row % replay.capacity, env]
    return replay.episode_end[episode % replay.capacity, env]


def gather(replay: Replay, row: Int[Array, " batch"], env: Int[Array, " batch"]) -> PyTree[Num[Array, "batch ..."]]:
    """The data of the rows with these numbers, which the buffer must still hold."""
    return jax.tree.map(lambda x: x[row % replay.capacity, env], replay.data)


def newest(replay: Replay) -> PyTree[Num[Array, "num_envs ..."]]:
    """The data of the row that each environment wrote last; zeros if there is none."""
    return jax.tree.map(lambda x: x[(replay.count - 1) % replay.capacity], replay.data)


# ---- how a run fills its buffer, and learns from it -----------------------------------------------------------------


def chunk_steps(config) -> int:
    """Environment steps of one seed in one chunk."""
    return config.num_envs * config.unroll_length


def prefill_chunks(config) -> int:
    """Chunks of data collection before the first gradient step."""
    return math.ceil(config.min_replay_size / config.unroll_length)


def total_updates(config) -> int:
    """Gradient steps in the whole run."""
    chunks = math.ceil(config.total_env_steps / chunk_steps(config)) - prefill_chunks(config)
    return chunks * config.updates_per_chunk


def check(config) -> None:
    """UserError, in one line, if these settings of an algorithm cannot work together."""
    run.need(
        config.max_replay_size >= max(config.episode_length, config.unroll_length),
        f"max_replay_size is {config.max_replay_size}; it holds at least an episode ({config.episode_length} steps) "
        f"and an unroll ({config.unroll_length})",
    )
    run.need(
        2 <= config.min_replay_size <= config.max_replay_size,
        f"min_replay_size is {config.min_replay_size}; it lies in 2 to max_replay_size ({config.max_replay_size})",
    )
    prefill = prefill_chunks(config) * chunk_steps(config)
    run.need(
        config.total_env_steps > prefill,
        f"total_env_steps is {config.total_env_steps}; it must exceed the prefill of {prefill} steps "
        "(num_envs x min_replay_size, in whole chunks)",
    )


# ---- a buffer for each of many tasks --------------------------------------------------------------------------------


class TaskReplay(NamedTuple):
    """The last `capacity` rows of each task, and which of them are its recent context.

    Row number t of a task, counted from the first ever written, lies at position t % capacity.
    """

    data: PyTree[Float[Array, "tasks capacity ..."]]
    step: Int[Array, "tasks capacity"]
    """Rows of the same episode before a row."""
    left: Int[Array, "tasks capacity"]
    """Rows of the same episode after it."""
    count: Int[Array, " tasks"]
    """Rows ever written, also those overwritten since."""
    context_start: Int[Array, " tasks"]
    context_end: Int[Array, " tasks"]
    """The recent context are the rows from the one number to before the other."""

    @property
    def capacity(self) -> int:
        return self.step.shape[1]


def init_tasks(row: PyTree[Float[Array, "..."]], num_tasks: int, capacity: int) -> TaskReplay:
    """An empty buffer for rows shaped like `row`."""
    counts = jnp.zeros(num_tasks, jnp.int32)
    zeros = jnp.zeros((num_tasks, capacity), jnp.int32)
    data = jax.tree.map(lambda x: jnp.zeros((num_tasks, capacity, *x.shape), x.dtype), row)
    return TaskReplay(data, zeros, jnp.copy(zeros), counts, jnp.copy(counts), jnp.copy(counts))


def forget_context(replay: TaskReplay, task: Int[Array, " visits"]) -> TaskReplay:
    """The recent context of these tasks is empty; it begins with what they get next."""
    now = replay.count[task]
    start, end = (x.at[task].set(now) for x in (replay.context_start, replay.context_end))
    return replay._replace(context_start=start, context_end=end)


def add_to_tasks(
    replay: TaskReplay,
    task: Int[Array, " visits"],
    rows: PyTree[Float[Array, "visits time ..."]],
    last: Bool[Array, "visits time"],
    context: bool,
) -> TaskReplay:
    """Appends `time` rows of whole episodes to the task of each visit; several visits may be to one task.

    Args:
      last: marks the rows that end an episode; the last row always does.
      context: whether they belong to the recent context too.

    All the rows that a call adds to a task must fit its buffer.
    """
    time = last.shape[1]
    index = jnp.arange(time)
    end = jax.lax.cummin(jnp.where(last, index, time - 1), axis=1, reverse=True)
    first = jnp.pad(last, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    earlier = jnp.sum(jnp.tril(task[:, None] == task, -1), axis=1)  # visits to the same task before this one
    position = (replay.count[task] + earlier * time)[:, None] + index
    put = lambda old, new: old.at[task[:, None], position % replay.capacity].set(new)
    count = replay.count.at[task].add(time)
    return replay._replace(
        data=jax.tree.map(put, replay.data, rows),
        step=put(replay.step, index - start),
        left=put(replay.left, end - index),
        count=count,
        context_end=replay.context_end.at[task].set(count[task]) if context else replay.context_end,
    )


def sample_rows(
    replay: TaskReplay, task: Int[Array, " tasks"], key: Key[Array, ""], size: int
) -> PyTree[Float[Array, "tasks size ..."]]:
    """Rows of each task, uniform and independent."""
    newest = replay.count[task]
    return _of_tasks(replay, task, _uniform(key, newest - jnp.minimum(newest, replay.capacity), newest, size))


def sample_context(
    replay: TaskReplay, task: Int[Array, " tasks"], key: Key[Array, ""], size: int
) -> PyTree[Float[Array, "tasks size ..."]]:
    """Rows of each task's recent context, which is not empty, uniform and independent."""
    number = _uniform(key, replay.context_start[task], replay.context_end[task], size)
    return _of_tasks(replay, task, number)


def sample_crops(
    replay: TaskReplay, task: Int[Array, " tasks"], key: Key[Array, ""], window: int
) -> tuple[PyTree[Float[Array, "2 tasks window ..."]], Bool[Array, "tasks window"], Int[Array, " tasks"]]:
    """Two windows of `window` successive rows of one episode of each task's recent context, and which rows count.

    The episode is that of a uniform row: where all are equally long, a uniform episode. The starts of the windows are
    uniform and independent, so that they may overlap. An episode that is no longer than a window is both windows,
    padded. Returns the number of each episode's first row too, which tells the episodes of a task apart.
    """
    row_key, offset_key = jax.random.split(key)
    row = _uniform(row_key, replay.context_start[task], replay.context_end[task], 1)[:, 0]
    step, left = (x[task, row % replay.capacity] for x in (replay.step, replay.left))
    length = step + left + 1
    width = jnp.minimum(window, length)
    offset = jax.random.randint(offset_key, (2, len(task)), 0, length - width + 1)
    index = jnp.arange(window)
    first = row - step
    number = (first + offset)[..., None] + jnp.minimum(index, width[:, None] - 1)
    crops = jax.vmap(lambda number: _of_tasks(replay, task, number))(number)
    return crops, index < width[:, None], first


def _uniform(key, start, end, size):
    """Numbers (tasks, size) uniform in start..end-1 of each task."""
    return jax.random.randint(key, (len(start), size), start[:, None], end[:, None])


def _of_tasks(replay, task, number):
    return jax.tree.map(lambda x: x[task[:, None], number % replay.capacity], replay.data)
