"""Run the paper's and other multilingual benchmarks by lm_eval, on the base model and the exported one.

Needs the package's extra `eval`. Started again with the same --output, it continues where it stopped.
"""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.errors import UserError, name_file_in_oserror
from megatron_moe_lpr.evaluation.lm_eval.beginning import describe_beginning, prompt_beginning
from megatron_moe_lpr.evaluation.lm_eval.chat import TemplateChoice, describe_template, uses_template
from megatron_moe_lpr.evaluation.lm_eval.harness import (
    check_replaceable,
    harness_command,
    harness_version,
    known_tasks,
    run_harness,
)
from megatron_moe_lpr.evaluation.lm_eval.scores import MODELS, benchmark_record, read_scores
from megatron_moe_lpr.evaluation.lm_eval.tables import benchmarks_table
from megatron_moe_lpr.evaluation.lm_eval.tasks import ChosenTasks, choose_tasks
from megatron_moe_lpr.files.atomic_file import check_output_file
from megatron_moe_lpr.files.file_lock import directory_lock
from megatron_moe_lpr.files.json_files import write_json
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt

RECORD_FILE = "benchmarks.json"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run lm_eval on the base model and the exported one."""

    base: Path
    """Hugging Face directory of the dense model."""
    final: Path
    """Hugging Face directory that export wrote."""
    original_languages: list[str]
    """Languages that the dense model already knows, for example en es zh."""
    expanded_languages: list[str]
    """Languages that stage 1 taught, for example el hu tr."""
    output: Path
    """Directory for lm_eval's results, a directory for each model and benchmark, and benchmarks.json beside them."""
    benchmarks: tuple[str, ...] = ("arc", "hellaswag", "mmlu", "belebele")
    """Which to run of arc, hellaswag, mmlu, belebele and flores (the paper's), include, global_mmlu, xstorycloze,
    xcopa, xwinograd, mgsm, sib200 and multiblimp."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt. Default: 25 for arc, 10 for hellaswag, 5 for mmlu, belebele, global_mmlu and sib200, 8
    for flores and mgsm, none for the others, of which include, xwinograd and multiblimp take none in any case."""
    apply_chat_template: TemplateChoice = "auto"
    """Whether questions go through the models' chat template. auto: if both models' generation_config.json
    (eos_token_id) ends a text at the token that the template puts behind an answer, as that of instruct models does.
    Some base models, such as Qwen2.5's, carry a template that nothing has taught them."""
    fewshot_as_multiturn: bool = True
    """With a chat template: examples are earlier turns of the conversation, not text in the question."""
    limit: PositiveInt | None = None
    """Only the first N questions of each task, for a trial."""
    model: str = "hf"
    """lm_eval's kind of model: hf or vllm."""
    model_args: str = "dtype=auto"
    """lm_eval's --model_args, without the model's name."""
    batch_size: str = "auto"
    """lm_eval's --batch_size."""
    device: str | None = None
    """lm_eval's --device. Default: lm_eval decides."""
    include_path: Path | None = None
    """Directory with further tasks for lm_eval."""
    launcher: str = ""
    """Command before lm_eval's flags, for example "accelerate launch -m lm_eval". Default: this Python's -m lm_eval."""
    dry_run: bool = False
    """Print tasks and commands; start nothing."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    flags = with_one_spelling(parse_flags(Flags, arguments, __doc__))
    for name in MODELS:
        if not (getattr(flags, name) / "config.json").is_file():
            raise UserError(f"--{name} {getattr(flags, name)}: no config.json there; give a Hugging Face directory")
        if "," in str(getattr(flags, name)):
            raise UserError(f"--{name} {getattr(flags, name)}: lm_eval takes no comma in a path; rename the directory")
    check_places(flags)
    languages = [*flags.original_languages, *flags.expanded_languages]
    chosen = choose_tasks(flags.benchmarks, languages, known_tasks(flags.include_path))
    beginning = prompt_beginning(flags.base, flags.final, flags.model_args)
    models = {name: getattr(flags, name) for name in MODELS}
    chat = uses_template(models, flags.apply_chat_template)
    notes = (describe_beginning(beginning), describe_template(models, flags.apply_chat_template, chat))
    print(*(line for one in chosen for line in one.lines()), *notes, sep="\n", flush=True)
    if flags.dry_run:
        evaluate(flags, [one for one in chosen if one.tasks], chat)
        return
    with directory_lock(flags.output, "--output"):
        evaluate(flags, [one for one in chosen if one.tasks], chat)
        record = make_record(flags, chosen) | {"prompts_begin_with": beginning, "chat_template": chat}
        with name_file_in_oserror(flags.output / RECORD_FILE):
            write_json(record, flags.output / RECORD_FILE)
    Console(width=None if sys.stdout.isatty() else 160).print(benchmarks_table(record))
    print(f"by language: {flags.output / RECORD_FILE}")


def with_one_spelling(flags: Flags) -> Flags:
    """Return the flags with their languages as `canonical_language` spells them. Raises UserError."""
    original, notes = parse_languages(flags.original_languages, "--original-languages")
    expanded, more = parse_languages(flags.expanded_languages, "--expanded-languages")
    for note in (*notes, *more):
        print(f"note: {note}")
    return dataclasses.replace(flags, original_languages=original, expanded_languages=expanded)


def check_places(flags: Flags) -> None:
    """Check paths and launcher now, which would otherwise fail after hours of lm_eval. Raises UserError."""
    if flags.include_path is not None and not flags.include_path.is_dir():
        raise UserError(f"--include-path {flags.include_path}: no such directory")
    launcher = shlex.split(flags.launcher)
    if launcher and not flags.dry_run and shutil.which(launcher[0]) is None:
        raise UserError(f"--launcher: there is no command {launcher[0]}")
    if flags.output.exists() and not flags.output.is_dir():
        raise UserError(f"--output {flags.output}: is a file; give a directory")
    if flags.output.is_dir():
        check_output_file(flags.output / RECORD_FILE, "--output")


def evaluate(flags: Flags, chosen: list[ChosenTasks], chat: bool) -> None:
    """Run every benchmark of both models, by one call of lm_eval each. Raises UserError.

    Args:
        chat: questions go through the chat template.
    """
    launcher = shlex.split(flags.launcher)
    for model in MODELS:
        for one in chosen:
            check_replaceable(flags.output / model / one.name)
    for model in MODELS:
        for one in chosen:
            settings, output = harness_settings(flags, model, one, chat), flags.output / model / one.name
            print(shlex.join(harness_command(launcher, settings, output)), flush=True)
            if not flags.dry_run:
                run_harness(launcher, settings, output)


def harness_settings(flags: Flags, model: str, chosen: ChosenTasks, chat: bool = False) -> dict[str, Any]:
    """Return lm_eval's flags for one benchmark of one model."""
    # Without a template the settings have no such keys, as those of results from before there was a choice.
    template = {"apply_chat_template": True, "fewshot_as_multiturn": str(flags.fewshot_as_multiturn).lower()}
    return {
        "model": flags.model,
        "model_args": ",".join(filter(None, [f"pretrained={getattr(flags, model)}", flags.model_args])),
        "tasks": ",".join(chosen.tasks.values()),
        "num_fewshot": num_shots(flags, chosen),
        "batch_size": flags.batch_size,
        "device": flags.device,
        "limit": flags.limit,
        "include_path": str(flags.include_path) if flags.include_path else None,
        **(template if chat and not chosen.benchmark.whole_sentences else {}),
    }


def num_shots(flags: Flags, chosen: ChosenTasks) -> int:
    """Return the number of examples in the prompt of a benchmark."""
    benchmark = chosen.benchmark
    return benchmark.shots if flags.num_fewshot is None or benchmark.only_shots else flags.num_fewshot


def make_record(flags: Flags, chosen: list[ChosenTasks]) -> dict[str, Any]:
    """Return all scores as a JSON object. Raises UserError."""
    benchmarks = []
    for one in chosen:
        places = {model: flags.output / model / one.name for model in MODELS}
        scores = {model: read_scores(place, one) if one.tasks else {} for model, place in places.items()}
        benchmarks.append(benchmark_record(one, flags.original_languages, num_shots(flags, one), scores))
    return {
        "lm_eval": harness_version(),
        "models": {model: str(getattr(flags, model)) for model in MODELS},
        "original_languages": flags.original_languages,
        "expanded_languages": flags.expanded_languages,
        "limit": flags.limit,
        "benchmarks": benchmarks,
    }
