"""The comparison of all methods, with runs that are written by hand instead of trained."""

import json
import re

import pytest

import compare
import figures
import runs


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The commands of the runs that were trained, each with three evaluations of two seeds."""
    commands = {}

    def train(command, folder, name):
        commands[name] = command
        folder.mkdir(parents=True)
        facts = {"command": command, "commit": "c", "versions": {}, "device": "d"}
        (folder / "config.json").write_text(json.dumps(facts))
        rows = [f"{seed},{step},{step * len(commands) / 10}" for step in (10, 20) for seed in (0, 1)]
        (folder / "metrics.csv").write_text("\n".join(["seed,env_steps,eval/time_at_goal", *rows, "0,30,", "1,30,"]))

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "published")
    return commands


def test_every_method_is_trained_with_the_flags_and_drawn(trained, tmp_path, capsys):
    compare.main(["compare.py", "--env=ant", "--num_seeds=2"])
    assert trained == {
        "CRL": "crl.py --env=ant --num_seeds=2",
        "SAC": "sac.py --her none --env=ant --num_seeds=2",
        "SAC + HER": "sac.py --env=ant --num_seeds=2",
        "TD3 + HER": "td3.py --env=ant --num_seeds=2",
        "GCSL": "gcsl.py --env=ant --num_seeds=2",
        "GCBC": "gcsl.py --future geometric --env=ant --num_seeds=2",
        "C-learning": "c_learning.py --env=ant --num_seeds=2",
        "NCE + C-learning": "c_learning.py --loss nce_c_learning --env=ant --num_seeds=2",
    }
    picture = tmp_path / "compare/ant/comparison.png"
    assert capsys.readouterr().out == f"{picture}\n" and picture.stat().st_size > 10_000
    curve = figures.read(str(tmp_path / "compare/ant/GCSL/evaluations"))
    assert figures.last(curve, "eval/time_at_goal").tolist() == [10, 10]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--env=nowhere", "crl.py: .*nowhere"),
        ("--energy=dot", "sac.py: .*energy"),
        ("--critic_depth=8", "gcsl.py: .*critic_depth"),
        ("--updates_per_chunk=5", "td3.py: updates_per_chunk is 5; it is a multiple of policy_delay, e.g. 4"),
        ("--min_replay_size=1", "crl.py: min_replay_size is 1"),
        ("--run_dir=here", "the runs have folders of their own"),
        ("--resume=here", "the runs have folders of their own"),
    ],
)
def test_what_one_method_refuses_is_said_before_any_is_trained(flag, message, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["compare.py", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not trained
