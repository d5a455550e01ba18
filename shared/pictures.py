"""Every figure and film that a run draws. They get arrays, environments and functions, never an algorithm's types."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from envs import AchievementEnv, AchievementState, GoalEnv, GoalState, mazes
from shared import evaluation, run


def draw_curve(folder: Path, scores: run.Scores, bottom: float | None = -0.02) -> Path:
    """`curve.png` of a run folder: scores against the run's clock, the mean over seeds, and a band from the lowest to
    the highest. `bottom`: where the vertical axis begins; None for wherever the curves do."""
    pyplot, metrics = _pyplot(), run.read_metrics(folder)
    steps = "env_steps" if "env_steps" in metrics else "gradient_steps"
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in scores.curves.items():
        if name in metrics:
            _plot_seeds(axes, metrics[steps], metrics[name], label)
    axes.set(xlabel=steps.replace("env_", "environment ").replace("_", " "), ylabel=scores.what, ylim=(bottom, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, folder / "curve.png", dpi=120)


def _plot_seeds(axes, steps, values, label):
    """A line through the means over seeds of values (rows,) at equal steps (rows,), in their range; NaN is left out."""
    at = np.unique(steps[~np.isnan(values)])
    seeds = [values[(steps == step) & ~np.isnan(values)] for step in at]
    (line,) = axes.plot(at, [v.mean() for v in seeds], label=label)
    axes.fill_between(at, [v.min() for v in seeds], [v.max() for v in seeds], alpha=0.2, color=line.get_color())


# ---- goal-reaching ------------------------------------------------------------------------------------------------


def draw_goal_reaching(
    log: run.Run, env: GoalEnv, far_env: GoalEnv | None, policy: Callable, value: Callable | None, episode_length: int
) -> None:
    """All figures of a finished run of an algorithm that reaches goals.

    Args:
      policy: (observation, goal) -> distribution, batched.
      value: (observation, goal) -> what the critic thinks of going from the one to the other, batched; None without.
    """
    log.draw("learning curve", draw_curve, log.folder, log.scores)
    log.progress.show("playing eight episodes")
    key = run.evaluation_key(jax.random.key(log.config.seed))
    states, sampled = eight_episodes(env, far_env, policy, episode_length, key)
    log.draw("policy", film, env, states, sampled, str(log.folder / "rollout"))
    if env.maze:
        tracks = np.asarray(env.position(env.achieved_goal(jnp.asarray(states.observation))))
        goals, path = env.position(jnp.asarray(states.goal[:, 0])), log.folder / "trajectories.png"
        log.draw("trajectories", draw_trajectories, env, tracks, np.asarray(goals), sampled, path)
    if env.maze and value:
        goals = three_goals(far_env or env)
        maps = value_map(env, value, jnp.asarray(goals))
        log.draw("value map", draw_value_map, env, goals, *maps, log.folder / "value_map.png")


def eight_episodes(
    env: GoalEnv, far_env: GoalEnv | None, policy: Callable, episode_length: int, key
) -> tuple[GoalState, Bool[np.ndarray, " 8"]]:
    """Whole episodes, leaves (episode, time, ...), on far goals if there are any; the last four, which are marked, have
    sampled actions."""
    sampled = np.arange(8) >= 4

    @jax.jit
    def play(key):
        reset_key, play_key = jax.random.split(key)
        start = jax.vmap((far_env or env).reset)(jax.random.split(reset_key, 8))
        return evaluation.play(env, policy, start, jnp.array(sampled), episode_length, play_key, record=lambda s: s)

    return jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), play(key)), sampled


def film(env: GoalEnv, states: GoalState, sampled: Bool[np.ndarray, " episodes"], stem: str) -> str:
    """A film of these episodes, which says whose actions are sampled: the path."""
    return env.render(states, stem, ["sampled actions" if each else "mean actions" for each in sampled])


def draw_trajectories(env: GoalEnv, tracks, goals, sampled, path) -> Path:
    """Paths (episode, time, 2) to goals (episode, 2): left those of mean actions, right those of sampled ones."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    for axis, title, kind in ((axes[0], "mean actions", False), (axes[1], "sampled actions", True)):
        mazes.draw(env.maze, axis)
        for i in np.flatnonzero(np.asarray(sampled) == kind):
            (line,) = axis.plot(*tracks[i].T, alpha=0.8)
            axis.plot(*goals[i], "X", markersize=9, color=line.get_color())
        axis.set_title(title)
    return _save(figure, path)


def three_goals(env: GoalEnv) -> Float[np.ndarray, "goals 2"]:
    """Cells of three goals of a maze, spread over their list."""
    goals = env.maze.positions("G")
    return goals[np.unique(np.linspace(0, len(goals) - 1, 3).round().astype(int))]


