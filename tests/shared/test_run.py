"""Flags, run folders and bad input. Nothing here compiles: a bad setting is refused before that."""

import dataclasses
import importlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from annotated_types import Ge, Interval, MultipleOf

from shared import run


@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    env: str = "point_u_maze"
    """The
    environment."""
    rate: run.Fraction = 0.5
    """A rate."""
    kind: Literal["a", "b"] = "a"
    """A choice."""
    flag: bool = True
    """A switch."""
    size: run.Count | None = None
    """A size."""
    depth: Annotated[int, Ge(4), MultipleOf(4)] = 4
    """A depth."""
    threshold: Annotated[float, Interval(ge=0.5, lt=1), "so that it is unique"] = 0.5
    """A threshold."""
    total_env_steps: run.Steps = 100
    """Steps."""
    eval_every: run.Count = 40
    """Steps."""
    checkpoint_every: run.Count = 20
    """Steps."""
    final_lr_fraction: run.Share = 1.0
    """A share."""
    unbounded: float = 0.0
    """A number."""


RECIPES = {"point_*": "--rate 0.1", "point_u*": "--size 3\n  --noflag"}
SCORES = run.Scores("reward", {"eval/x": "mean action", "eval/missing": "sampled action"})


def configure(*flags):
    return run.configure(Config, RECIPES, "What it is.", ["script.py", *flags])


def test_flags_override_the_recipe_which_overrides_the_defaults():
    assert configure() == Config(rate=0.1, size=3, flag=False)
    assert configure("--env=ant") == Config(env="ant")
    given = configure("--rate=0.7", "--kind", "b", "--flag=false", "--size=9", "--env", "point_x")
    assert given == Config(rate=0.7, kind="b", flag=False, size=9, env="point_x")
    assert configure("--noflag", "--env=ant").flag is False
    assert configure("--flag").flag is True


def test_a_flag_may_stand_for_a_recipe(tmp_path):
    recipes = {**RECIPES, "--tensorboard": "--rate 0.2 --kind b"}
    configured = lambda *flags: run.configure(Config, recipes, None, ["script.py", *flags])
    assert configured("--tensorboard") == Config(tensorboard=True, rate=0.2, kind="b", size=3, flag=False)
    assert configured("--tensorboard", "--rate=0.3").rate == 0.3
    assert configured("--tensorboard=false") == configured() == Config(rate=0.1, size=3, flag=False)
    config = configured("--tensorboard", "--rate=0.3", f"--run_dir={tmp_path}")
    assert set(run._changed(config, recipes)) == {"tensorboard", "rate", "run_dir"}, "the recipe itself is not told"


def test_help_shows_every_field_with_its_text_and_the_defaults_in_force(capsys):
    with pytest.raises(SystemExit) as exit_:
        configure("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--env The environment. (default: point_u_maze)" in text
    assert "--rate A rate. It lies strictly between 0 and 1. (default: 0.5; 0.1 for point_*)" in text
    assert "--kind A choice. One of a, b. (default: a)" in text
    assert "--size A size. It is at least 1. (default: none; 3 for point_u*)" in text
    assert "--num_seeds Number of seeds" in text


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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rate=1", "rate is 1.0; it lies strictly between 0 and 1"),
        ("--rate=nan", "rate is nan; it lies strictly between 0 and 1"),
        ("--size=0", "size is 0; it is at least 1"),
        ("--depth=6", "depth is 6; it is a positive multiple of 4, e.g. 8"),
        ("--depth=-4", "depth is -4; it is a positive multiple of 4, e.g. 4"),
        ("--threshold=1", "threshold is 1.0; it lies in [0.5, 1), so that it is unique"),
        ("--final_lr_fraction=-0.1", "final_lr_fraction is -0.1; it lies in [0, 1]"),
        ("--total_env_steps=3000000000", "total_env_steps is 3000000000; it lies in [1, 2000000000]"),
        ("--seed=3000000000", "seed is 3000000000; it lies in [0, 2000000000]"),
        ("--seed=-1", "seed is -1; it lies in [0, 2000000000]"),
        ("--unbounded=inf", "unbounded is inf; it is a finite number"),
        ("--unbounded=nan", "unbounded is nan; it is a finite number"),
    ],
)
def test_a_value_out_of_its_range_is_one_line(flag, message):
    with pytest.raises(run.UserError) as error:
        configure(flag)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "number"), [("1e6", 1_000_000), ("2.5e3", 2500), ("1_000", 1000), ("1e-1", None), ("1.5", None)]
)
def test_whole_numbers_may_be_written_with_an_exponent(text, number):
    if number:
        assert configure(f"--total_env_steps={text}").total_env_steps == number
    else:
        with pytest.raises(run.UserError, match="total_env_steps"):
            configure(f"--total_env_steps={text}")


