"""One rank examines the notes of all: who it is, what the others read, and what takes its place."""

import dataclasses

import pytest
import torch.distributed as dist

from megatron_moe_lpr.training.watchdog.examination import Examination, Findings
from megatron_moe_lpr.training.watchdog.hang_report import Note, NoteBoard

PERIOD, TIMEOUT = 10.0, 600.0
WAITING = Note(1, 7, "all_reduce in agree", "host", 1, still=460.0, waits_for_peers=True)
HANGING = dataclasses.replace(WAITING, waits_for_peers=False, doing="reading a batch")


class Ranks:
    """The watches of all ranks, in one process, on one store."""

    def __init__(self, count: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.boards = [CountingBoard(self.store, count) for _ in range(count)]
        self.watches = [Examination(board, rank, PERIOD, TIMEOUT) for rank, board in enumerate(self.boards)]
        self.notes = dict.fromkeys(range(count), WAITING)

    def beat(self, dead=(), examining=None) -> list[Findings | None]:
        """Let all ranks but the dead ones write their note, and then examine or read."""
        for rank, note in self.notes.items():
            if rank not in dead:
                self.notes[rank] = dataclasses.replace(note, beat=note.beat + 1)
                self.boards[rank].write(rank, self.notes[rank])
        ranks = range(len(self.watches)) if examining is None else examining
        return [self.watches[rank].beat() for rank in ranks if rank not in dead]


class CountingBoard(NoteBoard):
    """Counts how often all notes were read."""

    reads = 0

    def read(self) -> dict[int, Note]:
        self.reads += 1
        return super().read()


def test_one_rank_reads_the_notes_of_all():
    """However many wait: the others read findings of one size, and the store has one more key than ranks."""
    sizes = []
    for count in (4, 40):
        ranks = Ranks(count)
        for _ in range(5):
            found = ranks.beat()
        assert [board.reads for board in ranks.boards] == [5, *[0] * (count - 1)]
        assert len(set(map(str, found))) == 1 and found[0].examiner == 0 and not found[0].silent
        assert found[0].progresses  # nobody has waited for as long as is allowed
        sizes.append(len(str(found[0])))
        assert ranks.store.num_keys() == count + 1
    assert sizes[0] == sizes[1]


def test_a_dead_rank_is_found_and_named_to_all():
    ranks = Ranks(4)
    ranks.beat()
    for _ in range(3):
        found = ranks.beat(dead=[2])
    assert [one.silent for one in found] == [1] * 3 and ranks.watches[0].silent() == [2]


def test_a_rank_in_long_work_may_be_silent_for_longer():
    ranks = Ranks(3)
    ranks.notes[1] = dataclasses.replace(HANGING, in_long_work=True)
    ranks.beat()
    silent = [ranks.beat(dead=[1])[0].silent for _ in range(40)]
    assert silent == [0] * 32 + [1] * 8  # half of the time-out, and three periods


def test_another_rank_takes_the_place_of_a_dead_examiner():
    ranks = Ranks(3)
    for _ in range(2):
        ranks.beat()
    found = [ranks.beat(dead=[0]) for _ in range(10)]
    examiners = [one.examiner for pair in found for one in pair if one]
    # Not renewed for three periods, findings are replaced; the next rank has to see the silence itself.
    assert set(examiners[:4]) == {0} and set(examiners[4:]) == {1}
    assert [one.silent for one in found[-1]] == [1, 1] and ranks.watches[1].silent() == [0]


def test_findings_of_an_earlier_wait_do_not_count():
    """The examiner makes progress again; later the ranks wait a second time, and another one is the first."""
    ranks = Ranks(3)
    ranks.notes = dict.fromkeys(range(3), dataclasses.replace(WAITING, still=560.0))
    assert [one.progresses for one in ranks.beat() if one] == [False]
    assert ranks.beat()[1].progresses is False
    for watch in ranks.watches:
        watch.rest()
    ranks.notes = dict.fromkeys(range(3), WAITING)
    assert ranks.beat(examining=[2, 0, 1]) == [Findings(2, 1, 0, True, {}), None, None]


@pytest.mark.parametrize("count", [3, 30])
def test_some_culprits_are_named(count):
    ranks = Ranks(count)
    ranks.notes |= dict.fromkeys(range(count - 1), HANGING)
    ranks.beat()
    found = ranks.beat()[-1]
    assert list(found.culprits) == list(range(min(count - 1, 4))) and found.culprits[1].doing == "reading a batch"
    assert Findings.parse(str(found)) == found
