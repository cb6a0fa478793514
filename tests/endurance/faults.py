"""What can befall a run, and what must follow."""

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, LATEST_FILE, SIDE_DIRECTORY
from megatron_moe_lpr.files.checksums import MANIFEST
from megatron_moe_lpr.training.run_directory.run_lock import LOCK_FILE
from megatron_moe_lpr.training.signals import EXIT_REQUEUE
from tests.endurance.run import Failure, TrainingRun, send

FULL_DISK_MEGABYTES = 6


@dataclasses.dataclass(frozen=True)
class Fault:
    """A function that starts the run, harms it and checks what follows; it returns words for the log.

    It raises Failure where something promised did not happen.
    """

    name: str
    do: Callable[[TrainingRun, random.Random], str]
    may_lose_checkpoints: bool = False


def killed(run: TrainingRun, generator: random.Random, victim: str, moment: str | None = None) -> str:
    """kill -9 at a random moment, or as soon as something of a checkpoint appears."""
    run.start()
    run.wait_for_steps(1)
    victims = {
        "rank 0": lambda: run.workers()[:1],
        "rank 1": lambda: run.workers()[1:],
        "writer": lambda: run.writers()[:1],
        "launcher": lambda: [_launcher(run)],
        "everything": run.processes,
    }[victim]()
    if not victims:
        raise Failure(f"there is no {victim} to kill")
    if moment:
        run.wait_for(MOMENTS[moment](run), moment, pause=0)
    else:
        time.sleep(generator.uniform(0, 1.0))
    send(victims, signal.SIGKILL)
    code = run.wait()
    if code in (0, EXIT_REQUEUE):
        raise Failure(f"exit code {code} although {victim} was killed")
    if victim == "writer" and not any("writer process" in line for line in run.errors()):
        raise Failure(f"no line says that a writer died: {run.tail()}")
    return f"exit code {code}, latest checkpoint {run.latest()}"


def _launcher(run: TrainingRun):
    return next(process for process in run.processes() if process.pid == run.launcher.pid)


def _some(run: TrainingRun, pattern: str) -> Callable[[], bool]:
    def appeared() -> bool:
        with contextlib.suppress(FileNotFoundError):  # renamed while it was looked into
            return any(run.save.glob(f".iter_*.partial/{pattern}"))
        return False

    return appeared


def _renamed(run: TrainingRun) -> Callable[[], bool]:
    before = set(run.save.glob("iter_*"))
    return lambda: bool(set(run.save.glob("iter_*")) - before)


def _latest_moved(run: TrainingRun) -> Callable[[], bool]:
    before = run.latest()
    return lambda: run.latest() != before


MOMENTS: dict[str, Callable[[TrainingRun], Callable[[], bool]]] = {
    "the directory of a save appears": lambda run: lambda: any(run.save.glob(".iter_*.partial")),
    "tensors are being written": lambda run: _some(run, "*.distcp"),
    "the index of tensors appears": lambda run: _some(run, ".metadata"),
    "the card appears": lambda run: _some(run, f"{SIDE_DIRECTORY}/{CARD_FILE}"),
    "the manifest appears": lambda run: _some(run, str(MANIFEST)),
    "the directory gets its name": _renamed,
    "the checkpoint becomes the latest": _latest_moved,
}


def asked_to_stop(
    run: TrainingRun, generator: random.Random, number: signal.Signals, moment: str, by: str = "launcher"
) -> str:
    """A signal to the launcher or torchrun alone: saved, and code 75 from the launcher."""
    before = run.latest() or 0
    run.start(by=by)
    if moment == "the first second":
        time.sleep(generator.uniform(0.15, 0.9))
    elif moment == "the start of the workers":
        run.wait_for(lambda: len(run.workers()) == 2, moment, pause=0.05)
        time.sleep(generator.uniform(0, 3))
    else:
        run.wait_for_steps(generator.randint(1, 4))
    if moment in MOMENTS:
        run.wait_for(MOMENTS[moment](run), moment, pause=0)
    run.launcher.send_signal(number)
    code = run.wait()
    if by == "launcher" and code != EXIT_REQUEUE:
        raise Failure(f"exit code {code} instead of {EXIT_REQUEUE}: {run.tail()}")
    run.wait_until_all_ended()
    # Of this start: an earlier one may have been killed beyond its last checkpoint.
    logged = run.last_step() or before
    if run.latest() != (logged or None):
        raise Failure(f"stopped after step {logged}, saved step {run.latest()}: {run.tail()}")
    return f"exit code {code}, saved step {run.latest()} of {logged}"


def all_processes_asked_to_stop(run: TrainingRun, generator: random.Random) -> str:
    """As scancel does: SIGTERM to every process of the job, writers and data workers too, while it saves."""
    run.start()
    run.wait_for_steps(generator.randint(1, 4))
    victims = run.processes()
    run.wait_for(MOMENTS["tensors are being written"](run), "a save", pause=0)
    send(victims, signal.SIGTERM)
    code = run.wait()
    run.wait_until_all_ended()
    if code != EXIT_REQUEUE or run.latest() != max(run.steps()):
        raise Failure(f"exit code {code}, saved {run.latest()} of {max(run.steps())}: {run.tail()}")
    return f"exit code {code}, saved step {run.latest()}"


