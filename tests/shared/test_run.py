"""Flags, run folders and bad input. Nothing here compiles: a bad setting is refused before that."""

import dataclasses
import json
import os
import re
import subprocess
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shared import run


@dataclasses.dataclass(frozen=True)
class Config:
    env: str = "point_u_maze"
    """The
    environment."""
    rate: float = 0.5
    """A rate."""
    kind: Literal["a", "b"] = "a"
    """A choice."""
    flag: bool = True
    """A switch."""
    size: int | None = None
    """A size."""
    total_env_steps: int = 100
    """Steps."""
    seed: int = 0
    """Seed."""
    num_seeds: int = 1
    """Seeds."""
    run_dir: str = ""
    """Folder."""
    resume: str = ""
    """Folder."""
    tensorboard: bool = False
    """TensorBoard."""
    wandb: bool = False
    """wandb."""


RECIPES = {"point_*": {"rate": 0.1}, "point_u*": {"size": 3}}


def configure(*flags):
    return run.configure(Config, RECIPES, "What it is.", ["script.py", *flags])


def test_flags_override_the_recipe_which_overrides_the_defaults():
    assert configure() == Config(rate=0.1, size=3)
    assert configure("--env=ant") == Config(env="ant")
    given = configure("--rate=0.7", "--kind", "b", "--flag=false", "--size=9", "--env", "point_x")
    assert given == Config(rate=0.7, kind="b", flag=False, size=9, env="point_x")
    assert configure("--noflag", "--env=ant").flag is False


