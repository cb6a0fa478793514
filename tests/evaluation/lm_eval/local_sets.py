"""Local data sets with the names, configurations and fields of the benchmarks', a few questions each.

`datasets` prefers a directory `facebook/belebele` in the working directory to the hub, so that the tasks of lm_eval run
on them unchanged.
"""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

LETTERS = "ABCD"
QUESTIONS = 6
WORDS = ["red", "green", "blue", "white"]


def write_local_sets(directory: Path) -> None:
    """Write all data sets that lm_eval 0.4.13 reads for English, Hungarian and Greek."""
    arc = {"train": _arc, "validation": _arc, "test": _arc}
    _write(directory, "allenai/ai2_arc", {"ARC-Challenge": arc})
    _write(directory, "LumiOpen/arc_challenge_mt", {"el": arc})
    options = {"train": _options, "validation": _options, "test": _options, "val": _options}
    _write(directory, "alexandrainst/m_arc", {"hu": options})
    _write(directory, "alexandrainst/m_mmlu", {"hu": options, "en": options})
    _write(directory, "CohereForAI/Global-MMLU", {"el": {"dev": _global_mmlu, "test": _global_mmlu}}, subjects("el"))
    _write(directory, "Rowan/hellaswag", {"default": {"train": _hellaswag, "validation": _hellaswag}})
    _write(directory, "alexandrainst/m_hellaswag", {"hu": {"val": _hellaswag}})
    _write(directory, "facebook/belebele", {code: {"test": _belebele} for code in ("eng_Latn", "hun_Latn", "ell_Grek")})


def write_further_sets(directory: Path) -> None:
    """Write data sets of INCLUDE (German, Greek) and MGSM (German)."""
    domains = ("Driving License", "STEM", "Social Science", "Arts & Humanities", "Business & Commerce")
    more = ("Health oriented education", "Professional certification", "Medical License")
    exams = {language: {"test": _include} for language in ("German", "Greek")}
    _write(directory, "CohereForAI/include-base-44", exams, (*domains, *more))
    _write(directory, "juletxara/mgsm", {"de": {"train": _mgsm, "test": _mgsm}})


def _include(where: str, domain: str) -> dict:
    options = {f"option_{letter.lower()}": word for letter, word in zip(LETTERS, WORDS, strict=True)}
    return {"question": _question(where, len(domain)), **options, "answer": len(domain) % 4, "domain": domain}


def _mgsm(where: str, number: int) -> dict:
    begin = "Schritt-für-Schritt-Antwort: " if where.endswith("train") else None
    answer = f"{begin}Die Antwort lautet {number}." if begin else None
    question = f"Frage: {_question(where, number)}" if begin else _question(where, number)
    return {"question": question, "answer": answer, "answer_number": number, "equation_solution": ""}


def subjects(language: str) -> list[str]:
    """Return the subjects of Global-MMLU, from the names of lm_eval's tasks."""
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "global_mmlu" / "full" / language
    start = f"global_mmlu_full_{language}_"
    return sorted(path.stem.removeprefix(start) for path in tasks.glob(f"{start}*.yaml"))


def _write(directory: Path, name: str, configurations: dict, numbers: Sequence = range(QUESTIONS)) -> None:
    """Write the configurations and splits of a data set as JSON lines, and the README.md that describes them."""
    lines = ["---", "configs:"]
    for configuration, splits in configurations.items():
        lines += [f"- config_name: {configuration}", "  data_files:"]
        for split, make in splits.items():
            path = directory / name / configuration / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_jsonl(make(f"{configuration} {split}", number) for number in numbers))
            lines += [f"  - split: {split}", f"    path: {configuration}/{split}.jsonl"]
    (directory / name / "README.md").write_text("\n".join([*lines, "---", ""]))


def _jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _question(where: str, number: int) -> str:
    return f"Which colour has thing {number} of {where}?"


def _arc(where: str, number: int) -> dict:
    choices = {"text": WORDS, "label": list(LETTERS)}
    return {
        "id": str(number),
        "question": _question(where, number),
        "choices": choices,
        "answerKey": LETTERS[number % 4],
    }


def _options(where: str, number: int) -> dict:
    """A question of m_arc and m_mmlu."""
    options = {f"option_{letter.lower()}": word for letter, word in zip(LETTERS, WORDS, strict=True)}
    answer = {"answer": LETTERS[number % 4], "option_e": ""}
    return {"id": str(number), "instruction": _question(where, number), **options, **answer}


def _global_mmlu(where: str, subject: str) -> dict:
    """A question of a subject of Global-MMLU."""
    options = {f"option_{letter.lower()}": word for letter, word in zip(LETTERS, WORDS, strict=True)}
    return {"subject": subject, "question": _question(where, 0), **options, "answer": LETTERS[len(subject) % 4]}


def _hellaswag(where: str, number: int) -> dict:
    endings = [f"and it is {word}." for word in WORDS]
    context = {"ctx_a": f"Somebody sees thing {number} of {where}", "ctx_b": "then"}
    return {"activity_label": "Seeing", **context, "endings": endings, "label": str(number % 4)}


def _belebele(where: str, number: int) -> dict:
    answers = {f"mc_answer{index + 1}": word for index, word in enumerate(WORDS)}
    passage = {"flores_passage": f"A thing of {where}.", "question": _question(where, number)}
    return {**passage, **answers, "correct_answer_num": str(number % 4 + 1)}