def test_a_home_folder_is_found(folder):
    assert configure("--run_dir=~/x").run_dir == os.path.expanduser("~/x")


def test_x64_is_refused():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(run.UserError, match="JAX_ENABLE_X64 is on"):
            configure()
    finally:
        jax.config.update("jax_enable_x64", False)


CRL = str(Path(run.__file__).parent.parent / "algorithms/crl.py")


@pytest.mark.parametrize(
    ("command", "env", "code", "said"),
    [
        ("{python} {crl}", {"JAX_PLATFORMS": "cuda"}, 2, "error: JAX finds no device for JAX_PLATFORMS=cuda; .*\n"),
        ("{python} {crl} --depth 5 2>&-", {}, 2, ""),
        ("{python} {crl} --depth 5 >&-", {}, 2, "error: depth is 5; it is a positive multiple of 4, e.g. 4\n"),
        ("{python} {crl} --depth 5 <&- >&- 2>&-", {}, 2, ""),
        ("{python} -OO {crl} --help >/dev/null", {}, 0, ""),
    ],
)
def test_odd_surroundings_are_one_line_or_right(command, env, code, said):
    options = {"shell": True, "env": {**os.environ, **env}, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command.format(python=shlex.quote(run.sys.executable), crl=shlex.quote(CRL)), **options)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(said, done.stderr), done.stderr


