"""Files of a data set from the Hugging Face hub, by its own client: which there are, and each whole or not at all."""

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
from megatron_moe_lpr.files.filesystem import atomic_file, sha256_of_file
from megatron_moe_lpr.hub_errors import explain_hub_errors

STAGING = ".incomplete"
"""Below the output: what the client has of a file so far; removed when nothing is missing any more."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a data set, and where it goes."""

    repository: str
    revision: str
    path: str
    """In the data set."""
    num_bytes: int
    sha256: str | None
    """As the hub records it; None for small files, which it keeps in git."""
    target: Path

    @property
    def is_there(self) -> bool:
        """Whether the target is there in its full size."""
        return self.target.is_file() and self.target.stat().st_size == self.num_bytes


def find_shards(corpus: Corpus, language: str, revision: str, train: int, valid: int, output: Path) -> list[Shard]:
    """The first `train` files of a language for training and the next `valid` ones for validation.

    They go to `output/train/LANGUAGE/` and `output/valid/LANGUAGE/`, with `/` in their names replaced.

    Args:
        revision: branch, tag or commit; a branch becomes the commit that it is now at.

    Raises:
        UserError: the hub does not answer, refuses access, or has fewer files.
    """
    from huggingface_hub import HfApi

    with _explained(corpus.repository):
        commit = HfApi().dataset_info(corpus.repository, revision=revision).sha
        if commit is None:
            raise UserError(f"{corpus.repository}: the hub does not say which commit {revision} is; try again")
        files = list(itertools.islice(_files(corpus, language, commit), train + valid))
    if len(files) < train + valid:
        raise UserError(
            f"{corpus.repository} has {len(files)} files for {language}, --shards {train} and --valid-shards {valid} "
            "ask for more"
        )
    shards = []
    for number, file in enumerate(files):
        folder = output / ("train" if number < train else "valid") / language
        target = folder / file.path.replace("/", "-")
        sha256 = file.lfs.sha256 if file.lfs else None
        shards.append(Shard(corpus.repository, commit, file.path, file.size, sha256, target))
    return shards


def _files(corpus: Corpus, language: str, commit: str) -> Iterator:
    """The hub's entries in the hub's order, page by page as they are asked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    for folder in corpus.folders_of(language):
        entries = HfApi().list_repo_tree(corpus.repository, folder, revision=commit, repo_type="dataset")
        yield from (one for one in entries if isinstance(one, RepoFile) and one.path.endswith(corpus.suffix))


def download(shard: Shard, output: Path) -> None:
    """Fetch a file that is not there, going on with what an earlier attempt left; compare it with its checksum.

    Raises:
        UserError: the hub does not answer or refuses access, or the file is damaged.
    """
    from huggingface_hub import hf_hub_download

    staging = output / STAGING / shard.repository.replace("/", "-")
    with _explained(shard.repository):
        path = Path(
            hf_hub_download(
                shard.repository, shard.path, repo_type="dataset", revision=shard.revision, local_dir=staging
            )
        )
    if path.stat().st_size != shard.num_bytes or shard.sha256 not in (None, sha256_of_file(path)):
        path.unlink()
        raise UserError(f"{shard.repository} {shard.path}: damaged on the way; start again to fetch it anew")
    shard.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(path, shard.target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The language's directory is a link to another disk.
        with atomic_file(shard.target) as partial:
            shutil.copyfile(path, partial)
        path.unlink()


def disk_need(shards: list[Shard], output: Path) -> tuple[int, int]:
    """Bytes that are to be fetched, and bytes that are free on the disk of `output`."""
    missing = sum(shard.num_bytes for shard in shards if not shard.is_there)
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return missing, shutil.disk_usage(place).free


def remove_staging(output: Path) -> None:
    """The client's own notes, once every file is in its place."""
    shutil.rmtree(output / STAGING, ignore_errors=True)


def _explained(repository: str) -> AbstractContextManager[None]:
    page = f"https://huggingface.co/datasets/{repository}"
    return explain_hub_errors(repository, page, "does it have that language by this code?")
