"""One rank reads the notes of all, and says for all what it finds: no rank reads more than that.

If every rank that waits read all notes, N ranks would fetch N x N of them from the one store of the run, at the moment
in which all of them wait. So the first rank that has waited for long examines the notes, once a beat, and puts its
findings into the store; the others read these. Where the findings are not renewed, as after the death of that rank,
another one takes its place.
"""

import dataclasses
import json

from megatron_moe_lpr.training.watchdog.hang_report import SHOWN, Note, NoteBoard

LIMIT = 0.9
"""Part of the timeout after which ranks without progress end. Below 1, so that the rank that hangs reports it before
the collectives of the ranks that wait for it fail."""
SILENCE_SECONDS = 10.0
"""A rank whose note does not change for so long (and for three periods) counts as dead; busy machines are slow."""
SILENT_PART_OF_LONG_WORK = 0.5
"""Part of the timeout that a rank in long work may be silent: libraries may hold Python's lock for minutes."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the notes of all ranks say, in one size whatever their number."""

    examiner: int
    """The rank that has read them."""
    number: int
    """Grows with each examination."""
    silent: int
    """Number of ranks that do not update their notes any more."""
    progresses: bool
    """Whether a rank has made progress within the limit."""
    culprits: dict[int, Note]
    """Some of the ranks that do not wait for another one."""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def parse(text: str) -> "Findings":
        """Read what `str` has made."""
        values = json.loads(text)
        return Findings(**values | {"culprits": {int(rank): Note(**note) for rank, note in values["culprits"].items()}})


class Examination:
    """A rank's part in it, from when it has waited for long until it makes progress."""

    def __init__(self, board: NoteBoard, rank: int, period: float, timeout: float) -> None:
        self.board, self.rank, self.period, self.timeout = board, rank, period, timeout
        self.silence = max(3 * period, SILENCE_SECONDS)
        self._forget()

    def rest(self) -> None:
        """End this rank's part: it makes progress."""
        if self.notes and self.text:  # it was the examiner: the next one need not wait
            self.board.exchange_findings(self.text, "")
        self._forget()

    def _forget(self) -> None:
        self.text: str | None = None
        self.unchanged, self.examined, self.is_renewed = 0.0, 0.0, False
        self.notes: dict[int, Note] = {}
        """Of all ranks, where this one examines them."""
        self.ages: dict[int, float] = {}
        """Seconds since the last change of each note."""

    def beat(self) -> Findings | None:
        """Return the present findings, this rank's or another's; None: not known yet."""
        text = self.board.findings()
        if text != self.text:
            self.unchanged, self.is_renewed = 0.0, self.text is not None
            self.text = text
        else:
            self.unchanged += self.period
        found = Findings.parse(text) if text else None
        if found is None or found.examiner == self.rank or self.unchanged >= self.silence:
            return self._examine(text, found.number + 1 if found else 1)
        self.notes, self.examined = {}, 0.0
        return found if self.is_renewed and self.unchanged <= 3 * self.period else None

    def _examine(self, before: str, number: int) -> Findings | None:
        """Read all notes and replace the findings `before`; None: another rank was faster."""
        notes = self.board.read()
        for rank, note in notes.items():
            same = rank in self.notes and self.notes[rank].beat == note.beat
            self.ages[rank] = self.ages[rank] + self.period if same else 0.0
        self.examined += self.period if self.notes else 0.0
        self.notes = notes
        limit = LIMIT * self.timeout - self.period
        culprits = [rank for rank, note in notes.items() if not note.waits_for_peers]
        found = Findings(
            examiner=self.rank,
            number=number,
            silent=len(self.silent()),
            progresses=any(note.still < limit for note in notes.values()),
            culprits={rank: notes[rank] for rank in culprits[:SHOWN]},
        )
        self.text = self.board.exchange_findings(before, str(found))
        self.unchanged, self.is_renewed = 0.0, True
        if self.text != str(found):
            self.notes = {}
            return None
        return found

    def silent(self) -> list[int]:
        """Ranks that count as stopped or dead, where this one examines: their notes have not changed for too long."""
        return [
            rank for rank, note in self.notes.items() if rank != self.rank and self.ages[rank] >= self._allowed(note)
        ]

    def _allowed(self, note: Note) -> float:
        return self.silence + (SILENT_PART_OF_LONG_WORK * self.timeout if note.in_long_work else 0.0)
