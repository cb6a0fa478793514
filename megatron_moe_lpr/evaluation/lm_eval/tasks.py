"""The paper's benchmarks, and which tasks of the installed lm_eval are theirs in a language.

The paper evaluates on ARC-Challenge, MMLU and HellaSwag in multilingual versions, Belebele and Flores.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.languages import flores_code, two_letters

PAIR = " to "
"""Between the languages of a translation, where languages are named."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark in every language that lm_eval has it in."""

    title: str
    shots: int
    """Examples in the prompt, where the user says nothing else."""
    metric: str
    """Of lm_eval's results. acc_norm: the log-probability of an answer is divided by its length in bytes."""
    candidates: Callable[[str], list[str]]
    """Names that a language's task may have, the best first; for a translation the language is `en-es`."""
    translation: bool = False
    """Scored from 0 to 100, where the others are a share of right answers from 0 to 1."""


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


BENCHMARKS = {
    "arc": Benchmark("ARC-Challenge", 25, "acc_norm", _arc),
    "hellaswag": Benchmark("HellaSwag", 10, "acc_norm", _hellaswag),
    "mmlu": Benchmark("MMLU", 5, "acc", _mmlu),
    "belebele": Benchmark("Belebele", 5, "acc", _belebele),
    "flores": Benchmark("Flores", 8, "bleu", _flores, translation=True),
}


@dataclasses.dataclass(frozen=True)
class ChosenTasks:
    """A benchmark's tasks for the languages of a run."""

    name: str
    tasks: dict[str, str]
    """Language, or pair of languages, to the task's name."""
    absent: list[str]
    """Languages that the benchmark lacks."""

    @property
    def benchmark(self) -> Benchmark:
        """What they are tasks of."""
        return BENCHMARKS[self.name]

    def lines(self) -> list[str]:
        """For people: the tasks, and the languages without one."""
        found = ", ".join(f"{task} ({language})" for language, task in self.tasks.items())
        lines = [f"{self.benchmark.title}: {found}"] if found else []
        if self.absent:
            lines.append(f"{self.benchmark.title}: lm_eval has no task for {', '.join(self.absent)}; left out there")
        return lines


def choose_tasks(names: Sequence[str], languages: Sequence[str], known: Collection[str]) -> list[ChosenTasks]:
    """The tasks of the benchmarks `names` for `languages`, among those that lm_eval knows.

    Raises:
        UserError: a benchmark that there is not, a language named twice, or no task at all.
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
        names = {f"{one}{PAIR}{other}": f"{two_letters(one)}-{two_letters(other)}" for one, other in _pairs(languages)}
    else:
        names = {language: two_letters(language) for language in languages}
    found = {key: [task for task in benchmark.candidates(short) if task in known] for key, short in names.items()}
    tasks = {key: options[0] for key, options in found.items() if options}
    covered = {language for key in tasks for language in (key.split(PAIR) if benchmark.translation else [key])}
    return ChosenTasks(name, tasks, [language for language in languages if language not in covered])


def _pairs(languages: Sequence[str]) -> list[tuple[str, str]]:
    return [(one, other) for one in languages for other in languages if one != other]
