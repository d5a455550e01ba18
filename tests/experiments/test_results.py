"""What the pages show is what the CSVs of results/ say, and the CSVs are what their commands made."""

import functools
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import bench_update
import figures
import measure
import paper
import runs
from algorithms import crl
from shared import evaluation, run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"

matplotlib.use("agg")
PUBLISHED = {name: command for name, command in runs.RUNS.items() if (RESULTS / f"{name}.csv").exists()}
GENERATED = [(name, table) for name in figures.PAGES for _, table, _ in figures.SPOT.findall((ROOT / name).read_text())]


@pytest.mark.parametrize("name", figures.PAGES)
def test_the_tables_of_a_page_are_those_of_the_csvs(name):
    text = (ROOT / name).read_text()
    assert figures.page(text, "../" * name.count("/")) == text, "make figures writes the tables anew"


def test_a_table_that_was_edited_by_hand_is_found_out():
    text = (ROOT / "README.md").read_text()
    row = figures.goals_table("point_u_maze", "").splitlines()[-1]
    edited = text.replace(row, row.replace("[", "[0.0", 1))
    assert edited != text
    assert figures.page(edited, "") == text


def test_what_stands_between_two_empty_tables_stays():
    spot = "<!-- experiments/figures.py: demo -->\n<!-- end -->"
    written = figures.page(f"{spot}\nbetween\n{spot}\n", "")
    assert written.count("\nbetween\n") == 1
    assert written.count(figures.goals_table("point_u_maze", "")) == 2


def test_the_readme_has_its_tables_and_no_other_result():
    assert {table for page, table in GENERATED if page == "README.md"} == {
        *("demo", "depth", "baselines", "minicraft", "craftax", "adaptation"),
        *("bench_depth", "bench_scripts", "bench_ratios"),
    }
    assert {table for _, table in GENERATED} == set(figures.TABLES)
    prose = figures.SPOT.sub("", (ROOT / "README.md").read_text())
    results = prose[prose.index("## Results") : prose.index("### What is reproduced")]
    # the level of an interval, depths, and widths
    assert [word for word in results.split() if any(c.isdigit() for c in word) and word != "TD3"] == [
        *("95", "4", "32](results/point_depth.png)", "256", "1024.", "1024", "4:")
    ]


@pytest.mark.parametrize("name", figures.DRAWN)
def test_a_figure_is_that_of_the_csvs(name):
    from matplotlib import image

    kind = Path(name).suffix[1:]
    shown = image.imread(RESULTS / name, kind) / (255 if kind == "gif" else 1)  # the first picture of a film
    drawn = image.imread(io.BytesIO(figures.DRAWN[name]()), kind) / (255 if kind == "gif" else 1)
    # not byte for byte here, because another machine may shade the edge of a line otherwise
    assert shown.shape == drawn.shape
    assert (np.abs(shown - drawn).max(axis=-1) > 0.25).mean() < 1e-4, "make figures draws it anew"


def test_every_run_was_made_by_the_command_that_redoes_it():
    for name, command in PUBLISHED.items():
        facts = figures.made(name)
        assert facts["command"] == runs.typed(command), name
        assert "extended" not in facts, name
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["commit"]), name
        # code that differs from the commit would make it worthless; a result that was rewritten does not
        assert "+" not in facts["commit"] or facts["changed_files"] == ["results/point_u_maze.csv"], name
        assert facts["device"]
        assert {"python", "jax", "equinox", "optax"} <= set(facts["versions"]), name
    for name in runs.PICTURES:
        assert json.loads((RESULTS / f"{name}.json").read_text())["made"] == figures.made(name)


def test_every_picture_is_drawn_and_every_line_is_a_published_run():
    assert {path.name for path in RESULTS.iterdir() if path.suffix in (".png", ".gif")} == set(figures.DRAWN)
    for figure in figures.FIGURES.values():
        for curves in figure.panels.values():
            assert set(curves.values()) <= set(runs.RUNS)