def test_help_shows_every_field_with_its_text_and_the_defaults_in_force(capsys):
    with pytest.raises(SystemExit) as exit_:
        configure("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--env The environment. (default: point_u_maze)" in text
    assert "--rate A rate. (default: 0.5; 0.1 for point_*)" in text
    assert "--kind A choice. One of a, b. (default: a)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rte=1"], "rte"),
        (["--rate=fast"], "rate"),
        (["--kind=c"], "a|b"),
        (["extra"], "'extra' is not a flag"),
        (["--resume=nowhere"], "nowhere is not a run folder"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(run.UserError) as error:
        configure(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


STEPS = {"env_steps": 20, "gradient_steps": 4}
STATE = {"key": jax.random.split(jax.random.key(3), 2), "x": jnp.arange(5.0), "n": jnp.array(7, jnp.int32)}


@pytest.fixture
def folder(tmp_path):
    """A run of two chunks with a checkpoint after each."""
    with run.Run(Config(run_dir=str(tmp_path / "r"), num_seeds=2), "test") as log:
        log.start_clock(0)
        for i in (1, 2):
            metrics = {"train/loss": np.array([0.1 * i, 0.2]), **({"eval/x": np.array([1.0, 2.0])} if i == 2 else {})}
            steps = {"env_steps": 20 * i, "gradient_steps": 4 * i}
            log.log(steps, metrics, ["train/loss", "eval/x"])
            log.save(jax.tree.map(lambda x, i=i: x if x.ndim == 1 and x.shape == (2,) else x * i, STATE), steps)
    return tmp_path / "r"


def resumed(folder):
    return run.Run(Config(resume=str(folder), num_seeds=2), "test")


def restore(folder):
    with resumed(folder) as log:
        return log.restore(jax.eval_shape(lambda: STATE))


def test_run_folder_says_what_was_run(folder):
    facts = json.loads((folder / "config.json").read_text())
    assert facts["config"]["num_seeds"] == 2 and facts["versions"]["jax"] == jax.__version__
    assert {"command", "commit", "device", "started"} <= set(facts)


def test_metrics_have_a_row_per_chunk_and_seed(folder):
    metrics = run.read_metrics(folder)
    assert metrics["seed"].tolist() == [0, 1, 0, 1]
    assert metrics["env_steps"].tolist() == [20, 20, 40, 40]
    np.testing.assert_allclose(metrics["train/loss"], [0.1, 0.2, 0.2, 0.2])
    np.testing.assert_array_equal(metrics["eval/x"], [np.nan, np.nan, 1, 2])
    assert set(run.TIMING_COLUMNS) <= set(metrics)


def test_restores_the_newest_checkpoint_exactly(folder):
    state, steps = restore(folder)
    assert steps == {"env_steps": 40, "gradient_steps": 8}
    np.testing.assert_array_equal(state["x"], np.arange(5.0) * 2)
    assert state["n"] == 14 and state["n"].dtype == jnp.int32
    np.testing.assert_array_equal(jax.random.normal(state["key"][1], 3), jax.random.normal(STATE["key"][1], 3))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def garbage(path):
    path.write_bytes(os.urandom(500))


def empty(path):
    path.write_bytes(b"")


def headless(path):
    path.write_bytes(b"[]\n")


@pytest.mark.parametrize("damage", [truncate, flip, garbage, empty, headless])
def test_a_damaged_checkpoint_gives_one_line_and_the_one_before_it(folder, damage, capsys):
    damage(sorted((folder / "checkpoints").glob("*.eqx"))[-1])
    state, steps = restore(folder)
    assert steps["env_steps"] == 20
    np.testing.assert_array_equal(state["x"], np.arange(5.0))
    assert len(re.findall("is damaged", capsys.readouterr().out)) == 1
    with resumed(folder) as log:  # the damaged one is set aside, and does not push out good ones
        for env_steps in (25, 30):
            log.save(STATE, {"env_steps": env_steps, "gradient_steps": 5})
    assert restore(folder)[1]["env_steps"] == 30
    assert run.read_metrics(folder)["env_steps"].tolist() == [20, 20], "rows after the checkpoint stay"


def test_without_an_intact_checkpoint_nothing_is_changed(folder):
    before = (folder / "metrics.csv").read_text()
    for path in (folder / "checkpoints").glob("*.eqx"):
        garbage(path)
    with pytest.raises(run.UserError, match=r"no checkpoint in .* is intact"):
        restore(folder)
    assert (folder / "metrics.csv").read_text() == before and len(list((folder / "checkpoints").iterdir())) == 2


def test_a_checkpoint_of_other_arrays_is_refused_and_kept(folder):
    like = jax.eval_shape(lambda: {**STATE, "x": jnp.zeros(6)})
    with resumed(folder) as log, pytest.raises(run.UserError, match="does not fit this version of the script") as error:
        log.restore(like)
    assert "\n" not in str(error.value)
    assert restore(folder)[1]["env_steps"] == 40


def test_a_run_killed_before_its_first_checkpoint_starts_over(folder, capsys):
    for path in (folder / "checkpoints").glob("*.eqx"):
        path.unlink()
    assert restore(folder) == (None, None)
    assert "starting from the beginning" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("text", ["", "seed,env_st"])
def test_a_header_cut_short_by_a_kill_is_written_anew(folder, text):
    (folder / "metrics.csv").write_text(text)
    with resumed(folder) as log:
        log.restore(jax.eval_shape(lambda: STATE))
        log.start_clock(40)
        log.log({"env_steps": 60, "gradient_steps": 12}, {"train/loss": np.ones(2)}, ["train/loss"])
    assert run.read_metrics(folder)["env_steps"].tolist() == [60, 60]


def test_a_row_cut_short_by_a_kill_is_dropped(folder):
    with (folder / "metrics.csv").open("a") as file:
        file.write("0,40,8,1.0")
    restore(folder)
    assert run.read_metrics(folder)["env_steps"].tolist() == [20, 20, 40, 40]


def test_a_checkpoint_is_complete_or_absent(folder, monkeypatch):
    """A write that dies halfway leaves the earlier checkpoints in force."""

    def dies(file, tree):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(run.eqx, "tree_serialise_leaves", dies)
    with resumed(folder) as log, pytest.raises(run.UserError, match=r"cannot write checkpoint .*disk full"):
        log.save(STATE, {"env_steps": 60, "gradient_steps": 12})
    monkeypatch.undo()
    assert restore(folder)[1]["env_steps"] == 40
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_two_checkpoints_are_kept(folder):
    with resumed(folder) as log:
        log.save(STATE, {"env_steps": 60, "gradient_steps": 12})
    assert [int(p.stem) for p in sorted((folder / "checkpoints").iterdir())] == [40, 60]


def test_a_folder_that_holds_a_run_is_not_overwritten(folder):
    with pytest.raises(run.UserError, match="already holds a run"):
        run.Run(Config(run_dir=str(folder)), "test")


def test_a_resumed_run_takes_its_settings_from_its_folder(folder):
    assert configure(f"--resume={folder}").num_seeds == 2
    assert configure(f"--resume={folder}", "--num_seeds=2").num_seeds == 2
    with pytest.raises(run.UserError, match=r"--num_seeds=3 disagrees with the run in .*, which has 2"):
        configure(f"--resume={folder}", "--num_seeds=3")


def test_a_missing_logger_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(run.sys.modules, "wandb", None)
    with pytest.raises(run.UserError, match=r"--wandb needs packages that are missing: pip install"):
        run.Run(Config(run_dir=str(tmp_path / "w"), wandb=True), "test")
    run.Run(Config(run_dir=str(tmp_path / "w")), "test")  # the folder is not taken


def test_the_commit_tells_of_changed_code_and_not_of_results(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("shared/run.py", "results/a.csv", "results/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "commit", "-m", "m")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "shared/run.py"))
    assert re.fullmatch("[0-9a-f]{40}", run.commit())
    for name in ("results/a.csv", "README.md", "results/untracked.py"):
        (tmp_path / name).write_text("after")
    assert re.fullmatch("[0-9a-f]{40}", run.commit())
    (tmp_path / "results/a.py").write_text("after")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", run.commit())
