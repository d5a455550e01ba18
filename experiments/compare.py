"""Contrastive RL and what it is compared with on a task: trains each method, then draws all.

    python experiments/compare.py --env ant_u_maze --num_seeds 3 --total_env_steps 10_000_000

It takes the flags that all scripts have, and trains one method after another, each with its own recipe for the task, in
runs/compare/ENV/METHOD. The same command, at the same commit, goes on with what was stopped, and trains nothing twice.
At the end it draws runs/compare/ENV/comparison.png: steps at the goal against environment steps, and at the last
evaluation, with 95 % bootstrap intervals over seeds.
"""

import importlib
import shlex
import sys

import jax
import matplotlib

import figures
import runs
from shared import evaluation, replay, run


@run.command
def main(argv: list[str] | None = None) -> None:
    matplotlib.use("agg")
    jax.config.update("jax_platforms", "cpu")  # of this process: a GPU's memory is for those that train
    flags = (argv or sys.argv)[1:]
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return
    given = {flag.lstrip("-").partition("=")[0] for flag in flags}
    run.need(not given & {"run_dir", "resume"}, "the runs have folders of their own: no --run_dir, no --resume")
    for _, script, own in figures.METHODS.values():  # what one of them refuses is said before any is trained
        module = importlib.import_module(f"algorithms.{script.removesuffix('.py')}")
        try:
            config = run.configure(module.Config, module.RECIPES, None, [script, *own.split(), *flags])
            replay.check(config)
            evaluation.make_envs(config)
        except run.UserError as error:
            raise run.UserError(f"{script}: {error}") from None
    folder = runs.FOLDER.parent / "compare" / config.env
    curves = {}
    for label, (_, script, own) in figures.METHODS.items():
        mine = folder / label.replace(" ", "")
        runs.train(shlex.join([script, *own.split(), *flags]), mine, label)
        runs.publish(mine / "evaluations", mine)
        curves[label] = str(mine / "evaluations")
    metric = {"eval/time_at_goal": f"{config.env}: steps at the goal, of {config.episode_length}"}
    (folder / "comparison.png").write_bytes(figures.draw_curves(figures.Figure(metric, {"": curves}, bars=True)))
    print(folder / "comparison.png")


if __name__ == "__main__":
    main()