FORK = """
{future}
import dataclasses
from shared import run

@dataclasses.dataclass(frozen=True)
class Config(run.RunConfig):
    env: str = "ant"
    total_env_steps: run.Steps = 100
    extra: {kind} = {default}
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_a_field_of_a_fork_needs_no_docstring_and_may_be_a_string(tmp_path, monkeypatch, future, capsys):
    path = tmp_path / f"fork_{bool(future)}.py"
    path.write_text(FORK.format(future=future, kind="run.Count", default=3))
    monkeypatch.syspath_prepend(tmp_path)
    fork = importlib.import_module(path.stem)
    assert run.configure(fork.Config, {}, None, ["x", "--extra=4"]).extra == 4
    with pytest.raises(run.UserError, match="extra is 0; it is at least 1"):
        run.configure(fork.Config, {}, None, ["x", "--extra=0"])
    with pytest.raises(SystemExit):
        run.configure(fork.Config, {}, None, ["x", "--help"])
    assert "--extra\n      It is at least 1. (default: 3)" in capsys.readouterr().out.replace("       It", "      It")


def test_a_field_that_no_flag_can_set_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "fork_tuple.py").write_text(FORK.format(future="", kind="tuple[int, ...]", default="(1, 2)"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(run.UserError, match=r"Config.extra is a tuple\[int, ...\]; a flag is a bool, int, float"):
        run.configure(importlib.import_module("fork_tuple").Config, {}, None, ["x"])


def test_ranges_hold_at_their_ends():
    given = configure("--threshold=0.5", "--final_lr_fraction=0", "--depth=1024", "--size=1")
    assert (given.threshold, given.final_lr_fraction, given.depth, given.size) == (0.5, 0.0, 1024, 1)


class State(NamedTuple):
    agent: jax.Array
    env_steps: jax.Array
    gradient_steps: jax.Array
    key: jax.Array
    n: jax.Array


def state_at(env_steps: int) -> State:
    """Of a run of 2 seeds with 5 environment steps for a gradient step."""
    steps = [jnp.full(2, steps, jnp.int32) for steps in (env_steps, env_steps // 5)]
    agent = jnp.arange(10.0).reshape(2, 5) * env_steps
    return State(agent, *steps, jax.random.split(jax.random.key(env_steps), 2), jnp.array([7, env_steps], jnp.int32))


SHAPES = jax.eval_shape(lambda: state_at(20))


def chunks(log, start, *env_steps, **metrics):
    """Chunks that end at these steps, from a state."""
    state = state_at(start)
    for steps in env_steps:
        assert log.going(state)
        state = state_at(steps)
        values = {"train/loss": np.array([[0.1, 0.3], [steps / 100] * 2])}
        if log.evaluates(state):
            values["eval/x"] = np.array([1.0, 2.0])
        log.end_chunk(state, values | metrics)
    return state


def new_run(folder, **settings):
    log = run.Run(Config(run_dir=str(folder), num_seeds=2, **settings), "test", RECIPES, SCORES)
    log.columns += ["train/loss", "eval/x"]  # which `compile` finds
    return log


@pytest.fixture
def folder(tmp_path):
    """A run of two chunks with a checkpoint after each."""
    with new_run(tmp_path / "r") as log:
        chunks(log, 0, 20, 40)
    return tmp_path / "r"


def resumed(folder, **settings):
    log = run.Run(Config(resume=str(folder), num_seeds=2, **settings), "test", RECIPES, SCORES)
    log.columns += ["train/loss", "eval/x"]
    return log


def restore(folder):
    with resumed(folder) as log:
        return log.restore(SHAPES)


def test_run_folder_says_what_was_run(folder):
    facts = json.loads((folder / "config.json").read_text())
    assert facts["config"]["num_seeds"] == 2 and facts["versions"]["jax"] == jax.__version__
    assert {"command", "commit", "device", "started"} <= set(facts)


def test_metrics_have_a_row_per_chunk_and_seed(folder):
    metrics = run.read_metrics(folder)
    assert metrics["seed"].tolist() == [0, 1, 0, 1]
    assert metrics["env_steps"].tolist() == [20, 20, 40, 40]
    assert metrics["gradient_steps"].tolist() == [4, 4, 8, 8]
    np.testing.assert_allclose(metrics["train/loss"], [0.2, 0.2, 0.2, 0.4])  # means over gradient steps
    np.testing.assert_array_equal(metrics["eval/x"], [np.nan, np.nan, 1, 2])
    assert set(run.TIMING_COLUMNS) - set(metrics) == {"gradient_steps_per_second"}


def test_evaluations_are_due_at_multiples_and_at_the_end(tmp_path):
    with new_run(tmp_path / "r", total_env_steps=130, checkpoint_every=1000) as log:
        assert not log.going(chunks(log, 0, 30, 50, 70, 85, 135))
    evaluated = run.read_metrics(tmp_path / "r")
    steps = evaluated["env_steps"][~np.isnan(evaluated["eval/x"])]
    assert sorted(set(steps)) == [50, 85, 135], "crossed 40 and 80; the end"
    assert sorted(int(path.stem) for path in (tmp_path / "r/checkpoints").iterdir()) == [0, 135]


def test_an_evaluation_is_printed_and_the_folder_comes_last(tmp_path, capsys):
    with new_run(tmp_path / "r") as log:
        chunks(log, 0, 20, 40)
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == "env steps          40  reward: mean action 1.5"
    assert last == str(tmp_path / "r")


def test_evaluation_keys_are_of_their_seed_and_step_and_not_those_of_training(tmp_path):
    with new_run(tmp_path / "r", seed=5) as log:
        here, later = (log.evaluation_keys(state_at(steps)) for steps in (20, 40))
    expected = [jax.random.fold_in(jax.random.split(jax.random.key(seed), 4)[3], 4) for seed in (5, 6)]
    chex.assert_trees_all_equal(jax.random.key_data(here), jnp.stack([jax.random.key_data(key) for key in expected]))
    assert (jax.random.key_data(here) != jax.random.key_data(later)).any(axis=1).all()


@pytest.mark.parametrize(
    ("metrics", "what"),
    [
        (
            {"train/a_loss": np.array([[1, 2, np.nan], [1, np.inf, 2]])},
            "train/a_loss is inf at gradient step 6 of seed 1",
        ),
        ({"train/loss": np.array([np.nan, 1])}, "train/loss is nan at env step 40 of seed 0"),
        ({}, "a parameter is not finite after gradient step 8"),
    ],
)
def test_what_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, metrics, what):
    with new_run(tmp_path / "r") as log:
        state = chunks(log, 0, 20)
        assert log.going(state)
        after = state_at(40)
        after = after if metrics else after._replace(agent=after.agent.at[1, 2].set(jnp.nan))
        with pytest.raises(run.UserError, match=f"^{what}; training stopped, the last good checkpoint is kept"):
            log.end_chunk(after, {"train/unlucky": np.array([np.nan, 1]), **metrics})
    assert restore(tmp_path / "r").env_steps[0] == 20


def test_a_metric_may_be_a_sum_and_a_count_and_is_unknown_where_the_count_is_0(tmp_path):
    with new_run(tmp_path / "r") as log:
        log.columns += ["train/return"]
        chunks(log, 0, 20, **{"train/return": (np.array([6.0, 0]), np.array([4, 0]))})
    np.testing.assert_array_equal(run.read_metrics(tmp_path / "r")["train/return"], [1.5, np.nan])


def test_failed_steps_of_a_simulator_are_said_once(tmp_path, capsys):
    with new_run(tmp_path / "r") as log:
        log.columns += ["train/broken_steps"]
        for before, after, broken in ((0, 20, 0), (20, 40, 3), (40, 60, 3)):
            chunks(log, before, after, **{"train/broken_steps": np.array([0, broken])})
    said = [line for line in capsys.readouterr().out.splitlines() if "failed in" in line]
    assert said == [
        "the simulator of point_u_maze failed in 3 steps until env step 40 (not finite); nothing is learned from them"
    ]


def test_a_matmul_precision_acts_only_when_given(tmp_path, capsys):
    jax.config.update("jax_default_matmul_precision", "bfloat16")
    try:
        for given, holds in ((None, "bfloat16"), ("tensorfloat32", "tensorfloat32")):
            with new_run(tmp_path / str(given), matmul_precision=given) as log:
                log.describe()
            assert jax.config.jax_default_matmul_precision == holds
            assert f"matmul precision {holds}" in capsys.readouterr().out
    finally:
        jax.config.update("jax_default_matmul_precision", None)


def test_a_terminal_that_is_gone_or_knows_few_letters_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        run.say(pipe, "nobody listens")
        run.say(pipe, "still nobody")
    letters = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run.say(letters, "0 \u2212 1")
    assert letters.buffer.getvalue() == b"0 \\u2212 1"


def test_nohup_keeps_a_run_going_at_the_end_of_the_terminal(tmp_path):
    before = run.signal.signal(run.signal.SIGHUP, run.signal.SIG_IGN)
    try:
        with new_run(tmp_path / "r") as log:
            os.kill(os.getpid(), run.signal.SIGHUP)
            assert log.going(chunks(log, 0, 20)) and not log.stopping
    finally:
        run.signal.signal(run.signal.SIGHUP, before)


def test_the_end_of_the_terminal_stops_a_run_after_its_chunk(tmp_path, request):
    before = run.signal.signal(run.signal.SIGHUP, run.signal.SIG_DFL)  # the tests may run under nohup
    request.addfinalizer(lambda: run.signal.signal(run.signal.SIGHUP, before))
    with pytest.raises(SystemExit) as exit_, new_run(tmp_path / "r") as log:
        state = chunks(log, 0, 20)
        os.kill(os.getpid(), run.signal.SIGHUP)
        log.going(state)
    assert exit_.value.code == 128 + run.signal.SIGHUP
    assert restore(tmp_path / "r").env_steps[0] == 20


def test_rows_that_do_not_fit_the_disk_come_with_the_next_and_the_run_goes_on(tmp_path, capsys):
    """The limit on the size of files lets half of a row through, like a disk that is nearly full."""
    with new_run(tmp_path / "r") as log:
        state = chunks(log, 0, 20)
        size = (tmp_path / "r/metrics.csv").stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
        try:
            log.going(state)
            state = state_at(40)
            log.end_chunk(state, {"train/loss": np.ones(2)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "r/metrics.csv").stat().st_size == size
        said = capsys.readouterr().out
        assert "warning: cannot write" in said and "these rows come with the next" in said
        assert "warning: cannot write checkpoint" in said
        assert log.going(state)
        log.end_chunk(state_at(60), {"train/loss": np.ones(2)})
    assert run.read_metrics(tmp_path / "r")["env_steps"].tolist() == [20, 20, 40, 40, 60, 60]
    assert restore(tmp_path / "r").env_steps[0] == 60


def test_rows_that_are_lost_at_the_end_are_an_error(tmp_path):
    with pytest.raises(run.UserError, match=r"metrics.csv lacks its last rows"), new_run(tmp_path / "r") as log:
        (tmp_path / "r/metrics.csv").mkdir()
        chunks(log, 0, 20)


def test_a_picture_that_cannot_be_written_is_said(tmp_path, capsys):
    def full():
        raise OSError("no space")

    with new_run(tmp_path / "r") as log:
        log.draw("curve", full)
        log.draw("map", lambda name: name, "map.png")
    assert re.search(r"curve +warning: not drawn: no space\nmap +map.png\n", capsys.readouterr().out)


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: no bytes left", "INTERNAL: Out of memory allocating 9 bytes"])
def test_too_little_memory_is_one_line(tmp_path, said):
    with pytest.raises(run.UserError, match=r"out of memory on .*; fewer --num_seeds"), new_run(tmp_path / "r"):
        raise jax.errors.JaxRuntimeError(said)


def test_line_ends_of_metrics_are_of_one_kind(folder):
    with resumed(folder) as log:
        log.restore(SHAPES)
        chunks(log, 40, 60)
    assert b"\r" not in (folder / "metrics.csv").read_bytes()


class Logger:
    """Stands for the modules wandb and tensorboardX."""

    def __init__(self, fails=False):
        self.started, self.logged, self.fails = [], [], fails

    def init(self, **settings):
        if self.fails == "at once":
            raise ValueError("no\nkey")
        self.started.append(settings)
        return self

    def SummaryWriter(self, folder, purge_step):
        return self.init(purge_step=purge_step)

    def log(self, metrics, step):
        if self.fails:
            raise ConnectionError("gone")
        self.logged.append((step, metrics))

    def add_scalar(self, name, value, step):
        self.logged.append((step, {name: value}))

    def finish(self):
        pass

    close = finish


def test_weights_and_biases_know_a_run_by_an_id_of_its_own(tmp_path, monkeypatch):
    wandb = Logger()
    monkeypatch.setitem(run.sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name in "ab":
        with new_run(tmp_path / name, wandb=True) as log:
            chunks(log, 0, 20)
    with resumed(tmp_path / "a", wandb=True):
        pass
    first, other, again = (settings["id"] for settings in wandb.started)
    assert first == again != other and re.fullmatch("[0-9a-f]{16}", first)
    assert os.environ["WANDB_PROJECT"] == "cleancrl"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with resumed(tmp_path / "a", wandb=True):
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert [step for step, _ in wandb.logged] == [20, 20]


def test_a_logger_that_fails_is_one_line_and_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.sys.modules, "wandb", Logger(fails="at once"))
    with pytest.raises(run.UserError, match="wandb failed: ValueError") as error:
        new_run(tmp_path / "a", wandb=True)
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()
    monkeypatch.setitem(run.sys.modules, "wandb", Logger(fails=True))
    with new_run(tmp_path / "b", wandb=True) as log:
        chunks(log, 0, 20, 40)
    assert capsys.readouterr().out.count("wandb failed, and the run goes on without it") == 1


def test_tensorboard_forgets_what_a_resumed_run_repeats_and_gets_no_nan(folder, monkeypatch):
    board = Logger()
    monkeypatch.setitem(run.sys.modules, "tensorboardX", board)
    with resumed(folder, tensorboard=True) as log:
        log.restore(SHAPES)
        chunks(log, 40, 60, **{"eval/x": np.array([np.nan, 1.0])})
    assert board.started == [{"purge_step": 60}]
    assert {name for _, metrics in board.logged for name in metrics} == {"train/loss"}


def test_restores_the_newest_checkpoint_exactly(folder):
    state = restore(folder)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, SHAPES)
    draws = lambda state: state._replace(key=jax.vmap(lambda key: jax.random.normal(key, 3))(state.key))
    chex.assert_trees_all_equal(draws(state), draws(state_at(40)))


def test_what_is_unsaved_is_none_after_a_resume(tmp_path):
    config = Config(run_dir=str(tmp_path / "r"), num_seeds=2)
    with run.Run(config, "test", RECIPES, SCORES, unsaved=("n",)) as log:
        log.save(state_at(20))
    with run.Run(dataclasses.replace(config, resume=config.run_dir), "test", RECIPES, SCORES, unsaved=("n",)) as log:
        state = log.restore(SHAPES)
    assert state.n is None
    np.testing.assert_array_equal(state.agent, state_at(20).agent)


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
    state = restore(folder)
    assert state.env_steps[0] == 20
    np.testing.assert_array_equal(state.agent, state_at(20).agent)
    assert len(re.findall("is damaged", capsys.readouterr().out)) == 1
    with resumed(folder) as log:  # the damaged one is set aside, and does not push out good ones
        for env_steps in (25, 30):
            log.save(state_at(env_steps))
    assert restore(folder).env_steps[0] == 30
    assert run.read_metrics(folder)["env_steps"].tolist() == [20, 20], "rows after the checkpoint stay"


def test_without_an_intact_checkpoint_nothing_is_changed(folder):
    before = (folder / "metrics.csv").read_text()
    for path in (folder / "checkpoints").glob("*.eqx"):
        garbage(path)
    with pytest.raises(run.UserError, match=r"no checkpoint in .* is intact"):
        restore(folder)
    assert (folder / "metrics.csv").read_text() == before and len(list((folder / "checkpoints").iterdir())) == 2


def test_a_checkpoint_of_other_arrays_is_refused_and_kept(folder):
    like = SHAPES._replace(agent=jax.ShapeDtypeStruct((2, 6), jnp.float32))
    with resumed(folder) as log, pytest.raises(run.UserError, match="does not fit this version of the script") as error:
        log.restore(like)
    assert "\n" not in str(error.value)
    assert restore(folder).env_steps[0] == 40


def test_a_run_killed_before_its_first_checkpoint_starts_over(folder, capsys):
    for path in (folder / "checkpoints").glob("*.eqx"):
        path.unlink()
    assert restore(folder) is None
    assert "starting from the beginning" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("text", ["", "seed,env_st"])
def test_a_header_cut_short_by_a_kill_is_written_anew(folder, text):
    (folder / "metrics.csv").write_text(text)
    with resumed(folder) as log:
        log.restore(SHAPES)
        chunks(log, 40, 60)
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
        log.save(state_at(60))
    monkeypatch.undo()
    assert restore(folder).env_steps[0] == 40
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_two_checkpoints_are_kept(folder):
    with resumed(folder) as log:
        log.save(state_at(60))
    assert [int(p.stem) for p in sorted((folder / "checkpoints").iterdir())] == [40, 60]


def test_a_folder_that_holds_a_run_or_its_checkpoints_is_not_overwritten(folder):
    with pytest.raises(run.UserError, match="already holds a run"):
        new_run(folder)
    (folder / "config.json").unlink()
    with pytest.raises(run.UserError, match="already holds a run"):
        new_run(folder)


def test_default_folders_are_told_apart_by_their_settings_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda _: "now")
    names = []
    for flags in (["--seed=2"], ["--seed=2"], ["--size=9", "--env_options=layout=a/b"]):
        with run.Run(configure("--num_seeds=2", *flags), "test", RECIPES, SCORES) as log:
            log.save(state_at(20))
            names.append(log.folder.relative_to("runs/test/point_u_maze").as_posix())
    assert names == [
        f"num_seeds=2-{end}" for end in ("seed=2-now", "seed=2-now-2", "env_options=layout=a_b-size=9-seed=0-now")
    ]


def test_one_process_at_a_time_is_at_work_on_a_folder(tmp_path):
    with new_run(tmp_path / "r") as log:
        chunks(log, 0, 20)
        with pytest.raises(run.UserError, match=r"another process is at work on .*; wait until it ends"):
            resumed(tmp_path / "r")
        assert run.load_config(Config, tmp_path / "r").num_seeds == 2, "reading is no work"
    assert restore(tmp_path / "r").env_steps[0] == 20


@pytest.mark.parametrize("stopping", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_the_folder_free(tmp_path, stopping, capsys):
    with pytest.raises(SystemExit if stopping else ZeroDivisionError), new_run(tmp_path / "r") as log:
        log.stopping = run.signal.SIGINT if stopping else None
        log.exit_if_stopping()
        raise ZeroDivisionError
    assert not (tmp_path / "r").exists()
    assert ("nothing was kept" in capsys.readouterr().out) == stopping


def test_each_start_is_recorded_and_what_differs_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "commit", lambda script: "abc")
    restore(folder)
    with resumed(folder) as log:
        log.describe()
    assert " before, and is " not in capsys.readouterr().out
    monkeypatch.setattr(run, "commit", lambda script: "def+changes")
    monkeypatch.setattr(run.jax, "__version__", "0.99")
    with resumed(folder) as log:
        log.describe()
    said = capsys.readouterr().out
    assert "commit was abc before, and is def+changes" in said and "device was cpu" in said
    facts = json.loads((folder / "config.json").read_text())
    assert [start["commit"] for start in facts["resumed"]] == ["abc", "abc", "def+changes"]
    assert facts["commit"] not in ("abc", "def+changes")


@pytest.mark.parametrize("cwd", ["/", os.path.dirname(__file__)])
def test_the_recorded_command_can_be_typed_and_gives_the_same_settings(tmp_path, monkeypatch, cwd):
    """Of a script, what was typed; of a notebook, whose command line is another program's, what differs."""
    monkeypatch.chdir(cwd)
    config = configure("--size=9", "--noflag", "--env=point_x")
    for argv in ([__file__, "--size=9", "--env=point_x", "--flag=false"], ["ipykernel_launcher.py", "-f", "x.json"]):
        monkeypatch.setattr(run.sys, "argv", argv)
        python, script, *flags = shlex.split(run._facts(config, RECIPES)["command"])
        assert subprocess.run([python, "-c", "import jax"], check=False).returncode == 0
        assert os.path.samefile(script, __file__)
        assert configure(*flags) == config


