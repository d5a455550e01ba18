"""The environment interface, and stepping many environments with automatic reset.

An environment is two pure functions of one robot, `reset(key)` and `step(state, action)`; everything here and in the
algorithms batches them with `jax.vmap`. How the physics is stepped is a private matter of the file that defines the
environment.
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped

from envs.mazes import Maze


class GoalState(NamedTuple):
    """One environment with a goal at one moment."""

    physics: Any
    """PyTree of the physics backend; only the environment that made it looks inside."""
    observation: Num[Array, "*batch observation"]
    """What the robot senses, without the commanded goal. An image is its bytes, row by row."""
    goal: Num[Array, "*batch goal"]
    """The commanded goal, in the units of `observation[goal_indices]`."""
    reward: Float[Array, "*batch"]
    """Reward of the step that led here (0 after a reset)."""
    terminated: Bool[Array, "*batch"]
    """The task ended here (the robot fell, say). Time limits are not the environment's affair, see `VectorEnv`."""


class AchievementState(NamedTuple):
    """One environment with achievements at one moment; fields without a word are those of `GoalState`."""

    physics: Any
    observation: Shaped[Array, "..."]
    """Of the environment's `observation_shape` and `observation_dtype`, behind the batch."""
    reward: Float[Array, "*batch"]
    terminated: Bool[Array, "*batch"]
    achievements: Bool[Array, "*batch achievements"]
    """What the episode has unlocked so far."""


class TaskState(NamedTuple):
    """One environment of a task family at one moment; fields without a word are those of `GoalState`."""

    physics: Any
    observation: Float[Array, "*batch observation"]
    """What the robot senses, without the task."""
    task: Float[Array, "*batch task"]
    """Which of the family's tasks it is."""
    reward: Float[Array, "*batch"]
    terminated: Bool[Array, "*batch"]


State = GoalState | AchievementState | TaskState


def intact(before: State, after: State) -> tuple[State, Bool[Array, "*batch"]]:
    """A batch of states after a step, and where the simulator failed in it: an observation or reward is not finite.
    There the state is again the one before the step, terminated and without a reward."""
    features = tuple(range(after.reward.ndim, after.observation.ndim))
    broken = ~(jnp.isfinite(after.reward) & jnp.isfinite(after.observation).all(axis=features))
    stopped = before._replace(reward=jnp.zeros_like(after.reward), terminated=jnp.ones_like(after.terminated))
    return select(broken, stopped, after), broken


def select(condition: Bool[Array, "*batch"], new, old):
    """`new` in the entries of the leading axes where the condition holds, else `old`."""
    entries = lambda x: condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim))
    return jax.tree.map(lambda a, b: jnp.where(entries(a), a, b), new, old)


