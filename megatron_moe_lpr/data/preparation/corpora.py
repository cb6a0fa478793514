"""The training corpora of the paper on the Hugging Face hub: repository, folders and format by language."""

import dataclasses

from megatron_moe_lpr.errors import UserError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set on the hub whose files `moe-lpr preprocess` reads."""

    repository: str
    folders: tuple[str, ...]
    """Folders of its files; LANGUAGE stands for the language code."""
    suffix: str
    languages: frozenset[str] | None
    """Languages of the corpus; None: any, one folder each."""
    terms: str
    """Licence and access conditions, copied from the page of the data set."""

    def language_folders(self, language: str) -> list[str]:
        """Return the folders of a language, in reading order."""
        return [folder.replace("LANGUAGE", language) for folder in self.folders]


CORPORA = {
    "culturax": Corpus(
        "uonlp/CulturaX",
        ("LANGUAGE",),
        ".parquet",
        None,
        "terms of mC4 (ODC-BY) and OSCAR (CC0) and of Common Crawl; accept the conditions on its page, then log in",
    ),
    "slimpajama": Corpus(
        "cerebras/SlimPajama-627B",
        tuple(f"train/chunk{number}" for number in range(1, 11)),
        ".jsonl.zst",
        frozenset({"en"}),
        "the terms of each of RedPajama's sources (Common Crawl, C4, GitHub, books, arXiv, Wikipedia, StackExchange)",
    ),
    "skypile": Corpus(
        "Skywork/SkyPile-150B",
        ("data",),
        ".jsonl",
        frozenset({"zh"}),
        "the Skywork Community License",
    ),
}
DEFAULTS = {"en": "slimpajama", "zh": "skypile"}
"""Corpus of a language, as in the paper; other languages use CulturaX."""


def choose_corpus(language: str, choices: dict[str, str]) -> tuple[str, Corpus]:
    """Return name and description of the corpus for a language.

    Args:
        choices: language to corpus name, where the user wants another one than the paper.

    Raises:
        UserError: the corpus is unknown, or does not contain the language.
    """
    name = choices.get(language, DEFAULTS.get(language, "culturax"))
    if name not in CORPORA:
        raise UserError(f"--corpus {language}={name}: choose among {', '.join(CORPORA)}")
    corpus = CORPORA[name]
    if corpus.languages is not None and language not in corpus.languages:
        raise UserError(
            f"--corpus {language}={name}: {corpus.repository} has {', '.join(sorted(corpus.languages))} only"
        )
    return name, corpus
