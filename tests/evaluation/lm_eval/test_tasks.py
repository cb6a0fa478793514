"""Tasks of each language among the names of lm_eval 0.4.13, which are recorded beside this file."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from megatron_moe_lpr.data import language_names
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.lm_eval.harness import known_tasks
from megatron_moe_lpr.evaluation.lm_eval.languages import CODES, flores_code, two_letters
from megatron_moe_lpr.evaluation.lm_eval.tasks import BENCHMARKS, choose_tasks

VERSION = "0.4.13"
RECORDED = set((Path(__file__).parent / f"lm_eval_{VERSION}_tasks.txt").read_text().split())
PREFIXES = {
    "belebele": "belebele",
    "include": "include_base_44",
    "global_mmlu": "global_mmlu_full",
    "xstorycloze": "xstorycloze",
    "xcopa": "xcopa",
    "xwinograd": "xwinograd",
    "mgsm": "mgsm_native_cot",
    "sib200": "sib",
    "multiblimp": "multiblimp",
}
LANGUAGES = Path(language_names.__file__).with_name("language_codes.tsv")
PAPER = ["en", "es", "zh", "el", "hu", "tr"]


def chosen(name: str, *languages: str, known=RECORDED):
    """Choose the tasks of one benchmark."""
    return choose_tasks([name], languages or PAPER, known)[0]


@pytest.mark.parametrize(
    ("name", "tasks", "absent"),
    [
        ("arc", "arc_challenge arc_es arc_zh arc_challenge_mt_el arc_hu", ["tr"]),
        ("hellaswag", "hellaswag hellaswag_es hellaswag_hu", ["zh", "el", "tr"]),
        ("mmlu", "m_mmlu_en m_mmlu_es m_mmlu_zh global_mmlu_full_el m_mmlu_hu global_mmlu_full_tr", []),
        (
            "belebele",
            "belebele_eng_Latn belebele_spa_Latn belebele_zho_Hans belebele_ell_Grek belebele_hun_Latn "
            "belebele_tur_Latn",
            [],
        ),
        ("flores", "spanish_bench_flores_en-es spanish_bench_flores_es-en", ["zh", "el", "hu", "tr"]),
        (
            "include",
            "include_base_44_spanish include_base_44_chinese include_base_44_greek include_base_44_hungarian "
            "include_base_44_turkish",
            ["en"],
        ),
        (
            "global_mmlu",
            "global_mmlu_full_en global_mmlu_full_es global_mmlu_full_zh global_mmlu_full_el global_mmlu_full_tr",
            ["hu"],
        ),
        ("xstorycloze", "xstorycloze_en xstorycloze_es xstorycloze_zh", ["el", "hu", "tr"]),
        ("xcopa", "xcopa_zh xcopa_tr", ["en", "es", "el", "hu"]),
        ("xwinograd", "xwinograd_en xwinograd_zh", ["es", "el", "hu", "tr"]),
        ("mgsm", "mgsm_native_cot_en mgsm_native_cot_es mgsm_native_cot_zh", ["el", "hu", "tr"]),
        ("sib200", "sib_eng_prompt_1", ["es", "zh", "el", "hu", "tr"]),
        ("multiblimp", "multiblimp_eng multiblimp_spa multiblimp_ell multiblimp_hun multiblimp_tur", ["zh"]),
    ],
)
def test_the_papers_languages(name, tasks, absent):
    one = chosen(name)
    assert list(one.tasks.values()) == tasks.split() and one.absent == absent
    said = " ".join(one.lines())
    assert all(task in said for task in one.tasks.values())
    assert not absent or f"lm_eval has no task for {', '.join(absent)}; left out there" in said


def test_codes_of_languages_outside_the_table():
    codes = {"ceb": "ceb_Latn", "arz_Arab": "arz_Arab", "ast_Latn": "ast_Latn", "zh-Hant": "zho_Hant", "zh": "zho_Hans"}
    assert {language: flores_code(language) for language in codes} == codes
    assert flores_code("own-tag") == "own-tag"


def test_languages_in_other_spellings():
    assert chosen("mmlu", "hun", "es-MX", "zho_Hans").tasks == {
        "hun": "m_mmlu_hu",
        "es-MX": "m_mmlu_es",
        "zho_Hans": "m_mmlu_zh",
    }
    assert chosen("belebele", "ceb_Latn").tasks == {"ceb_Latn": "belebele_ceb_Latn"}
    assert two_letters("el") == two_letters("ell_Grek") == "el" and flores_code("EL") == "ell_Grek"


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        (
            "multiblimp",
            {"lv": "lav", "fa": "fas", "et": "est", "sq": "sqi", "hr": "hbs", "sr-Latn": "hbs", "hbo": "hbo"},
        ),
        ("sib200", {"sw": "swa", "mg": "plt", "om": "gaz", "pt-BR": "por", "cjk": "cjk"}),
        ("include", {"mk": "north_macedonian", "fil": "tagalog", "tl": "tagalog", "ms": "malay", "fa-IR": "persian"}),
        ("global_mmlu", {"fil": "fil", "tl": "fil", "lit_Latn": "lt"}),
        ("xwinograd", {"ja": "jp", "pt": "pt"}),
        ("belebele", {"gl": "glg_Latn", "lg": "lug_Latn", "lv": "lvs_Latn"}),
    ],
)
def test_each_benchmark_names_languages_in_its_own_way(name, tasks):
    found = chosen(name, *tasks).tasks
    assert [task.removesuffix("_prompt_1") for task in found.values()] == [
        f"{PREFIXES[name]}_{code}" for code in tasks.values()
    ]


def test_every_recorded_task_has_a_language():
    """Of the table, or the three-letter code of the task as the user's own tag."""
    languages = {row.split("\t")[0] for row in LANGUAGES.read_text(encoding="utf-8").splitlines()[1:]}
    for name, prefix in PREFIXES.items():
        recorded = {task for task in RECORDED if task.startswith(f"{prefix}_") and "Latn" not in task}
        own = {task.removeprefix(f"{prefix}_").removesuffix("_prompt_1") for task in recorded}
        candidates = BENCHMARKS[name].candidates
        reached = {task for language in languages | own | {"zh-Hant"} for task in candidates(two_letters(language))}
        reached |= {task for language in own | {"zh-Hant"} for task in candidates(language)}
        assert len(recorded) > 5 and recorded <= reached, recorded - reached


