"""Answers of llama-server beside its tokens."""

import sys
from pathlib import Path

import pytest

from tests.serving import servers
from tests.serving.servers import aligned


def steps(*ids: int) -> list[dict]:
    return [{"id": one, "logprob": -float(number)} for number, one in enumerate(ids, 1)]


def test_every_step_has_its_token() -> None:
    assert aligned([7, 7, 9], steps(7, 7, 9)).log_probabilities == [-1.0, -2.0, -3.0]


def test_steps_that_are_left_out() -> None:
    assert aligned([7, 200, 9, 4], steps(7, 9, 4)).log_probabilities == [-1.0, None, -2.0, -3.0]
    assert aligned([7, 200], []).log_probabilities == [None, None]


def test_a_step_that_could_stand_in_two_places_is_not_told() -> None:
    assert aligned([5, 7, 5, 9], steps(7, 5, 9)).log_probabilities == [None, -1.0, -2.0, -3.0]
    assert aligned([5, 5, 9], steps(5, 9)).log_probabilities == [None, None, -2.0]


@pytest.mark.parametrize("ids", [(8,), (9, 7), (7, 9, 9)])
def test_steps_of_other_tokens_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        aligned([7, 9], steps(*ids))


def test_a_server_that_ends_says_its_last_line(tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-c",
        "import sys; print('listening at', sys.argv[1]); sys.exit('no such model')",
        "PORT",
    ]
    with (
        pytest.raises(RuntimeError, match=r"ended with 1:\nlistening at \d+\nno such model$"),
        servers.serving(program, tmp_path / "log"),
    ):
        pass


def test_a_server_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "START_SECONDS", 0.1)
    with (
        pytest.raises(RuntimeError, match=r"log: the server did not answer within 0.1 s$"),
        servers.serving([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log"),
    ):
        pass
