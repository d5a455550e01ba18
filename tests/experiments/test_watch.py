"""Curves of runs, from folders that are written by hand."""

import json

import pytest

import watch
from shared import run


def write(folder, rows, script="crl.py", **settings):
    """A run folder with rows (seed, env_steps, success or None)."""
    folder.mkdir(parents=True)
    config = {"env": "point", "depth": 4, "seed": 0, "num_seeds": 1, "total_env_steps": 20, "run_dir": "", **settings}
    facts = {"config": config, "command": f"python algorithms/{script} --x"}
    (folder / "config.json").write_text(json.dumps(facts))
    lines = [f"{seed},{steps},{'' if score is None else score}" for seed, steps, score in rows]
    (folder / "metrics.csv").write_text("\n".join(["seed,env_steps,eval/success_any", *lines, ""]))


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "runs/a", [(0, 10, 0.2), (1, 10, 0.4), (0, 15, None), (1, 15, None), (0, 20, 0.5), (1, 20, 0.7)])
    write(tmp_path / "runs/b", [(2, 10, 0.9)], seed=2, run_dir="x")
    write(tmp_path / "runs/deep", [(0, 10, 0.1), (0, 20, 0.3)], depth=8)
    return tmp_path / "runs"


def test_seeds_are_merged_and_settings_that_differ_are_names(runs):
    curves = watch.group(watch.find([str(runs)]))
    assert curves == {"depth=4": [runs / "a", runs / "b"], "depth=8": [runs / "deep"]}
    assert list(watch.group([runs / "a", runs / "b"])) == ["point"]
    write(runs / "other", [], script="sac.py", her="future")
    assert list(watch.group([runs / "a", runs / "other"])) == ["script=crl.py", "script=sac.py"]
    write(runs / "another", [], script="sac.py", her="none")
    curves = watch.group([runs / "a", runs / "other", runs / "another"])
    assert list(curves) == ["script=crl.py", "script=sac.py, her=future", "script=sac.py, her=none"]


def test_a_mean_is_over_all_seeds_or_is_not_shown(runs):
    """At step 20 seed 2 is not evaluated yet."""
    metric, curve = watch.read([runs / "a", runs / "b"], None)
    assert metric == "eval/success_any"
    assert curve["env_steps"].tolist() == [10] * 3 and sorted(curve[metric]) == [0.2, 0.4, 0.9]
    _, alone = watch.read([runs / "a"], metric)
    assert sorted(alone["env_steps"]) == [10, 10, 20, 20]


def test_a_seed_that_was_run_twice_counts_once(runs):
    """The run that came farthest: neither the copy of seed 0 nor the one that ended before its first evaluation."""
    write(runs / "again", [(0, 10, 1.0), (3, 10, 0.6)])
    write(runs / "aborted", [(1, 5, None)])
    for folders in (["a", "again", "aborted"], ["aborted", "again", "a"]):
        _, curve = watch.read([runs / name for name in folders], None)
        assert sorted(curve["eval/success_any"]) == [0.2, 0.4, 0.6]


def test_the_table_has_means_and_intervals_and_the_picture_is_drawn(runs, capsys):
    write(runs / "begun", [], depth=16)
    watch.main(["watch.py", "--once", f"--picture={runs}/p.png", str(runs)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:5] == [
        ["depth=4", "3", "10", "0.50 [0.20, 0.90]"],
        ["depth=16", "0", "0", "not evaluated by all seeds yet"],
        ["depth=8", "1", "20", "0.30"],
    ]
    assert (runs / "p.png").read_bytes().startswith(b"\x89PNG")


def test_it_watches_until_all_runs_have_ended(runs, monkeypatch):
    """Run b goes on at first; a was killed and left its lock behind."""
    slept, lock = [], run._lock(runs / "b")
    run._lock(runs / "a").close()

    def sleep(seconds):
        slept.append(seconds)
        lock.close()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.main(["watch.py", "--every=3", f"--picture={runs}/p.png", str(runs)])
    assert slept == [3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "nowhere is no run folder and holds none"), (["--metric=x", "--once", "{runs}"], "has no metric x")],
)
def test_what_is_not_there_is_one_line(runs, arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        watch.main(["watch.py", *(argument.format(runs=runs) for argument in arguments)])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
