"""cocoa.py as a user runs it: killed, resumed, stopped, gone wrong. Tiny settings, real processes."""

import re
import signal
from functools import partial

import jax
import pytest
from commands import Script, check_repeats_its_end, metrics, train

import probe_embedding
from algorithms import cocoa
from shared import run

SCRIPT = Script(cocoa)
TINY = [
    *("--num_train_tasks=6", "--num_test_tasks=4", "--tasks_per_iteration=3", "--updates_per_iteration=4"),
    *("--width=8", "--encoder_width=8", "--batch_size=8", "--meta_batch=4", "--context_size=10", "--replay_size=30000"),
    *("--num_trajectories=4", "--latent_size=5", "--prior_steps=40", "--posterior_steps=0", "--extra_steps=40"),
    *("--exploration_episodes=1", "--eval_episodes=3", "--eval_every=960", "--checkpoint_every=480"),
]
REFERENCE = [*TINY, "--num_seeds=2", "--total_env_steps=8400"]
ROBOT = [
    *("--env=half_cheetah_vel", "--num_train_tasks=4", "--num_test_tasks=2", "--episode_length=20", "--width=16"),
    *("--initial_steps=20", "--prior_steps=40", "--extra_steps=0", "--tasks_per_iteration=2", "--meta_batch=4"),
    *("--batch_size=16", "--context_size=16", "--num_trajectories=4", "--updates_per_iteration=5"),
    *("--replay_size=20000", "--eval_every=400", "--checkpoint_every=160"),
]
FIGURES = {"curve.png", "embedding.png"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """An uninterrupted run of 2 seeds: its parent folder, its flags and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = SCRIPT.run(*REFERENCE, f"--run_dir={folder / 'whole'}", cwd=folder, env=cache)
    return folder, REFERENCE, done


def test_prints_what_it_is_and_last_the_run_folder(reference):
    folder, _, done = reference
    assert done.stdout.splitlines()[-1] == str(folder / "whole")
    for words in (
        "recipe for point_goal",
        "CoCOA: PEARL with the contrastive loss",
        "6 train tasks, 4 test tasks, by pure JAX",
        "agent +[0-9,]+ parameters",
        "compiled learn",
        "return on test tasks: adapted -[0-9.]+; before adaptation -[0-9.]+",
    ):
        assert re.search(words, done.stdout), words
    assert "steps/s" in done.stderr and "left" in done.stderr
    assert {path.name for path in (folder / "whole").iterdir()} >= {*FIGURES, "rollout.gif"}


def test_metrics_are_those_of_two_different_seeds(reference):
    folder, *_ = reference
    rows = metrics(folder / "whole")
    first, each = 6 * 200, 3 * (40 + 40)
    assert [int(row["env_steps"]) for row in rows[::2]] == list(range(first + each, 8_401, each))
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert rows[0]["train/critic_loss"] != rows[1]["train/critic_loss"]
    last = rows[-2]
    for name in ("eval/return_prior", "eval/return_adapted", "train/contrastive_loss"):
        assert float(last[name]) == float(last[name]), name
    assert -60 < float(last["eval/return_adapted"]) < 0


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_loaded_agent_acts_as_in_the_run_and_loading_changes_no_file(reference):
    folder = reference[0] / "whole"
    before, rows = files(folder), metrics(folder)[-2:]
    assert {int(row["seed"]) for row in rows} == {0, 1}
    for row in rows:
        config, family, agent = cocoa.load(str(folder), int(row["seed"]))
        seed_key = jax.random.key(int(row["seed"]))
        key = jax.random.fold_in(run.evaluation_key(seed_key), int(row["gradient_steps"]))
        test_tasks = jax.jit(partial(cocoa.init, config, family))(seed_key).test_tasks
        scores = jax.jit(partial(cocoa.evaluate, config, family))(agent, test_tasks, key)
        for name, value in scores.items():
            assert float(value) == pytest.approx(float(row[name]), rel=1e-5), name
    assert files(folder) == before


def test_the_probe_of_a_run_is_between_nothing_and_all(reference, capsys):
    folder = reference[0] / "whole"
    before = files(folder)
    probe_embedding.main(["probe_embedding.py", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [f"{folder}  seed {seed}  R2" for seed in (0, 1)]
    assert all(-3 < float(line.split()[-1]) <= 1 for line in lines)
    assert files(folder) == before


def test_seeds_on_two_devices_train_the_same(reference, cache):
    SCRIPT.check_seeds_on_devices(reference, cache, "learn")


def test_killed_stopped_and_resumed_it_ends_with_the_same_metrics(reference, cache):
    SCRIPT.check_interruptions(reference, cache, signal.SIGTERM)


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train(cocoa, *TINY, "--total_env_steps=12000", "--learning_rate=1e38", f"--run_dir={tmp_path / 'r'}")
    assert end.value.code == 2
    assert re.search(r"^error: .* gradient step \d+.*; training stopped", capsys.readouterr().err, re.MULTILINE)
    assert list((tmp_path / "r" / "checkpoints").glob("*.eqx"))


# the encoder: 5 x 8 + 8, two of 8 x 8 + 8, 8 x 10 + 10; a network with n inputs and m outputs: 8 n + 8 + 2 x 72 + 9 m
ENCODER = 48 + 144 + 90
NETWORK = lambda inputs, outputs: 8 * inputs + 8 + 144 + 9 * outputs
PEARL = ENCODER + 2 * NETWORK(9, 1) + NETWORK(7, 4) + NETWORK(7, 1)


@pytest.mark.parametrize(
    ("flag", "what", "parameters", "present", "absent"),
    [
        ("--contrastive=false", "PEARL", PEARL, "train/kl", "train/contrastive"),
        ("--context=oracle", "SAC that is told the task", PEARL - ENCODER - 96, "eval/return_oracle", "train/kl"),
        ("--similarity=bilinear", "CoCOA", PEARL + 25, "train/contrastive_loss", "eval/return_oracle"),
        ("--env=sparse_point_goal", "CoCOA", PEARL, "eval/return_adapted", "eval/return_oracle"),
    ],
)
def test_each_switch_changes_what_it_says(flag, what, parameters, present, absent, tmp_path, capsys):
    with jax.debug_nans(True):
        train(cocoa, *TINY, flag, "--total_env_steps=1300", f"--run_dir={tmp_path}")
    out = capsys.readouterr().out
    assert re.search(f"^{what}", out, re.MULTILINE) and re.search(f"agent +{parameters:,} parameters", out)
    (row,) = metrics(tmp_path)
    assert row[present] and not any(name.startswith(absent) for name in row)


@pytest.mark.slow
def test_half_cheetahs_train_adapt_and_end_the_same_again(tmp_path):
    whole = tmp_path / "whole"
    cocoa.main(["cocoa.py", *ROBOT, "--total_env_steps=800", f"--run_dir={whole}"])
    assert {path.name for path in whole.iterdir()} >= {*FIGURES, "rollout.html"}
    assert -100 < float(metrics(whole)[-1]["eval/return_adapted"]) < 0, "some m/s off, for 20 steps, and effort"
    check_repeats_its_end(cocoa, whole)