def test_modules_of_another_checkout_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "shared/run.py"))
    with new_run(tmp_path / "r") as log:
        log.describe()
        chunks(log, 0, 20)
    assert f"envs/ and shared/ are those of {tmp_path}, not of " in capsys.readouterr().out


def test_a_resumed_run_takes_its_settings_from_its_folder(folder):
    assert configure(f"--resume={folder}").num_seeds == 2
    assert configure(f"--resume={folder}", "--num_seeds=2").num_seeds == 2
    with pytest.raises(run.UserError, match=r"--num_seeds=3 disagrees with the run in .*, which has 2"):
        configure(f"--resume={folder}", "--num_seeds=3")


@pytest.mark.parametrize("steps", [100, 60])
def test_a_run_goes_on_with_more_steps_and_says_so_in_its_folder(folder, steps, monkeypatch):
    monkeypatch.setattr(run.sys, "argv", [__file__, "--resume", "there"])
    if steps == 60:
        with pytest.raises(run.UserError, match=r"--total_env_steps=60 disagrees with the run in .*, which has 100"):
            configure(f"--resume={folder}", f"--total_env_steps={steps}")
        return
    config = configure(f"--resume={folder}", "--total_env_steps=140")
    with run.Run(config, "test", RECIPES, SCORES) as log:
        log.columns += ["train/loss", "eval/x"]
        assert log.going(log.restore(SHAPES))
        state = chunks(log, 40, 120)
        assert log.going(state), "the earlier total of 100 does not hold any more"
    facts = json.loads((folder / "config.json").read_text())
    assert facts["config"]["total_env_steps"] == 140
    assert [start["command"].split()[2:] for start in facts["resumed"]] == [["--resume", "there"]]
    assert configure(f"--resume={folder}").total_env_steps == 140


