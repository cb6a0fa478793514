"""The short form of benchmarks/endurance.py: a run that is harmed and goes on, equal to one left alone to the bit."""

from benchmarks import endurance, endurance_run
from benchmarks.endurance_faults import SHORT

STEPS = 45


def test_harmed_runs_go_on_to_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(endurance_run, "STEPS", STEPS)
    outcomes = endurance.endure(tmp_path / "work", SHORT)
    assert [outcome.words for outcome in outcomes if not outcome.passed] == []
    assert len(outcomes) == len(SHORT) + 1