def _with_two_checkpoints(run: TrainingRun) -> None:
    """A run that lies still and has a checkpoint to fall back to."""
    run.start()
    run.wait_for_steps(7)
    run.launcher.send_signal(signal.SIGTERM)
    if run.wait() != EXIT_REQUEUE:
        raise Failure(f"not stopped: {run.tail()}")
    run.wait_until_all_ended()


def damaged(run: TrainingRun, generator: random.Random, what: str) -> str:
    """The latest checkpoint is harmed: said, set aside, and the one before taken."""
    _with_two_checkpoints(run)
    newest = run.latest()
    directory = run.iteration_directory()
    file = {
        "a byte of the tensors": max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size),
        "a byte of common.pt": directory / "common.pt",
        "a byte of the card": directory / SIDE_DIRECTORY / CARD_FILE,
        "the index cut": directory / ".metadata",
        "a file missing": min(directory.glob("*.distcp")),
    }[what]
    content = bytearray(file.read_bytes())
    if what == "a file missing":
        file.unlink()
    elif what == "the index cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(content)
    run.start()
    run.wait_for(lambda: "resuming from step" in run.text(), "a resumption", 0.05)
    resumed = int(run.text().split("resuming from step ")[1].split()[0].replace(",", ""))
    if resumed >= newest:
        raise Failure(f"the damaged checkpoint of step {newest} was used")
    if directory.name not in run.text().split("resuming from step")[0]:
        raise Failure(f"nothing says that {directory.name} is damaged: {run.tail()}")
    run.wait_for_steps(newest - resumed + 1)
    _stop(run)
    return f"resumed from step {resumed} instead of {newest}"


def latest_file_lost(run: TrainingRun, generator: random.Random) -> str:
    """Refused by name, never begun anew over the checkpoints there."""
    _with_two_checkpoints(run)
    number, logged = run.latest(), len(run.records())
    latest = run.save / LATEST_FILE
    latest.unlink()
    code = run.start().wait()
    run.wait_until_all_ended()
    errors = run.errors()
    latest.write_text(str(number))
    if code == 0 or not any(LATEST_FILE in line or f"iter_{number:07d}" in line for line in errors):
        raise Failure(f"exit code {code}: {run.tail()}")
    if len(run.records()) != logged:
        raise Failure("it trained on")
    return errors[0][:100]


def second_writer(run: TrainingRun, generator: random.Random) -> str:
    """Refused with the first one's name; the first goes on. It stands still meanwhile, lest it comes to its end."""
    run.start()
    run.wait_for_steps(1)
    first, holder = run.processes(), run.workers()[0].pid
    second = TrainingRun(run.inputs, run.save)
    second.output = run.output.with_suffix(".second")
    send(first, signal.SIGSTOP)
    code = second.start().wait()
    errors = second.errors()
    second.wait_until_all_ended()
    send(first, signal.SIGCONT)
    run.wait_for_steps(1)
    if code == 0 or not any(f"process {holder} on " in line for line in errors):
        raise Failure(f"exit code {code}: {second.tail()}")
    _stop(run)
    if (run.save / LOCK_FILE).exists():
        raise Failure("the lock was not released at the end")
    return errors[0][:110]


def lock_of_another_host(run: TrainingRun, generator: random.Random) -> str:
    """Refused, until --take-over."""
    run.start()
    run.wait_for_steps(1)
    send(run.processes(), signal.SIGKILL)
    run.wait_until_all_ended()
    lock = run.save / LOCK_FILE
    lock.write_text(lock.read_text().replace('"host": "', '"host": "other-'))
    code = run.start().wait()
    errors = run.errors()
    run.wait_until_all_ended()
    if code == 0 or not any("--take-over" in line for line in errors):
        raise Failure(f"exit code {code}: {run.tail()}")
    run.start("--take-over")
    run.wait_for_steps(2)
    _stop(run)
    return errors[0][:110]


def hung(run: TrainingRun, generator: random.Random) -> str:
    """SIGSTOP to a rank: the others end within the timeout, naming it and the step."""
    run.start("--distributed-timeout-minutes", "1")
    run.wait_for_steps(generator.randint(2, 5))
    victim = run.workers()[1]
    victim.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    said = functools.partial(_named, run, f"no answer from rank 1 (process {victim.pid}")
    run.wait_for(said, "a line that names the rank", 0.2)
    seconds = time.monotonic() - begin
    if seconds > 60 * 1.5:
        raise Failure(f"named only after {seconds:.0f} s")
    code = run.wait()
    if code in (0, EXIT_REQUEUE):
        raise Failure(f"exit code {code}")
    return f"named after {seconds:.0f} s, ended after {time.monotonic() - begin:.0f} s: {run.errors()[0][:160]}"