def test_a_run_whose_learning_rates_fall_until_its_end_does_not_go_on_after_it(tmp_path):
    with new_run(tmp_path / "r", final_lr_fraction=0.1):
        pass
    with pytest.raises(run.UserError, match=r"fall until step 100 \(final_lr_fraction\), so it cannot go on to 140"):
        configure(f"--resume={tmp_path / 'r'}", "--total_env_steps=140")
    assert configure(f"--resume={tmp_path / 'r'}", "--total_env_steps=100").total_env_steps == 100


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_loading_an_agent_only_reads(folder):
    before = contents(folder)
    config = run.load_config(Config, folder)
    make_agent = lambda key: jax.random.normal(key, 5)
    np.testing.assert_array_equal(run.load_agent(make_agent, folder, config), state_at(40).agent[0])
    np.testing.assert_array_equal(run.load_agent(make_agent, folder, config, seed=1), state_at(40).agent[1])
    flip(sorted((folder / "checkpoints").glob("*.eqx"))[-1])
    np.testing.assert_array_equal(run.load_agent(make_agent, folder, config), state_at(20).agent[0])
    flip(sorted((folder / "checkpoints").glob("*.eqx"))[-1])
    assert {path: data for path, (_, data) in contents(folder).items()} == {p: data for p, (_, data) in before.items()}
    assert set(contents(folder)) == set(before)


