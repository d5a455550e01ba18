"""crl.py as a user runs it: killed, resumed, stopped, gone wrong. Tiny settings, real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Script, check_close, lose_last_checkpoint, metrics, train

import envs
from algorithms import crl
from shared import run

TINY = [
    *("--num_envs=8", "--episode_length=20", "--unroll_length=10", "--updates_per_chunk=4", "--batch_size=16"),
    *("--min_replay_size=20", "--max_replay_size=60", "--width=16", "--num_eval_envs=4"),
    *("--eval_every=800", "--checkpoint_every=400"),
]
REFERENCE = [*TINY, "--num_seeds=2", "--total_env_steps=8000"]


SCRIPT = Script(crl)
run_to_end = SCRIPT.run


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """An uninterrupted run of 2 seeds: its parent folder, its flags and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_to_end(*REFERENCE, f"--run_dir={folder / 'whole'}", cwd=folder, env=cache)
    return folder, REFERENCE, done


def test_prints_what_it_is_and_last_the_run_folder(reference):
    folder, _, done = reference
    lines = done.stdout.splitlines()
    assert lines[-1] == str(folder / "whole")
    for words in (
        r"recipe for point_u_maze",
        r"layers in residual blocks: 4 in the actor, 4 in the critic",
        r"actor\s+[\d,]+ parameters",
        r"device cpu",
        r"compiled learn in .* s",
    ):
        assert re.search(words, done.stdout), words
    assert "steps/s" in done.stderr and "left" in done.stderr
    assert re.search(r"left  uniform goals, mean action \d", done.stderr)
    assert re.search(r"env steps +8,000  episodes that reach their goal: uniform .*; far goals, sampled", done.stdout)
    assert {"config.json", "metrics.csv", "checkpoints", "curve.png", "value_map.png", "trajectories.png"} <= {
        p.name for p in (folder / "whole").iterdir()
    }


def test_seeds_on_two_devices_train_the_same(reference, cache):
    SCRIPT.check_seeds_on_devices(reference, cache, "learn")


def test_two_seeds_differ(reference):
    seeds = {row["seed"]: row["train/critic_loss"] for row in metrics(reference[0] / "whole")}
    assert seeds["0"] != seeds["1"]


def test_killed_stopped_and_resumed_it_ends_with_the_same_metrics(reference, cache):
    SCRIPT.check_interruptions(reference, cache, signal.SIGTERM)


def test_without_the_replay_in_its_checkpoint_a_run_refills_it_and_says_so(reference, capsys):
    folder, flags, _ = reference
    small = folder / "small"
    train(crl, *flags, "--checkpoint_replay=false", f"--run_dir={small}")
    lose_last_checkpoint(small)
    sizes = [
        max(p.stat().st_size for p in (folder / name / "checkpoints").glob("*.eqx")) for name in ("small", "whole")
    ]
    assert sizes[0] < sizes[1]
    capsys.readouterr()
    train(crl, f"--resume={small}")
    assert "refilling it with the current policy" in capsys.readouterr().out
    assert [row["env_steps"] for row in metrics(small)] == [row["env_steps"] for row in metrics(folder / "whole")]


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, cache):
    flags = [*TINY, "--total_env_steps=4000", "--critic_lr=1e38", f"--run_dir={tmp_path / 'r'}"]
    done = run_to_end(*flags, cwd=tmp_path, code=2, env=cache)
    assert re.search(r"^error: (train/\w+_loss is|a parameter is not) .* gradient step \d+", done.stderr, re.MULTILINE)
    assert list((tmp_path / "r" / "checkpoints").glob("*.eqx"))


def test_two_processes_are_one_run_that_one_can_go_on_with(reference, cache):
    folder, flags, _ = reference
    flags = [*flags, "--processes=2", f"--run_dir={folder / 'two'}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = [{**SCRIPT.env, **cache, "JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)} for i in (0, 1)]
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, SCRIPT.path, *flags], env=env, **options) for env in variables]
    rows = folder / "two" / "metrics.csv"
    deadline = time.monotonic() + 300
    while not rows.exists() or len(metrics(folder / "two")) < 40:
        assert both[0].poll() is None, both[0].stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in both:
        process.kill()
    (out, _), (other_out, _) = (process.communicate() for process in both)
    assert "seeds over 2 devices" in out and "run folder" not in other_out
    check_close(folder / "two", folder / "whole")
    train(crl, f"--resume={folder / 'two'}")
    assert [row["env_steps"] for row in metrics(folder / "two")] == [r["env_steps"] for r in metrics(folder / "whole")]
    check_close(folder / "two", folder / "whole")


