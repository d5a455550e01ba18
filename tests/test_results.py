"""What the pages show is what the CSVs of results/ say, and the CSVs are what their commands made."""

import io
import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import bench_update
import figures
import runs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"

matplotlib.use("agg")
GENERATED = [(name, table) for name in figures.PAGES for _, table in figures.SPOT.findall((ROOT / name).read_text())]


@pytest.mark.parametrize("name", figures.PAGES)
def test_the_tables_of_a_page_are_those_of_the_csvs(name):
    text = (ROOT / name).read_text()
    assert figures.page(text, "../" * name.count("/")) == text, "make figures writes the tables anew"


def test_a_table_that_was_edited_by_hand_is_found_out():
    text = (ROOT / "README.md").read_text()
    spot = text.index("| uniform goals, mean action")
    edited = text[:spot] + text[spot:].replace("0.9", "1.0", 1)
    assert edited != text
    assert figures.page(edited, "") == text


def test_every_table_is_shown_and_the_readme_has_no_other_number():
    assert {table for _, table in GENERATED} == set(figures.TABLES)
    prose = figures.SPOT.sub("", (ROOT / "README.md").read_text())
    results = prose[prose.index("## Results") : prose.index("### What is reproduced")]
    assert [word for word in results.split() if any(c.isdigit() for c in word)] == README_WORDS


README_WORDS = ["95", "4", "32](results/point_depth.png)", "1024", "4:"]
"""An interval's level, the depths of the figure and those that compile alike: all that is written by hand."""


@pytest.mark.parametrize("name", figures.DRAWN)
def test_a_figure_is_that_of_the_csvs(name):
    from matplotlib import image

    shown = image.imread(RESULTS / name)
    drawn = image.imread(io.BytesIO(figures.DRAWN[name]()))
    # not byte for byte here, because another release of matplotlib may shade an edge otherwise
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 1e-3, "make figures draws it anew"


def test_every_run_was_made_by_the_command_that_redoes_it():
    for name, command in runs.RUNS.items():
        facts = figures.made(name)
        assert facts["command"] == f"python algorithms/{command}", name
        assert len(facts["commit"]) == 40, f"{name} comes from a changed checkout: {facts['commit']}"
        assert facts["device"]
        assert {"python", "jax", "equinox", "optax"} <= set(facts["versions"]), name
    for name in runs.PICTURES:
        assert json.loads((RESULTS / f"{name}.json").read_text())["made"] == figures.made(name)


def test_every_picture_is_drawn_and_every_line_is_a_published_run():
    assert {path.name for path in RESULTS.glob("*.png")} == set(figures.DRAWN)
    for figure in figures.FIGURES.values():
        for curves in figure.panels.values():
            assert set(curves.values()) <= set(runs.RUNS)


def test_a_run_of_fewer_seeds_than_its_command_says_is_not_in_the_tables():
    for name, command in runs.RUNS.items():
        seeds = int(command.partition("--num_seeds ")[2].split()[0])
        assert set(figures.read(name)["seed"]) == set(range(seeds)), name


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
    with pytest.raises(SystemExit, match=r"no run, figure or panel is named 'point_deth'.*point_depth"):
        runs.choose(["point_deth"])


def test_publishing_keeps_the_evaluations_and_how_they_were_made(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HERE", tmp_path)
    monkeypatch.setattr(figures, "HERE", tmp_path)
    facts = {
        "command": "python algorithms/crl.py --seed 3 --run_dir /tmp/x",
        "commit": "c",
        "versions": {},
        "device": "d",
    }
    (tmp_path / "config.json").write_text(json.dumps({**facts, "config": {}}))
    (tmp_path / "metrics.csv").write_text(
        "seed,env_steps,train/critic_loss,eval/success_any\n3,10,0.5,\n3,20,0.4,0.25\n3,30,0.3,0.75\n"
    )
    runs.publish("published", tmp_path)
    assert figures.made("published") == {**facts, "command": "python algorithms/crl.py --seed 3"}
    np.testing.assert_array_equal(figures.read("published")["eval/success_any"], [0.25, 0.75])
    assert "train/critic_loss" not in figures.read("published")


def test_kernels_in_loops_count_as_often_as_the_loop_turns():
    hlo = """HloModule m

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %g = s32[] get-tuple-element(%p), index=0
  %f.1 = f32[4]{0} fusion(%g), kind=kLoop, calls=%other
  %d = f32[4,4]{1,0} dot(%f.1, %f.1)
  ROOT %t = (s32[]) tuple(%g)
}

%cond (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %t = (s32[]) tuple(%a)
  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = s32[] copy(%a)
}
"""
    assert bench_update.kernels(hlo) == 5 * 2 + 1
