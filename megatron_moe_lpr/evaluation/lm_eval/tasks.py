"""Multilingual benchmarks and their tasks in lm_eval, by language.

The paper evaluates on ARC-Challenge, MMLU and HellaSwag in multilingual versions, Belebele and Flores.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.languages import flores_code, include_name, three_letters, two_letters

PAIR = " to "
"""Separates the languages of a translation in its name."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark that lm_eval has in several languages."""

    title: str
    shots: int
    """Default number of examples in the prompt."""
    metric: str
    """Name in the results of lm_eval. acc_norm: an answer's log-probability is divided by its length in bytes."""
    candidates: Callable[[str], list[str]]
    """Returns the names that the task of a language may have, the best first; a translation is named `en-es`."""
    chance: float | None = None
    """Expected score of guessing, in the metric's own scale; None: answers are written, not chosen."""
    only_shots: bool = False
    """Whether --num-fewshot leaves `shots` as it is: the task has questions for the test alone."""
    whole_sentences: bool = False
    """Whether probabilities of sentences are compared, which no chat template may stand before."""
    filters: tuple[str, ...] = ("none",)
    """Names of lm_eval's filters, which find the answer in a text: the first one that a task has counts."""
    translation: bool = False
    """Whether the metric goes to 100 and tasks have two languages; other metrics go from 0 to 1."""


def _arc(language: str) -> list[str]:
    return ["arc_challenge"] if language == "en" else [f"arc_{language}", f"arc_challenge_mt_{language}"]


def _hellaswag(language: str) -> list[str]:
    return ["hellaswag"] if language == "en" else [f"hellaswag_{language}"]


def _mmlu(language: str) -> list[str]:
    return [f"m_mmlu_{language}", f"global_mmlu_full_{language}"]


def _belebele(language: str) -> list[str]:
    return [f"belebele_{flores_code(language)}"]


def _flores(pair: str) -> list[str]:
    return [f"{bench}_bench_flores_{pair}" for bench in ("spanish", "portuguese", "catalan", "galician", "basque")]


def _include(language: str) -> list[str]:
    return [f"include_base_44_{name}" for name in include_name(language)]


def _global_mmlu(language: str) -> list[str]:
    # Lite has the same questions, 400 of them, in a part of these languages.
    names = [language, "fil"] if language == "tl" else [language]
    return [f"global_mmlu_full_{name}" for name in names]


def _xwinograd(language: str) -> list[str]:
    return ["xwinograd_jp" if language == "ja" else f"xwinograd_{language}"]


def _sib(language: str) -> list[str]:
    return [f"sib_{code}_prompt_1" for code in three_letters(language)]


def _multiblimp(language: str) -> list[str]:
    # One set for Serbo-Croatian.
    codes = [*three_letters(language), *(["hbs"] if language in ("sr", "hr", "bs") else [])]
    return [f"multiblimp_{code}" for code in codes]


BENCHMARKS = {
    "arc": Benchmark("ARC-Challenge", 25, "acc_norm", _arc, 1 / 4),
    "hellaswag": Benchmark("HellaSwag", 10, "acc_norm", _hellaswag, 1 / 4),
    "mmlu": Benchmark("MMLU", 5, "acc", _mmlu, 1 / 4),
    "belebele": Benchmark("Belebele", 5, "acc", _belebele, 1 / 4),
    "flores": Benchmark("Flores", 8, "bleu", _flores, translation=True),
    "include": Benchmark("INCLUDE", 0, "acc", _include, 1 / 4, only_shots=True),
    "global_mmlu": Benchmark("Global-MMLU", 5, "acc", _global_mmlu, 1 / 4),
    "xstorycloze": Benchmark("XStoryCloze", 0, "acc", lambda language: [f"xstorycloze_{language}"], 1 / 2),
    "xcopa": Benchmark("XCOPA", 0, "acc", lambda language: [f"xcopa_{language}"], 1 / 2),
    "xwinograd": Benchmark("XWinograd", 0, "acc", _xwinograd, 1 / 2, only_shots=True, whole_sentences=True),
    "mgsm": Benchmark(
        "MGSM",
        8,
        "exact_match",
        lambda language: [f"mgsm_native_cot_{language}"],
        filters=("flexible-extract", "get-answer"),
    ),
    "sib200": Benchmark("SIB-200", 5, "acc", _sib, 1 / 7),
    "multiblimp": Benchmark("MultiBLiMP", 0, "acc", _multiblimp, 1 / 2, only_shots=True, whole_sentences=True),
}


@dataclasses.dataclass(frozen=True)
class ChosenTasks:
    """The tasks of a benchmark for some languages."""

    name: str
    tasks: dict[str, str]
    """Name of the task by language, or by pair of languages."""
    absent: list[str]
    """Languages without a task."""

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of these tasks."""
        return BENCHMARKS[self.name]

    def lines(self) -> list[str]:
        """Return lines for the user: the tasks, and the languages without one."""
        found = ", ".join(f"{task} ({language})" for language, task in self.tasks.items())
        lines = [f"{self.benchmark.title}: {found}"] if found else []
        if self.absent:
            lines.append(f"{self.benchmark.title}: lm_eval has no task for {', '.join(self.absent)}; left out there")
        return lines


def choose_tasks(names: Sequence[str], languages: Sequence[str], known: Collection[str]) -> list[ChosenTasks]:
    """Choose the tasks of benchmarks for some languages.

    Args:
        names: keys of `BENCHMARKS`.
        known: names of lm_eval's tasks, see `known_tasks`.

    Raises:
        UserError: an unknown benchmark, a language named twice, or no task at all.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise UserError(f"--benchmarks {' '.join(unknown)}: choose among {', '.join(BENCHMARKS)}")
    twice = sorted({one for one in languages if languages.count(one) > 1})
    if twice:
        raise UserError(f"--original-languages and --expanded-languages: {', '.join(twice)} is named twice")
    chosen = [_choose(name, languages, frozenset(known)) for name in dict.fromkeys(names)]
    if not any(one.tasks for one in chosen):
        raise UserError(f"lm_eval has none of {', '.join(names)} for {', '.join(languages)}")
    return chosen


def _choose(name: str, languages: Sequence[str], known: frozenset[str]) -> ChosenTasks:
    benchmark = BENCHMARKS[name]
    if benchmark.translation:
        pairs = itertools.permutations(languages, 2)
        names = {f"{one}{PAIR}{other}": f"{two_letters(one)}-{two_letters(other)}" for one, other in pairs}
    else:
        names = {language: two_letters(language) for language in languages}
    found = {key: [task for task in benchmark.candidates(short) if task in known] for key, short in names.items()}
    tasks = {key: options[0] for key, options in found.items() if options}
    covered = {language for key in tasks for language in (key.split(PAIR) if benchmark.translation else [key])}
    return ChosenTasks(name, tasks, [language for language in languages if language not in covered])