def _named(run: TrainingRun, words: str) -> bool:
    return any(words in line and "step " in line for line in run.errors())


def _stop(run: TrainingRun) -> None:
    run.launcher.send_signal(signal.SIGTERM)
    code = run.wait()
    if code != EXIT_REQUEUE:
        raise Failure(f"exit code {code} instead of {EXIT_REQUEUE}: {run.tail()}")
    run.wait_until_all_ended()


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """A file system of a few megabytes at `directory`; False where this user may not mount one."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FULL_DISK_MEGABYTES}m", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def full_disk(run: TrainingRun, generator: random.Random) -> str:
    """One line, the checkpoint before still there, nothing left half-written, and more room lets it go on.

    A file system of its own where that can be mounted, else a limit on the size of files.
    """
    place = run.save.with_name(f"{run.save.name}-small")
    with small_disk(place) as mounted:
        small = TrainingRun(run.inputs, place / "run")
        small.output = run.save.with_name(f"{run.save.name}-small.out")
        try:
            words = _fill(small, mounted)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            small.start()
            small.wait_for_steps(2)
            _stop(small)
        finally:
            small.kill_all()
    return f"{'tmpfs' if mounted else 'file size limit'}: {words}"


def _fill(run: TrainingRun, mounted: bool) -> str:
    limit = contextlib.nullcontext() if mounted else _file_limit(100_000)
    with limit:
        run.start()
    code = run.wait()
    run.wait_until_all_ended()
    errors = run.errors()
    if code in (0, EXIT_REQUEUE) or not any("No space left" in line or "File too large" in line for line in errors):
        raise Failure(f"exit code {code}: {run.tail()}")
    if "Traceback" in run.text().split("ChildFailedError")[0]:
        raise Failure(f"a traceback: {run.tail()}")
    if mounted and run.latest() is None:
        raise Failure("the disk was full before the first checkpoint")
    if run.partial_directories():
        raise Failure(f"left behind: {run.partial_directories()}")
    return f"exit code {code}, latest checkpoint {run.latest()}: {errors[0][:140]}"


@contextlib.contextmanager
def _file_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _kill(victim: str, moment: str | None = None) -> Fault:
    name = f"kill -9 of {victim}, {'when ' + moment if moment else 'at a random moment'}"
    return Fault(name, functools.partial(killed, victim=victim, moment=moment))


def _signal(number: signal.Signals, moment: str, by: str = "launcher") -> Fault:
    name = f"{number.name} to {by} at {moment}" if moment not in MOMENTS else f"{number.name} to {by} when {moment}"
    return Fault(name, functools.partial(asked_to_stop, number=number, moment=moment, by=by))


def _damage(what: str) -> Fault:
    name = f"damage to the latest checkpoint: {what}"
    return Fault(name, functools.partial(damaged, what=what), may_lose_checkpoints=True)


RANDOM_KILLS = [_kill(victim) for victim in ("rank 0", "rank 1", "launcher", "everything")]
SAVING_KILLS = [_kill(victim, moment) for moment in MOMENTS for victim in ("rank 0", "everything")]
SAVING = "tensors are being written"
STOPS = [
    _signal(signal.SIGTERM, "a random step"),
    _signal(signal.SIGUSR1, "a random step"),
    _signal(signal.SIGTERM, SAVING),
    _signal(signal.SIGUSR1, SAVING),
    _signal(signal.SIGTERM, "the first second"),
    _signal(signal.SIGUSR1, "the first second"),
    _signal(signal.SIGUSR1, "the start of the workers"),
    _signal(signal.SIGTERM, "the start of the workers"),
    _signal(signal.SIGTERM, "a random step", by="torchrun"),
    _signal(signal.SIGUSR1, "a random step", by="torchrun"),
    Fault("SIGTERM to every process of the job when tensors are being written", all_processes_asked_to_stop),
]
DAMAGES = [
    _damage("a byte of the tensors"),
    _damage("a byte of common.pt"),
    _damage("a byte of the card"),
    _damage("the index cut"),
    _damage("a file missing"),
    Fault("latest_checkpointed_iteration.txt lost", latest_file_lost),
]
OTHERS = [
    _kill("launcher", SAVING),
    _kill("writer", SAVING),
    Fault("a second writer", second_writer),
    Fault("a lock of another host", lock_of_another_host),
    Fault("a full disk", full_disk),
    Fault("a hung rank (SIGSTOP)", hung),
]
_KINDS = ([*RANDOM_KILLS, *RANDOM_KILLS], SAVING_KILLS, STOPS, DAMAGES, OTHERS)
FAULTS = [fault for row in itertools.zip_longest(*_KINDS) for fault in row if fault]
"""In turn from each kind."""
SHORT = [
    _kill("launcher"),
    _kill("rank 0", SAVING),
    _signal(signal.SIGTERM, SAVING),
    Fault("a second writer", second_writer),
]
