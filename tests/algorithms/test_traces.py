"""No chunk is traced twice in a run: tracing and compiling are most of the time of a short one."""

import chex
import pytest
import test_cocoa_command
import test_crl_command
import test_ppo_ad_command

from algorithms import cocoa, crl, ppo_ad

# the command tests' reference runs, whose compiled programs these share
RUNS = [
    (crl, ("collect", "learn", "evaluate"), test_crl_command.REFERENCE),
    (ppo_ad, ("collect", "learn", "remember", "evaluate"), test_ppo_ad_command.REFERENCE),
    (cocoa, ("fill", "collect", "learn", "evaluate"), test_cocoa_command.REFERENCE),
]


@pytest.mark.parametrize(("script", "chunks", "flags"), RUNS)
def test_no_chunk_is_traced_twice_in_a_run(script, chunks, flags, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    for name in chunks:
        monkeypatch.setattr(script, name, chex.assert_max_traces(getattr(script, name), 1))
    script.main(["script.py", *flags, f"--run_dir={tmp_path / 'run'}"])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) > 4, "of several chunks and evaluations"
