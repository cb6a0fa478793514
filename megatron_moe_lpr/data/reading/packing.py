"""Best-fit packing: whole documents in samples of a fixed length, as few samples as possible, nothing cut that fits.

Best-fit decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830): documents in order of decreasing
length, each into the sample with the least room that it fits into. Documents of one length are placed together, so that
the work grows with the number of lengths and of placements, not with documents times samples.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class _Room:
    """Samples by the number of tokens that still fit into them; finds the least number that is large enough."""

    def __init__(self) -> None:
        self.samples: dict[int, list[np.ndarray]] = {}
        self.present = 0
        """Bit r is set if samples with room for r tokens exist."""

    def add(self, room: int, samples: np.ndarray) -> None:
        if room and len(samples):
            self.samples.setdefault(room, []).append(samples)
            self.present |= 1 << room

    def take(self, least: int) -> tuple[int, np.ndarray] | None:
        """Remove and return some samples with the least room from `least` on; None if there are none."""
        above = self.present >> least
        if not above:
            return None
        room = least + (above & -above).bit_length() - 1
        waiting = self.samples[room]
        found = waiting.pop()
        if not waiting:
            self.present ^= 1 << room
        return room, found


def pack_best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the number of the sample that each document goes into, int64 [documents].

    Args:
        lengths: tokens of each document, in decreasing order, from 1 to `capacity`.
        capacity: tokens of a sample.
    """
    sample_numbers = np.empty(len(lengths), np.int64)
    room, count = _Room(), 0
    starts = np.flatnonzero(np.diff(lengths, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True):
        length, done = int(lengths[start]), start
        while done < end:
            found = room.take(length)
            if found is None:
                opened = -(-(end - done) // (capacity // length))
                found = capacity, np.arange(count, count + opened)
                count += opened
            done += _place(found, length, sample_numbers[done:end], room)
    return sample_numbers


def _place(found: tuple[int, np.ndarray], length: int, wanted: np.ndarray, room: _Room) -> int:
    """Fill samples of equal room one after the other with documents of one length; return how many were placed.

    Args:
        found: the room, and the samples.
        wanted: filled with the sample of each document, from the first.
    """
    size, samples = found
    each = size // length
    full, rest = divmod(min(len(wanted), each * len(samples)), each)
    placed = full * each + rest
    wanted[: full * each] = np.repeat(samples[:full], each)
    room.add(size - each * length, samples[:full])
    if rest:
        wanted[full * each : placed] = samples[full]
        room.add(size - rest * length, samples[full : full + 1])
    room.add(size, samples[full + bool(rest) :])
    return placed


@dataclasses.dataclass(frozen=True)
class PackedIndex:
    """Which documents each sample holds. All epochs have the same lengths in the same places, other documents there.

    Attributes:
        documents: the documents of epoch 0 in the order of its samples, then those of epoch 1, ... int32.
        ends: where each sample of an epoch begins among its documents, and the end of the last, int64 [samples + 1].
        order: the samples in the order of reading, int64 [epochs * samples]: epoch * samples + sample.
    """

    documents: np.ndarray
    ends: np.ndarray
    order: np.ndarray

    def sample(self, index: int) -> np.ndarray:
        """Return the documents of the sample that is read as number `index`."""
        epoch, sample = divmod(int(self.order[index]), len(self.ends) - 1)
        first = epoch * int(self.ends[-1])
        return self.documents[first + int(self.ends[sample]) : first + int(self.ends[sample + 1])]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) of each map."""
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))

    def save(self, stem: str) -> None:
        """Write each map to `STEM-packed-NAME.npy`."""
        for name, array in self.arrays():
            np.save(_path(stem, name), array, allow_pickle=False)

    @classmethod
    def load(cls, stem: str) -> "PackedIndex | None":
        """Return the maps that `save` wrote, memory-mapped; None if they do not exist."""
        paths = {field.name: _path(stem, field.name) for field in dataclasses.fields(cls)}
        if not all(path.is_file() for path in paths.values()):
            return None
        return cls(**{name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()})


def _path(stem: str, name: str) -> Path:
    return Path(f"{stem}-packed-{name}.npy")


def build_packed_index(
    lengths: np.ndarray, documents: np.ndarray, capacity: int, seed: int | None, num_samples: int | None = None
) -> PackedIndex:
    """Pack documents into samples, for as many epochs as needed.

    Args:
        lengths: tokens of each of the dataset's documents.
        documents: numbers of the documents to use; those of less than 2 tokens, in which nothing can be predicted, are
            left out, but not all may be such (`counted_tokens.check_counted_tokens`).
        capacity: tokens of a sample. A longer document takes a whole one.
        seed: of the order of the samples and of which of the documents of one length goes where, which are another in
            each epoch; None: the order of the file, as far as packing keeps it.
        num_samples: samples that are read, at least; None: one epoch.
    """
    sizes = np.minimum(lengths[documents], capacity)
    documents, sizes = documents[sizes >= 2], sizes[sizes >= 2]
    ranked = np.sort(sizes)[::-1]
    numbers = pack_best_fit(ranked, capacity)
    counts = np.bincount(numbers, minlength=1)
    by_sample = np.argsort(numbers, kind="stable")
    epochs = 1 if num_samples is None else max(1, -(-num_samples // len(counts)))
    # RandomState instead of default_rng: numpy guarantees that its stream never changes.
    random = None if seed is None else np.random.RandomState(seed)
    found, order = np.empty((epochs, len(documents)), np.int32), np.empty((epochs, len(counts)), np.int64)
    for epoch in range(epochs):
        shuffled = np.arange(len(documents)) if random is None else random.permutation(len(documents))
        by_rank = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
        found[epoch] = documents[by_rank[by_sample]]
        samples = np.arange(len(counts)) if random is None else random.permutation(len(counts))
        order[epoch] = epoch * len(counts) + samples
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return PackedIndex(found.ravel(), ends, order.ravel())


def cut_documents(lengths: np.ndarray, capacity: int) -> tuple[int, int]:
    """Return the number of documents that are longer than a sample, and of their tokens that are cut off."""
    over = lengths[lengths > capacity].astype(np.int64) - capacity
    return len(over), int(over.sum())