def test_a_process_that_nothing_tells_who_it_is_says_so(tmp_path):
    done = run_to_end("--processes=2", cwd=tmp_path, code=2)
    assert re.search("^error: processes is 2, and nothing says which this is; set JAX_COORDINATOR_ADDRESS", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_loaded_agent_is_the_runs(reference):
    """Scored under the keys of the last evaluation, the loaded agents have its scores; loading changes nothing."""
    folder = reference[0] / "whole"
    contents = lambda: {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    before, rows = contents(), metrics(folder)[-2:]
    (config, env, _), _ = loaded = [crl.load(folder, int(row["seed"])) for row in rows]
    agents = jax.tree.map(lambda *x: jnp.stack(x), *(agent for *_, agent in loaded))
    key = lambda row: jax.random.fold_in(
        run.evaluation_key(jax.random.key(int(row["seed"]))), int(row["gradient_steps"])
    )
    score = partial(crl.evaluate, config, env, envs.make("point_u_maze_eval"))
    scores = jax.jit(jax.vmap(score))(agents, jnp.stack([key(row) for row in rows]))
    for name, values in scores.items():
        np.testing.assert_allclose(values, [float(row[name]) for row in rows], rtol=1e-5, err_msg=name)
    assert contents() == before
    with pytest.raises(run.UserError, match="seed is 2"):
        crl.load(folder, 2)


UNFADING = [*TINY, "--final_lr_fraction=1", "--random_goals=0"]


@pytest.fixture(scope="module")
def unfading(tmp_path_factory):
    """A run of one seed whose learning rates do not fall: what it does at a step does not depend on its length, and as
    1600 steps are a multiple of eval_every, a run that ends there has no row with an evaluation of its own."""
    folder = tmp_path_factory.mktemp("unfading") / "whole"
    train(crl, *UNFADING, "--total_env_steps=2400", f"--run_dir={folder}")
    return folder


def test_a_finished_run_goes_on_as_if_it_had_been_planned_longer(unfading, tmp_path):
    train(crl, *UNFADING, "--total_env_steps=1600", f"--run_dir={tmp_path}")
    train(crl, f"--resume={tmp_path}", "--total_env_steps=2400")
    assert metrics(tmp_path) == metrics(unfading)


def test_environments_of_one_seed_on_four_devices_train_the_same(unfading, tmp_path, cache):
    folder = tmp_path / "run"
    flags = [*UNFADING, "--total_env_steps=1600", f"--run_dir={folder}"]
    out, facts = SCRIPT.on_devices(4, flags, tmp_path, cache)
    assert "environments over 4 devices" in out
    shares = [(shape, share) for shape, share in facts["learn"]["shares"] if shape[1:3] == [60, 8]]
    assert len(shares) > 4 and all(share[2] == 2 for _, share in shares), "each device has its part of the replay"
    assert "all-reduce" in facts["learn"]["collectives"], "of the gradients"
    assert not any(60 in shape for shape in facts["learn"]["gathered"]), "never the replay"
    assert any(16 in shape for shape in facts["learn"]["gathered"]), "but parts of the batch"
    assert facts["collect"]["reused"] > 0 and facts["learn"]["reused"] > 0
    check_close(folder, unfading)
    # and on one device from where four had come
    train(crl, f"--resume={folder}", "--devices=1", "--total_env_steps=2400")
    check_close(folder, unfading, rows=None)


def test_a_run_whose_learning_rates_have_fallen_does_not_go_on(reference, tmp_path):
    folder = reference[0] / "whole"
    done = run_to_end(f"--resume={folder}", "--total_env_steps=40000", cwd=tmp_path, code=2)
    assert re.fullmatch(r"error: the learning rates of the run in .* so it cannot go on to 40000; .*\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "flags",
    [
        ["--depth=1024", "--width=8"],
        ["--goals=fixed", "--relabel=published", "--dtype=bfloat16", "--energy=cosine", "--loss=sym_infonce"],
    ],
)
def test_settings_run_from_any_folder_with_finite_losses(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.debug_nans(True):
        train(crl, *TINY, "--total_env_steps=240", *flags)
    (folder,) = (tmp_path / "runs" / "crl" / "point_u_maze").iterdir()
    assert re.fullmatch(r"total_env_steps=240-num_envs=\d+-.*seed=0-\d{8}-\d{6}", folder.name)
    assert all(abs(float(row["train/critic_loss"])) < 1e6 for row in metrics(folder))


def test_from_images_it_trains_keeps_bytes_and_draws(tmp_path, cache):
    flags = "--env=point_u_maze_pixels", "--image_channels=1", "--total_env_steps=240"
    done = run_to_end(*TINY, *flags, f"--run_dir={tmp_path / 'run'}", cwd=tmp_path, env=cache)
    assert re.search(r"torso +[\d,]+ parameters", done.stdout)
    assert {"rollout.gif", "value_map.png", "trajectories.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    config, env, agent = crl.load(tmp_path / "run")
    assert [leaf.dtype.name for leaf in crl.empty_replay(config, env).data] == ["uint8", "float32", "uint8"]
    state = jax.jit(env.reset)(jax.random.key(0))
    act = jax.jit(lambda observation, goal: crl.policy(agent, observation, goal).mode())
    assert abs(act(state.observation, state.goal)).max() < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--env=humanoid_u_maze", "--env_options=goal_in_state=false", "--depth=64"],
        ["--env=arm_push_easy", "--depth=8"],
    ],
)
def test_humanoid_and_arm_train_evaluate_and_render(flags, tmp_path, cache):
    folder = tmp_path / "run"
    run_to_end(*TINY, *flags, "--total_env_steps=400", f"--run_dir={folder}", cwd=tmp_path, env=cache)
    rows, maze = metrics(folder), "maze" in flags[0]
    assert [int(row["env_steps"]) for row in rows] == list(range(240, 401, 80))
    assert float(rows[-1]["eval/distance"]) > 0.05
    assert not maze or float(rows[-1]["eval/far/distance"]) > 0.5
    page = (folder / "rollout.html").read_text()
    assert "webgl" in page.lower() and "http" not in page.replace("http://www.w3.org", "")
    assert page.count("sampled actions") == 4
    assert (folder / "value_map.png").exists() == maze


def test_help_lists_every_flag(tmp_path):
    done = run_to_end("--help", cwd=tmp_path)
    for field in crl.dataclasses.fields(crl.Config):
        assert f"--{field.name}\n" in done.stdout


def test_an_error_goes_to_stderr_with_a_code(tmp_path):
    done = run_to_end("--depth=5", cwd=tmp_path, code=2)
    assert done.stdout == "" and done.stderr.startswith("error: depth is 5")
    assert os.listdir(tmp_path) == []