def configured(command):
    _, script, *flags = runs.typed(command).split()
    module = importlib.import_module(script.removesuffix(".py").replace("/", ".").removeprefix("experiments."))
    recipes = getattr(module, "RECIPES", crl.RECIPES)
    return run.configure(module.Config, recipes, module.__doc__, [script, *flags])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_has_all_its_seeds_and_steps(name):
    config = configured(PUBLISHED[name])
    curve = figures.read(name)
    assert set(curve["seed"]) == set(range(config.num_seeds))
    for seed in range(config.num_seeds):
        assert curve["env_steps"][curve["seed"] == seed].max() >= getattr(config, f"total_{run.clock(config)}")


TABLES = [table for table in figures.TABLES.values() if isinstance(table, functools.partial)]
MEASURED = [table.args[0] for table in TABLES if table.func is figures.measured_table]
OTHER_CSVS = {"point_goal_probe", "point_goal_probe_pearl"}  # when cocoa.py itself measured the probe, by --probe
OTHER_CSVS |= {"cocoa_choices", "crafter_envs_cpu", "random_craftax", "random_crafter", "random_points"}


@pytest.mark.parametrize("name", MEASURED)
def test_a_measurement_names_the_commit_that_was_measured(name):
    (how,), _ = figures.lines(name)
    assert re.match(r"python (?:results|experiments)/\w+\.py.*; .*jax [\d.]+, [0-9a-f]{40}, Python 3\.\d+", how), how


def test_every_csv_is_of_use():
    assert {path.stem for path in RESULTS.glob("*.csv")} == {*PUBLISHED, *MEASURED, *OTHER_CSVS}


def test_the_interval_is_the_bootstraps():
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.3])
    means = sorted(np.mean(sample) for sample in itertools.product(values, repeat=5))  # all 3,125 resamples
    exact = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    np.testing.assert_allclose(figures.interval(values), exact, atol=0.021)
    assert figures.interval(np.full(5, 0.4)) == pytest.approx((0.4, 0.4))


def test_last_is_the_last_evaluation_and_not_the_best():
    curve = {"env_steps": np.array([1, 1, 2, 2]), "score": np.array([9.0, 8.0, 1.0, 2.0])}
    np.testing.assert_array_equal(figures.last(curve, "score"), [1.0, 2.0])


def test_redoing_names_what_belongs_to_a_panel_and_what_is_near():
    assert runs.choose(["point_depth.u4"]) == [f"point_u4_maze_depth_{depth}" for depth in (4, 8, 16, 32)]
    assert len(runs.choose(["point_depth"])) == 16
    assert runs.choose(["minicraft"]) == ["minicraft"]
    assert len(runs.choose(["adaptation"])) == 6
    with pytest.raises(SystemExit, match=r"no run, figure or panel is named 'point_deth'.*point_depth"):
        runs.choose(["point_deth"])


def test_side_experiments_are_figures_and_their_commands_at_full_size_can_be_typed(capsys, monkeypatch, tmp_path):
    for number, side in paper.FIGURES.items():
        assert side.shown in figures.FIGURES or set(side.shown) <= set(runs.RUNS)
        paper.main(["paper.py", number, "--full"])
        *commands, takes = capsys.readouterr().out.splitlines()
        assert "80 GB" in takes and len(commands) == len(set(commands))
        for command in commands:
            config = configured(command.removeprefix("python ").removeprefix("algorithms/"))
        evaluation.make_envs(config)
    assert len(paper.full(paper.FIGURES["6"]).splitlines()) == 3 * 5 * 5 + 1
    with pytest.raises(SystemExit):
        paper.main(["paper.py", "5"])
    assert capsys.readouterr().err.startswith("error: paper.py takes one of 4, 6, ")
    trained = []
    monkeypatch.setattr(runs, "train_all", trained.extend)
    paper.main(["paper.py", "9"])
    assert trained == [f"point_u4_maze_depth_{depth}" for depth in (4, 16, 32)]
    assert capsys.readouterr().out.count("value_map.png") == 3
    trained.clear()
    monkeypatch.setattr(figures, "draw_curves", lambda figure: b"drawn")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "publish", lambda *_: None)
    (tmp_path / "point_u4_maze_depth_4.csv").touch()
    paper.main(["paper.py", "4"])
    assert "point_u4_maze_width_256" in trained and "point_u4_maze_depth_4" not in trained