def value_map(env: GoalEnv, value: Callable, goals: Float[jax.Array, "goals 2"], cells: int = 12):
    """Values of a robot at rest all over a maze, on a grid of `cells` points a cell.

    Returns the grid's x, its y, and the maps (goal, y, x); walls are NaN.
    """
    maze = env.maze
    x, y = ((np.arange(n * cells) + 0.5) / cells - 0.5 for n in maze.is_wall.shape)
    points = np.stack(np.meshgrid(x, y), axis=-1)
    places = maze.at(points)
    walls = maze.is_wall[tuple(np.moveaxis(np.round(points).astype(int), -1, 0))]
    free = jnp.asarray(places[~walls])

    @jax.jit
    def values(goal):
        def at(place):
            placed = env.place(place, goal)
            return value(placed.observation[None], placed.goal[None])[0]

        return jax.lax.map(at, free, batch_size=64)  # because images of all places at once are gigabytes

    maps = np.full((len(goals), *walls.shape), np.nan)
    maps[:, ~walls] = [values(goal) for goal in goals]
    return places[0, :, 0], places[:, 0, 1], maps


def draw_value_map(env: GoalEnv, goals, x, y, maps, path) -> Path:
    """The value maps of `value_map`, side by side."""
    figure, axes = _pyplot().subplots(1, len(goals), figsize=(4.2 * len(goals), 4), squeeze=False, layout="constrained")
    for axis, goal, values in zip(axes[0], goals, maps):
        mazes.draw(env.maze, axis)
        image = axis.pcolormesh(x, y, values, shading="nearest", zorder=2)
        axis.plot(*goal, "rX", markersize=12, zorder=3)
        axis.plot(*env.maze.positions("R").T, "wo", zorder=3)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"{env.name}: the critic of (s, mean action, goal); start o, goal x")
    return _save(figure, path)


# ---- achievements -------------------------------------------------------------------------------------------------


def draw_success(folder: Path, names: tuple[str, ...], title: str) -> Path:
    """Bars of the last evaluation's success rates: the mean over seeds, and a line from the lowest to the highest."""
    metrics = run.read_metrics(folder)
    last = metrics["env_steps"] == metrics["env_steps"].max()
    rates = 100 * np.stack([metrics[f"eval/success/{name}"][last] for name in names], axis=1)  # (seeds, names)
    figure, axes = _pyplot().subplots(figsize=(6, 1 + 0.22 * len(names)), layout="constrained")
    mean = rates.mean(axis=0)
    axes.barh(np.arange(len(names)), mean, xerr=np.abs(np.stack([rates.min(axis=0), rates.max(axis=0)]) - mean))
    axes.set_yticks(np.arange(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel="episodes that unlock it, %", xlim=(0, 100), title=title)
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, folder / "achievements.png", dpi=120)


def film_first_episodes(
    env: AchievementEnv, states: AchievementState, done: Bool[jax.Array, "time episodes"], stem: str
) -> str:
    """A film of recorded states (time, episodes, ...); each episode stands still at the state before its last step."""
    done = np.asarray(done)
    last = np.where(done.any(axis=0), done.argmax(axis=0), len(done) - 1)
    frames = np.minimum(np.arange(last.max() + 1), last[:, None])  # (episodes, time)
    episode = np.arange(done.shape[1])[:, None]
    return env.render(jax.tree.map(lambda x: x[frames, episode], states), stem)


# ---- task embeddings ----------------------------------------------------------------------------------------------


def draw_embedding(
    embeddings: Float[jax.Array, "tasks latent"], tasks: Float[np.ndarray, "tasks oracle"], title: str, path
) -> Path:
    """Embeddings of tasks on their first two principal components, coloured by the task: of its numbers, by the two
    that are most nearly linear in the embedding."""
    pyplot = _pyplot()
    centred = np.asarray(embeddings) - np.mean(embeddings, axis=0)
    left, spread, components = np.linalg.svd(centred, full_matrices=False)
    x = centred @ components[:2].T
    x = np.pad(x, ((0, 0), (0, 2 - x.shape[1])))
    share = np.sum(spread[:2] ** 2) / np.sum(spread**2)
    if tasks.shape[1] > 2:
        apart = tasks - tasks.mean(axis=0)
        explained = np.sum((left.T @ apart) ** 2, axis=0) / (np.sum(apart**2, axis=0) + 1e-9)
        tasks = tasks[:, np.argsort(-explained)[:2]]
    scaled = (tasks - tasks.min(axis=0)) / (np.ptp(tasks, axis=0) + 1e-9)
    one, two = scaled[:, 0], scaled[:, -1]
    colours = pyplot.get_cmap("viridis")(one) if tasks.shape[1] == 1 else np.stack([one, 0 * one + 0.2, two], axis=1)
    figure, (left_axis, right_axis) = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    left_axis.scatter(*x.T, c=colours, s=25)
    left_axis.set(title=f"{title}: embeddings", xlabel=f"two components, {share:.0%} of the variance")
    right_axis.scatter(tasks[:, 0], tasks[:, 1] if tasks.shape[1] > 1 else 0 * tasks[:, 0], c=colours, s=25)
    right_axis.set(title="the tasks themselves")
    return _save(figure, path)


# ---- helpers ------------------------------------------------------------------------------------------------------


def _pyplot():
    """matplotlib for files, imported only when something is drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path, dpi: int = 100) -> Path:
    figure.savefig(path, dpi=dpi, metadata={"Software": None})  # no version of matplotlib in the file
    _pyplot().close(figure)
    return path
