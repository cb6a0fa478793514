"""Download the files of a data set from the Hugging Face hub; each appears at its target complete or not at all."""

import dataclasses
import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_moe_lpr.data.preparation.corpora import Corpus
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.atomic_file import atomic_file
from megatron_moe_lpr.files.checksums import sha256_of_file
from megatron_moe_lpr.hub_errors import explain_hub_errors

STAGING = ".incomplete"
"""Directory below the output for partial downloads; removed when all files are complete."""


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a data set on the hub, and the local path to download it to."""

    repository: str
    revision: str
    path: str
    """Path within the data set."""
    num_bytes: int
    sha256: str | None
    """Checksum recorded by the hub; None for small files, which the hub stores in git."""
    target: Path

    @property
    def is_complete(self) -> bool:
        """Whether the target exists with its full size."""
        return self.target.is_file() and self.target.stat().st_size == self.num_bytes


def find_files(corpus: Corpus, language: str, revision: str, train: int, valid: int, output: Path) -> list[CorpusFile]:
    """List the first `train` files of a language for training and the next `valid` ones for validation.

    Targets lie in `output/train/LANGUAGE/` and `output/valid/LANGUAGE/`, with `/` in file names replaced by `-`.

    Args:
        revision: branch, tag or commit; resolved to the current commit.

    Raises:
        UserError: the hub does not answer, refuses access, or has fewer files.
    """
    from huggingface_hub import HfApi

    with _explained(corpus.repository):
        commit = HfApi().dataset_info(corpus.repository, revision=revision).sha
        if commit is None:
            raise UserError(f"{corpus.repository}: the hub does not say which commit {revision} is; try again")
        entries = list(itertools.islice(_files(corpus, language, commit), train + valid))
    if len(entries) < train + valid:
        raise UserError(
            f"{corpus.repository} has {len(entries)} files for {language}, --shards {train} and --valid-shards {valid} "
            "ask for more"
        )
    files = []
    for number, entry in enumerate(entries):
        folder = output / ("train" if number < train else "valid") / language
        target = folder / entry.path.replace("/", "-")
        sha256 = entry.lfs.sha256 if entry.lfs else None
        files.append(CorpusFile(corpus.repository, commit, entry.path, entry.size, sha256, target))
    return files


def _files(corpus: Corpus, language: str, commit: str) -> Iterator:
    """Yield the hub's entries in its order; pages are requested as they are needed."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    for folder in corpus.language_folders(language):
        entries = HfApi().list_repo_tree(corpus.repository, folder, revision=commit, repo_type="dataset")
        yield from (one for one in entries if isinstance(one, RepoFile) and one.path.endswith(corpus.suffix))


def download(file: CorpusFile, output: Path) -> None:
    """Download one file, resuming an earlier partial download, and compare it with its checksum.

    One file at a time: `snapshot_download` would first list the whole repository, of which a run wants a few files.

    Raises:
        UserError: the hub does not answer or refuses access, or the file is damaged.
    """
    from huggingface_hub import hf_hub_download

    staging = output / STAGING / file.repository.replace("/", "-")
    with _explained(file.repository):
        path = Path(
            hf_hub_download(file.repository, file.path, repo_type="dataset", revision=file.revision, local_dir=staging)
        )
    if path.stat().st_size != file.num_bytes or file.sha256 not in (None, sha256_of_file(path)):
        path.unlink()
        raise UserError(f"{file.repository} {file.path}: damaged on the way; start again to fetch it anew")
    file.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(path, file.target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The target directory is a link to another file system.
        with atomic_file(file.target) as partial:
            shutil.copyfile(path, partial)
        path.unlink()


def disk_need(files: list[CorpusFile], output: Path) -> tuple[int, int]:
    """Return bytes to download, and bytes free on the file system of `output`."""
    missing = sum(file.num_bytes for file in files if not file.is_complete)
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return missing, shutil.disk_usage(place).free


def remove_staging(output: Path) -> None:
    """Remove the directory for partial downloads."""
    shutil.rmtree(output / STAGING, ignore_errors=True)


def _explained(repository: str) -> AbstractContextManager[None]:
    page = f"https://huggingface.co/datasets/{repository}"
    return explain_hub_errors(repository, page, "does it have that language by this code?")