def test_every_code_of_the_table_is_one_of_belebeles():
    assert {f"belebele_{code}" for code in CODES.values()} <= RECORDED


@pytest.mark.parametrize(
    ("names", "languages", "message"),
    [
        (["arc", "mlmu"], PAPER, "--benchmarks mlmu: choose among arc"),
        (["arc"], ["el", "el"], "el is named twice"),
        (["hellaswag"], ["el", "tr"], "lm_eval has none of hellaswag for el, tr"),
    ],
)
def test_mistakes(names, languages, message):
    with pytest.raises(UserError, match=message):
        choose_tasks(names, languages, RECORDED)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval")
def test_the_recorded_names_are_the_installed_harness_s():
    """Every recorded name is installed, and no task for a language was added since."""
    assert importlib.metadata.version("lm_eval") == VERSION
    installed = known_tasks()
    assert installed >= RECORDED and len(RECORDED) > 300
    for name in BENCHMARKS:
        assert chosen(name) == chosen(name, known=installed)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: make test-eval")
def test_the_installed_tasks_are_as_the_benchmarks_say():
    """Of each recorded task: its metric and filter, where examples come from, and how many answers there are."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index

    def leaves(task: str) -> list[dict]:
        settings = index[task].cfg
        if settings is None:  # a tag
            return [entry.cfg for entry in index.values() if task in entry.tags]
        parts = settings.get("task") if isinstance(settings.get("task"), list) else None
        return [settings] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    for name, prefix in PREFIXES.items():
        benchmark = BENCHMARKS[name]
        for task in sorted(one for one in RECORDED if one.startswith(f"{prefix}_")):
            found = leaves(task)
            assert found, task
            for settings in found:
                assert benchmark.metric in {one["metric"] for one in settings["metric_list"]}, task
                filters = {one["name"] for one in settings.get("filter_list") or [{"name": "none"}]}
                assert filters & set(benchmark.filters), task
                splits = [settings.get(kind) for kind in ("fewshot_split", "training_split", "validation_split")]
                test = settings.get("test_split")
                others = [split for split in splits if split and split != test] if test else splits
                assert any(others) or benchmark.only_shots or name == "belebele", task
                answers = settings.get("doc_to_choice")
                if isinstance(answers, list):
                    assert benchmark.chance == pytest.approx(1 / len(answers)), task


def test_without_the_harness(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="lm_eval is not installed; pip install"):
        known_tasks()
