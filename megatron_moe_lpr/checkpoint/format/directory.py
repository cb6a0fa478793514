"""The layout of a checkpoint directory.

DIR/latest_checkpointed_iteration.txt   `release` for a converted model, else the iteration; written last
DIR/release/ or DIR/iter_0000100/       .metadata, *.distcp, common.pt, metadata.json
    moe_lpr/                            card.json, config.json (the dense model's), tokenizer files, checksums.json
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_card, read_json
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.files.fsync import sync_directory
from megatron_moe_lpr.files.work_directory import killed_run_hint
from megatron_moe_lpr.model.configuration.architecture import Architecture, read_architecture
from megatron_moe_lpr.program import command

LATEST_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
SIDE_DIRECTORY = "moe_lpr"
CARD_FILE = "card.json"
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class CheckpointDirectory:
    """A checkpoint on disk: tensors and the files beside them."""

    path: Path
    """The iteration directory."""
    iteration: int | None
    """None for a converted model that has not been trained."""
    parent_path: Path | None = None
    """The parent checkpoint as given by --base-checkpoint; None: the one that the card names."""

    @property
    def side_directory(self) -> Path:
        """Directory of the card, the dense model's configuration and the tokenizer files."""
        return self.path / SIDE_DIRECTORY

    def card(self) -> CheckpointCard:
        """Read the checkpoint's card. Raises UserError if it is missing or invalid."""
        return read_card(self.side_directory / CARD_FILE)

    def architecture(self) -> Architecture:
        """Read the dense model's configuration. Raises UserError if it is missing or unsupported."""
        path = self.side_directory / CONFIG_FILE
        return read_architecture(read_json(path), str(path))


def iteration_directory_name(iteration: int | None) -> str:
    """`release` or, for example, `iter_0000100`."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def resolve_checkpoint(path: Path, parent_path: Path | None = None) -> CheckpointDirectory:
    """Find the checkpoint that `path` means: an iteration directory, or a root with its latest iteration.

    Args:
        parent_path: the parent of a checkpoint with only trained weights (`--base-checkpoint`).

    Raises:
        UserError: there is no checkpoint, or it is incomplete.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory; a checkpoint is expected ({command('import')} writes one)"
            f"{killed_run_hint(path)}"
        )
    if not is_iteration_directory(path):
        path = path / iteration_directory_name(_latest_iteration(path))
    if not is_iteration_directory(path):
        raise UserError(f"{path}: no complete checkpoint: .metadata or metadata.json is missing")
    return CheckpointDirectory(path.resolve(), parse_iteration(path.resolve()), parent_path)


def is_iteration_directory(path: Path) -> bool:
    """Whether a directory has the files that Megatron writes last."""
    return (path / ".metadata").is_file() and (path / "metadata.json").is_file()


def write_latest(root: Path, iteration: int | None) -> None:
    """Record that `--load ROOT` means this checkpoint, which must be complete; None: the converted model."""
    with atomic_file(root / LATEST_FILE) as partial:
        partial.write_text(RELEASE if iteration is None else str(iteration), encoding="utf-8")


def finish_iteration(partial: Path, root: Path, iteration: int) -> Path:
    """Rename a complete directory to its name under `root`, and then name it in the file of the latest iteration.

    Its content must be on the disk already (see `checksum_file.write_checksums`).
    """
    target = root / iteration_directory_name(iteration)
    # Hide a former checkpoint of this step first: half of it must not look like a checkpoint after a kill.
    former = root / f".{target.name}.removed"
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.rename(target, former)
    os.rename(partial, target)
    sync_directory(root)
    write_latest(root, iteration)
    shutil.rmtree(former, ignore_errors=True)
    return target


def _latest_iteration(root: Path) -> int | None:
    latest = root / LATEST_FILE
    try:
        text = latest.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        form = f"; it is a Hugging Face directory, of which {command('import')} makes one"
        hint = form if (root / CONFIG_FILE).is_file() else ""
        raise UserError(f"{root}: no checkpoint here: neither {LATEST_FILE} nor .metadata exists{hint}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{latest}: cannot be read: {error}") from None
    if text != RELEASE and not re.fullmatch("[0-9]{1,15}", text):
        raise UserError(f"{latest}: an iteration number or `{RELEASE}` is expected, not {text[:40]!r}")
    return None if text == RELEASE else int(text)


def parse_iteration(path: Path) -> int | None:
    """The iteration in the name of an iteration directory; None: a converted model, or another name."""
    number = path.name.removeprefix("iter_")
    return int(number) if number != path.name and number.isdigit() else None