def test_a_run_that_is_going_on_is_loaded_and_not_touched(tmp_path, monkeypatch):
    folder, make_agent = tmp_path / "r", lambda key: jnp.zeros(5)
    with new_run(folder, checkpoint_every=20) as log:
        chunks(log, 0, 20, 40)
        before = contents(folder)
        config = run.load_config(Config, folder)
        np.testing.assert_array_equal(run.load_agent(make_agent, folder, config), state_at(40).agent[0])
        assert contents(folder) == before
        chunks(log, 40, 60, 80)  # the lock, the rows and the checkpoints are still its own
        listed = run._checkpoints(folder)
        chunks(log, 80, 100)
        monkeypatch.setattr(run, "_checkpoints", lambda _: listed[::-1])  # as listed before the run deleted one
        np.testing.assert_array_equal(run.load_agent(make_agent, folder, config), state_at(80).agent[0])
    assert run.read_metrics(folder)["env_steps"].tolist() == np.repeat([20, 40, 60, 80, 100], 2).tolist()


def test_the_time_that_a_run_takes_is_said_at_its_start_and_when_that_changes(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.Run, "seconds", property(lambda _: clock[0]))
    with new_run(tmp_path / "r", total_env_steps=100) as log:
        state = state_at(0)
        for env_steps, seconds in ((20, 10), (40, 21), (60, 100), (80, 110), (100, 120)):
            assert log.going(state)
            clock[0], state = seconds, state_at(env_steps)
            log.end_chunk(state, {})
    said = re.findall(r"^about .*", capsys.readouterr().out, re.M)
    assert said == ["about 0:00:40 to go", "about 0:01:06 to go"]


