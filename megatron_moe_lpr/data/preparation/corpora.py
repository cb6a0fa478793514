"""The corpora that the paper trains on: where the Hugging Face hub has their text of a language, and in what form."""

import dataclasses

from megatron_moe_lpr.errors import UserError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set of the hub, as files that tools/preprocess_data.py reads."""

    repository: str
    folders: tuple[str, ...]
    """Where its files are; LANGUAGE is replaced."""
    suffix: str
    languages: frozenset[str] | None
    """None: the folder tells."""
    terms: str
    """Licence and access, as the data set's page had them when this was written."""

    def folders_of(self, language: str) -> list[str]:
        """The folders of a language, in the order in which they are read."""
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
"""The paper's choice; the other languages come from CulturaX."""


def corpus_of(language: str, choices: dict[str, str]) -> tuple[str, Corpus]:
    """Name and description of the corpus for a language.

    Args:
        choices: language to corpus, where it is not the paper's.

    Raises:
        UserError: no such corpus, or it has other languages.
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