def _in_float32(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("float32"):
            return function(*args, **kwargs)

    return wrapped


class Env(abc.ABC):
    """A robot, or a player, in its world; `GoalEnv`, `AchievementEnv` and `TaskFamily` say what it is to do there.

    Attributes:
      name: the name `envs.make` takes.
      observation_size, action_size: lengths of the two vectors; actions lie in [-1, 1].
      control_step: simulated seconds of a step; None where time has no unit.
      simulator: what steps the physics.
      in_jax: whether the worlds live in this process; else `close` ends theirs, and `failure` says in one line why a
        call failed.
    """

    name: str
    observation_size: int
    action_size: int
    control_step: float | None = None
    simulator: str = "pure JAX"
    in_jax: bool = True
    failure: str | None = None

    def __init_subclass__(cls):
        """Physics has float32 matrix products, whatever precision networks and losses have."""
        for name in {"reset", "step", "place"} & vars(cls).keys():
            setattr(cls, name, _in_float32(vars(cls)[name]))

    @abc.abstractmethod
    def reset(self, key: Key[Array, ""]) -> State:
        """Draws a start, and a goal or a task."""

    @abc.abstractmethod
    def step(self, state: State, action: Float[Array, " action"]) -> State:
        """Advances one control step."""

    @abc.abstractmethod
    def render(self, states: State, stem: str) -> str:
        """Draws trajectories, `states` with leading axes (episode, time), into `stem` plus an ending: the path."""

    def close(self) -> None:  # noqa: B027 (most have nothing to end)
        """Ends the processes of an environment that has any."""


class GoalEnv(Env):
    """A goal-conditioned task.

    Attributes:
      goal_indices: the entries of the observation that a goal specifies.
      success_radius: a goal is reached while the Euclidean distance to it is below this, in the goal's unit.
      other_radii: more such radii that scores are published for, by name: 'easy', 'hard'.
      maze: the walls, or None in the open; with them there are `place` and `position`.
      image_shape: (height, width, channels) where observations and goals are images, in bytes; else None.
    """

    goal_indices: tuple[int, ...]
    success_radius: float
    other_radii: Mapping[str, float] = MappingProxyType({})
    maze: Maze | None = None
    image_shape: tuple[int, int, int] | None = None

    @abc.abstractmethod
    def sample_goal(self, key: Key[Array, ""]) -> Num[Array, " goal"]:
        """Draws a goal from the distribution that `reset` draws from."""

    def place(self, position: Float[Array, "2"], goal: Float[Array, "2"]) -> GoalState:
        """In a maze: the robot at rest at x, y, with a goal at x, y."""
        raise NotImplementedError(f"{self.name} has no maze")

    def position(self, goal: Num[Array, "*batch goal"]) -> Float[Array, "*batch 2"]:
        """In a maze: the x, y that a goal stands for."""
        return goal[..., :2]

    def render(self, states: GoalState, stem: str, labels: Sequence[str] = ()) -> str:
        """A picture of each entry of the achieved goals over time, and of the commanded ones (dotted).

        `labels` say what each episode is.
        """
        from matplotlib.figure import Figure  # envs run without matplotlib

        achieved = np.asarray(self.achieved_goal(jnp.asarray(states.observation)))
        figure = Figure(layout="constrained")
        axes = figure.subplots(achieved.shape[-1], sharex=True, squeeze=False)[:, 0]
        for i, axis in enumerate(axes):
            lines = axis.plot(achieved[..., i].T)
            for line, goal in zip(lines, np.asarray(states.goal)[..., i]):
                axis.plot(goal, ":", color=line.get_color())
            axis.set_ylabel(f"goal entry {i}")
        if labels:
            axes[0].legend(lines, labels)
        axes[-1].set_xlabel("step")
        figure.savefig(f"{stem}.png")
        return f"{stem}.png"

    def with_goal(self, state: GoalState, goal: Num[Array, " goal"]) -> GoalState:
        """The same state with another commanded goal."""
        return state._replace(goal=goal)

    def rewarded(self, state: GoalState) -> GoalState:
        """The state with its reward: 1 within the success radius of the goal, else 0."""
        return state._replace(reward=(self.distance(state) < self.success_radius).astype(jnp.float32))

    @property
    def world(self) -> tuple:
        """Equal for two environments that differ in their starts and goals only: each can step the other's states."""
        walls = self.maze and self.maze.is_wall.tolist()
        return type(self), self.observation_size, self.control_step, walls

    def achieved_goal(self, observation: Num[Array, "*batch observation"]) -> Num[Array, "*batch goal"]:
        """The goal that an observation would reach."""
        return observation[..., jnp.array(self.goal_indices)]

    def distance(self, state: GoalState) -> Float[Array, "*batch"]:
        """Euclidean distance between the achieved and the commanded goal."""
        return jnp.linalg.norm(self.achieved_goal(state.observation) - state.goal, axis=-1)


class AchievementEnv(Env):
    """A task with achievements, each of which is unlocked at most once in an episode.

    An action is an integer in [0, num_actions), so there is no `action_size`.

    Attributes:
      observation_shape: (height, width, channels) of an image, or (features,).
      observation_dtype: 'uint8' for images in 0..255; 'float32' otherwise, images then in [0, 1].
      num_actions: how many actions there are.
      achievement_names: what each entry of `AchievementState.achievements` stands for.

    Where it is not `in_jax`, only the vectorised one can be stepped, by one program at a time.
    """

    observation_shape: tuple[int, ...]
    observation_dtype: str = "float32"
    num_actions: int
    achievement_names: tuple[str, ...]
    fresh_worlds: int | None = None
    """`VectorEnv.fresh_worlds`."""

    @property
    def observation_size(self) -> int:
        return math.prod(self.observation_shape)

    @staticmethod
    def score(success: Float[Array, " achievements"]) -> Float[Array, ""]:
        """Crafter's, in percent: the geometric mean of success rates with an offset of 1 % (Hafner 2022, eq. 1)."""
        return jnp.exp(jnp.mean(jnp.log1p(100 * success))) - 1

    def vectorise(self, num_envs: int, episode_length: int) -> "VectorEnv":
        """`num_envs` copies that are reset by themselves."""
        return VectorEnv(self, num_envs, episode_length, fresh_worlds=self.fresh_worlds)


class TaskFamily(Env):
    """Tasks that differ in their rewards or their physics, and that an agent tells apart by acting only (meta-RL).

    The task is a vector that the observation does not contain.

    Attributes:
      task_size: length of the task vector.
      oracle_size: length of `oracle(task)`.
      num_train_tasks, num_test_tasks: how many there are, as published.
      longest_episode: in steps, where the simulator has a limit of its own.
      solved: states -> whether the task is solved in each, where a family has that notion.
    """

    longest_episode: int | None = None
    solved: Callable[[TaskState], Bool[Array, "*batch"]] | None = None

    task_size: int
    oracle_size: int
    num_train_tasks: int
    num_test_tasks: int

    @abc.abstractmethod
    def sample_task(self, key: Key[Array, ""]) -> Float[Array, " task"]:
        """Draws a task from the distribution that `reset` draws from."""

    def with_task(self, state: TaskState, task: Float[Array, " task"]) -> TaskState:
        """The same state in another task."""
        return state._replace(task=task)

    def tasks(
        self, key: Key[Array, ""], num_train: int, num_test: int
    ) -> tuple[Float[Array, "num_train task"], Float[Array, "num_test task"]]:
        """The lists of tasks to train on and to test on; ValueError if the family cannot have so many."""
        tasks = jax.vmap(self.sample_task)(jax.random.split(key, num_train + num_test))
        return tasks[:num_train], tasks[num_train:]

    def oracle(self, task: Float[Array, " task"]) -> Float[Array, " oracle"]:
        """What an agent is told that is told the task."""
        return task

    def training_reward(self, state: TaskState) -> Float[Array, ""]:
        """The reward to learn from; `TaskState.reward` is what context and scores are made of."""
        return state.reward


class VectorState(NamedTuple):
    """`num_envs` environments and their clocks; every leaf has a leading axis of `num_envs`."""

    env: State
    """The states to act in next, already reset where an episode has just ended."""
    steps: Int[Array, " num_envs"]
    """Steps taken in the current episode."""
    key: Key[Array, " num_envs"]
    """Where the next resets draw from."""
    first: State | None
    """Each environment's first state, to which it returns under `goals='fixed'`."""
    broken: Int[Array, " num_envs"]
    """Steps so far in which the simulator failed."""


class VectorEnv:
    """Steps `num_envs` copies of an environment and resets each when its episode ends.

    Args:
      env: the environment.
      num_envs: how many copies.
      episode_length: the time limit, in steps; reaching it truncates.
      goals: 'resampled' draws a new start and goal at each reset; 'fixed' returns each copy to the first start and
        goal it had, which is what brax's AutoResetWrapper does and hence what the published CRL results are made of.
      fresh_worlds: how many resets are computed at a time, for environments whose resets are much dearer than their
        steps; by default those of all copies at once. Every ended episode gets a reset of its own in either case.

    Attributes:
      failure: why a step failed, in one line, if the environments live in other processes; else None.
    """

    failure: str | None = None

    def __init__(
        self,
        env: Env,
        num_envs: int,
        episode_length: int,
        goals: str = "resampled",
        fresh_worlds: int | None = None,
    ):
        if goals not in ("fixed", "resampled"):
            raise ValueError(f"goals is {goals!r}; it is 'fixed' or 'resampled'")
        self.env, self.num_envs, self.episode_length, self.goals = env, num_envs, episode_length, goals
        self.fresh_worlds = min(fresh_worlds or num_envs, num_envs)

    def reset(self, key: Key[Array, ""]) -> VectorState:
        first_key, reset_key = jax.random.split(key)
        # copies, because a donated carry may not name one buffer twice
        state = jax.tree.map(jnp.copy, jax.vmap(self.env.reset)(jax.random.split(first_key, self.num_envs)))
        return VectorState(
            env=state,
            steps=jnp.zeros(self.num_envs, jnp.int32),
            key=jax.random.split(reset_key, self.num_envs),
            first=jax.tree.map(jnp.copy, state) if self.goals == "fixed" else None,
            broken=jnp.zeros(self.num_envs, jnp.int32),
        )

    def step(
        self, state: VectorState, action: Float[Array, "num_envs action"] | Int[Array, " num_envs"]
    ) -> tuple[VectorState, State, Bool[Array, " num_envs"]]:
        """Steps every copy; an episode has ended where `after.terminated | truncated`.

        Where the simulator fails, `broken` of the new state is one higher than before, `after` is the state that was
        acted in, terminated. Such a step is nothing to learn from.

        Returns:
          state: to act in next, already reset where an episode has just ended.
          after: what each action led to: at the end of an episode its terminal state, not the next episode's first.
          truncated: the time limit ended the episode, and the environment did not.
        """
        after, broken = intact(state.env, jax.vmap(self.env.step)(state.env, action))
        steps = state.steps + 1
        truncated = (steps >= self.episode_length) & ~after.terminated
        broken = state.broken + broken
        ended = after.terminated | truncated
        if self.fresh_worlds < self.num_envs and self.goals == "resampled":
            env, key = self._restart_few(after, ended, state.key)
            return VectorState(env, jnp.where(ended, 0, steps), key, state.first, broken), after, truncated

        def restart(key):
            if self.goals == "fixed":
                return state.first, key
            keys = jax.vmap(jax.random.split)(key)
            return jax.vmap(self.env.reset)(keys[:, 0]), keys[:, 1]

        # resetting costs about a physics step, so it is skipped while no episode ends
        fresh, key = jax.lax.cond(ended.any(), restart, lambda key: (after, key), state.key)
        return (
            VectorState(select(ended, fresh, after), jnp.where(ended, 0, steps), key, state.first, broken),
            after,
            truncated,
        )

    def switch_goals(
        self, state: VectorState, probability: float, switch_key: Key[Array, ""], goal_key: Key[Array, ""]
    ) -> VectorState:
        """Of goal-reaching environments: each copy's goal is drawn anew with this probability."""
        if probability == 0:
            return state
        new = jax.vmap(self.env.sample_goal)(jax.random.split(goal_key, self.num_envs))
        switch = jax.random.bernoulli(switch_key, probability, (self.num_envs, 1))
        goal = jnp.where(switch, new, state.env.goal)
        return state._replace(env=jax.vmap(self.env.with_goal)(state.env, goal))

    def restore(self, state: VectorState) -> None:
        """Prepares for going on from a saved state; environments in JAX need nothing."""

    def close(self) -> None:
        """Ends the processes of environments that have any."""

    def _restart_few(self, after: State, ended: Bool[Array, " num_envs"], key: Key[Array, " num_envs"]):
        """Resets the copies whose episode has ended, `fresh_worlds` at a time, until none is left."""

        def restart(carry):
            env, waiting, key = carry
            # the indices of the first few; where fewer are left, num_envs, which is written nowhere
            (which,) = jnp.nonzero(waiting, size=self.fresh_worlds, fill_value=self.num_envs)
            keys = jax.vmap(jax.random.split)(key[which])
            fresh = jax.vmap(self.env.reset)(keys[:, 0])
            env = jax.tree.map(lambda old, new: old.at[which].set(new, mode="drop"), env, fresh)
            return env, waiting.at[which].set(False, mode="drop"), key.at[which].set(keys[:, 1], mode="drop")

        env, _, key = jax.lax.while_loop(lambda carry: carry[1].any(), restart, (after, ended, key))
        return env, key