def test_loading_says_what_there_is_not(folder, tmp_path):
    config = run.load_config(Config, folder)
    with pytest.raises(run.UserError, match=r"seed is 2; .* has 2 seed\(s\) from 0 on"):
        run.load_agent(lambda key: jnp.zeros(5), folder, config, seed=2)
    with pytest.raises(run.UserError, match="does not fit this version of the script"):
        run.load_agent(lambda key: jnp.zeros(6), folder, config)
    for path in (folder / "checkpoints").glob("*.eqx"):
        garbage(path)
    with pytest.raises(run.UserError, match="has no intact checkpoint"):
        run.load_agent(lambda key: jnp.zeros(5), folder, config)
    with pytest.raises(run.UserError, match="is not a run folder"):
        run.load_config(Config, tmp_path)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_compiled_function_is_batched_and_traced_once_and_its_metrics_become_columns(tmp_path, num_seeds):
    chex.clear_trace_counter()

    @chex.assert_max_traces(1)
    def chunk(state):
        return state._replace(agent=state.agent + 1), {"train/a": state.agent.sum(), "eval/b": jnp.zeros(())}

    with run.Run(Config(run_dir=str(tmp_path / "r"), num_seeds=num_seeds), "test", RECIPES, SCORES) as log:
        state = jax.tree.map(lambda x: x[:num_seeds], state_at(20))
        compiled = log.compile("chunk", chunk, jax.eval_shape(lambda: state))
        for _ in range(3):
            state, metrics = compiled(state)
        assert log.columns == ["eval/b", "train/a"]
    chex.assert_shape(metrics["train/a"], (num_seeds,))
    np.testing.assert_array_equal(state.agent, state_at(20).agent[:num_seeds] + 3)