def test_redoing_does_not_pass_off_another_run(tmp_path):
    facts = {"command": "python algorithms/crl.py --seed 3", "commit": "c", "versions": {}, "device": "d"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match=r"holds a run of 'python algorithms/crl.py --seed 3'; delete it"):
        runs.train("crl.py --seed 4", tmp_path, "four")
    with pytest.raises(SystemExit, match="was begun at commit c; delete it"):
        runs.train("crl.py --seed 3", tmp_path, "three")
    again = {**facts, "command": "/a/python algorithms/crl.py --resume /tmp/x --total_env_steps 9"}
    (tmp_path / "config.json").write_text(json.dumps({**facts, "resumed": [again]}))
    with pytest.raises(SystemExit, match=r"--seed 3, then python algorithms/crl.py --total_env_steps 9'; delete it"):
        runs.train("crl.py --seed 3", tmp_path, "three")


def test_a_run_without_evaluations_is_not_published(tmp_path):
    with pytest.raises(SystemExit, match="is no run folder"):
        runs.publish("none", tmp_path)
    (tmp_path / "metrics.csv").write_text("seed,env_steps,eval/success_any\n3,10,\n")
    with pytest.raises(SystemExit, match="not evaluated yet"):
        runs.publish("none", tmp_path)


def test_publishing_keeps_the_evaluations_and_how_they_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    facts = {
        "command": ".venv/bin/python algorithms/crl.py --run_dir=/tmp/x --seed 3",
        "commit": "c",
        "versions": {},
        "device": "d",
    }
    again, elsewhere = ({**facts, "command": "python a.py --resume=/tmp/x", "commit": commit} for commit in "cd")
    (tmp_path / "config.json").write_text(json.dumps({**facts, "config": {}, "resumed": [again, elsewhere]}))
    (tmp_path / "metrics.csv").write_text(
        "seed,env_steps,train/critic_loss,eval/success_any\n3,10,0.5,\n3,20,0.4,0.25\n3,30,0.3,0.75\n"
    )
    runs.publish("published", tmp_path)
    elsewhere["command"] = "python a.py"
    expected = {**facts, "command": "python algorithms/crl.py --seed 3", "resumed": [elsewhere]}
    assert figures.made("published") == expected
    np.testing.assert_array_equal(figures.read("published")["eval/success_any"], [0.25, 0.75])
    assert "train/critic_loss" not in figures.read("published")


HLO = """HloModule m

%inner (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %f.2 = f32[4]{0} fusion(%p), kind=kLoop, calls=%other
  ROOT %t = (s32[]) tuple(%p)
}

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %g = s32[] get-tuple-element(%p), index=0
  %f.1 = f32[4]{0} fusion(%g), kind=kLoop, calls=%other
  %d = f32[4,4]{1,0} dot(%f.1, %f.1)
  %w = (s32[]) while(%p), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %t = (s32[]) tuple(%g)
}

%called (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  ROOT %c = s32[] copy(%a)
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %t = (s32[]) tuple(%a)
  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = s32[] call(%a), to_apply=%called
}
"""


def test_kernels_in_loops_count_as_often_as_the_loop_turns():
    assert bench_update.kernels(HLO) == 5 * (2 + 3 * 1) + 1
    with pytest.raises(ValueError, match="a loop of unknown length"):
        bench_update.kernels(HLO.replace('"known_trip_count":{"n":"3"}', ""))


def test_the_ways_to_compute_a_gradient_step_have_the_same_gradients():
    # in a process whose annotations are not checked: stand-ins take the place of networks
    code = """
import jax
import bench_update
states = {}
for name, (way, options) in bench_update.VARIANTS.items():
    if not options and name not in bench_update.OTHER_NUMBERS:
        step, state = bench_update.variant(name, depth=8, width=8, batch_size=16)
        states[name], _ = jax.jit(step)(state, jax.random.key(0))
        bench_update.check(name, states[name], states[bench_update.AS_IT_IS])
print(len(states))
"""
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    options = {"cwd": ROOT / "experiments", "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **options)
    assert done.stdout == "5\n", done.stderr
