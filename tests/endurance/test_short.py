"""A run that is harmed and resumes ends in the same bits as one left alone: endurance.py with few faults."""

from tests.endurance import endurance, run
from tests.endurance.faults import SHORT

STEPS = 45


def test_harmed_runs_go_on_to_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS", STEPS)
    outcomes = endurance.endure(tmp_path / "work", SHORT)
    assert [outcome.words for outcome in outcomes if not outcome.passed] == []
    assert len(outcomes) == len(SHORT) + 1