def test_a_program_of_one_seed_is_compiled_as_it_is_and_adds_no_columns(tmp_path):
    with run.Run(Config(run_dir=str(tmp_path / "r"), num_seeds=2), "test", RECIPES, SCORES) as log:
        add = log.compile_jitted("add", jax.jit(lambda x, y: (x + y, {"a": x})), jnp.ones(3), jnp.ones(3))
        np.testing.assert_array_equal(add(jnp.ones(3), jnp.arange(3.0))[0], [1, 2, 3])
        assert log.columns == [] and log.compile_seconds > 0


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
@pytest.mark.parametrize("failure", ["a worker died", None])
def test_environments_are_closed_and_their_failure_is_one_line(tmp_path, failure, kind):
    """An error of a callback is a ValueError where JAX calls a jitted function for the second time."""
    for saved, said in ((False, "a worker died$"), (True, "a worker died; to go on .*: --resume")):
        closed = []
        worlds = [
            SimpleNamespace(failure=f, close=lambda f=f, closed=closed: closed.append(f)) for f in (None, failure)
        ]
        with (
            pytest.raises(run.UserError if failure else kind, match=said if failure else "another fault"),
            run.Run(Config(run_dir=str(tmp_path / "r")), "test", RECIPES, SCORES, worlds=worlds) as log,
        ):
            if saved:
                log.save(state_at(20))
            raise kind("another fault")
        assert closed == [None, failure]


@pytest.mark.parametrize("donated", [False, True])
def test_when_a_world_fails_the_state_before_the_chunk_is_saved_if_it_is_still_there(tmp_path, donated):
    worlds = [SimpleNamespace(failure="a worker died", close=lambda: None)]
    with (
        pytest.raises(run.UserError, match=r"a worker died; to go on .*: --resume"),
        run.Run(Config(run_dir=str(tmp_path / "r")), "test", RECIPES, SCORES, worlds=worlds) as log,
    ):
        log.going(jax.tree.map(jnp.copy, state_at(20)))  # which saves the first one in any case
        state = jax.tree.map(jnp.copy, state_at(40))
        log.going(state)
        log.evaluates(state_at(60))  # not yet in metrics.csv: it is to be made again
        if donated:
            state.agent.delete()
        raise RuntimeError("another fault")
    saved = sorted(int(path.stem) for path in (tmp_path / "r" / "checkpoints").glob("*.eqx"))
    assert saved == ([20] if donated else [20, 40])


def test_a_missing_logger_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(run.sys.modules, "wandb", None)
    with pytest.raises(run.UserError, match=r"--wandb needs packages that are missing: pip install"):
        new_run(tmp_path / "w", wandb=True)
    new_run(tmp_path / "w")  # the folder is not taken


def test_the_commit_tells_of_changed_code_and_not_of_results(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("shared/run.py", "results/a.csv", "experiments/a.py", "README.md"):
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
    for script, changes in (
        ("experiments/a.py", ""),
        ("results/untracked.py", r"\+changes"),
        ("../b.py", r"\+changes"),
    ):
        assert re.fullmatch(f"[0-9a-f]{{40}}{changes}", run.commit(tmp_path / script)), script
    (tmp_path / "experiments/a.py").write_text("after")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", run.commit())


@pytest.mark.parametrize(
    ("devices", "seeds", "environments", "complaint"),
    [
        (5, 4, None, "devices is 5; point_u_maze can have 4 here"),
        (3, 4, None, "devices is 3, which does not divide the 4 seeds; the nearest is 2"),
        (2, 9, None, "devices is 2, which does not divide the 9 seeds; the nearest is 1"),
        (4, 1, {"envs": 0}, "devices is 4, which does not divide the 6 environments; the nearest is 3"),
        (2, 1, None, "devices is 2, which does not divide the 1 seeds; the nearest is 1"),
    ],
)
def test_devices_that_cannot_be_are_refused_in_one_line(monkeypatch, devices, seeds, environments, complaint):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    config = SimpleNamespace(devices=devices, num_seeds=seeds, num_envs=6, processes=1, env="point_u_maze")
    with pytest.raises(run.UserError, match=f"^{complaint}$"):
        run._mesh(config, environments, in_jax=True)
