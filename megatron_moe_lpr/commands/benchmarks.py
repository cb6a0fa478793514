"""Run the paper's benchmarks by lm_eval, on the base model and the exported one, in all languages.

Needs the package's extra `eval`. Started again with the same --output, it goes on where it stopped.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_moe_lpr.command_line import parse_flags
from megatron_moe_lpr.data.original_languages import parse_languages
from megatron_moe_lpr.errors import UserError, naming
from megatron_moe_lpr.evaluation.lm_eval.beginning import describe_beginning, prompt_beginning
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
from megatron_moe_lpr.files.file_lock import directory_lock
from megatron_moe_lpr.files.filesystem import atomic_file, check_output_file
from megatron_moe_lpr.flag_ranges import NonNegativeInt, PositiveInt

RECORD_FILE = "benchmarks.json"


@dataclasses.dataclass(frozen=True)
class Flags:
    """lm_eval on the base model and the exported one."""

    base: Path
    """Hugging Face directory of the dense model."""
    final: Path
    """Hugging Face directory that tools/convert_hf.py export wrote."""
    original_languages: list[str]
    """Languages that the dense model already knows, for example en es zh."""
    expanded_languages: list[str]
    """Languages that stage 1 taught, for example el hu tr."""
    output: Path
    """Directory for lm_eval's results, a directory for each model and benchmark, and benchmarks.json beside them."""
    benchmarks: tuple[str, ...] = ("arc", "hellaswag", "mmlu", "belebele")
    """Which of arc, hellaswag, mmlu, belebele and flores to run."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt. Default: 25 for arc, 10 for hellaswag, 5 for mmlu and belebele, 8 for flores."""
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
    print(*(line for one in chosen for line in one.lines()), describe_beginning(beginning), sep="\n", flush=True)
    if flags.dry_run:
        evaluate(flags, [one for one in chosen if one.tasks])
        return
    with directory_lock(flags.output, "--output"):
        evaluate(flags, [one for one in chosen if one.tasks])
        record = make_record(flags, chosen) | {"prompts_begin_with": beginning}
        with naming(flags.output / RECORD_FILE), atomic_file(flags.output / RECORD_FILE) as partial:
            partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 160).print(benchmarks_table(record))
    print(f"by language: {flags.output / RECORD_FILE}")


def with_one_spelling(flags: Flags) -> Flags:
    """The flags with their languages as `canonical_language` spells them. Raises UserError."""
    original, notes = parse_languages(flags.original_languages, "--original-languages")
    expanded, more = parse_languages(flags.expanded_languages, "--expanded-languages")
    for note in (*notes, *more):
        print(f"note: {note}")
    return dataclasses.replace(flags, original_languages=original, expanded_languages=expanded)


def check_places(flags: Flags) -> None:
    """What else lm_eval, or the end of this program, would find only after hours. Raises UserError."""
    if flags.include_path is not None and not flags.include_path.is_dir():
        raise UserError(f"--include-path {flags.include_path}: no such directory")
    launcher = shlex.split(flags.launcher)
    if launcher and not flags.dry_run and shutil.which(launcher[0]) is None:
        raise UserError(f"--launcher: there is no command {launcher[0]}")
    if flags.output.exists() and not flags.output.is_dir():
        raise UserError(f"--output {flags.output}: is a file; give a directory")
    if flags.output.is_dir():
        check_output_file(flags.output / RECORD_FILE, "--output")


def evaluate(flags: Flags, chosen: list[ChosenTasks]) -> None:
    """Every benchmark of both models, one call of lm_eval each. Raises UserError."""
    launcher = shlex.split(flags.launcher)
    for model in MODELS:
        for one in chosen:
            check_replaceable(flags.output / model / one.name)
    for model in MODELS:
        for one in chosen:
            settings, output = harness_settings(flags, model, one), flags.output / model / one.name
            print(shlex.join(harness_command(launcher, settings, output)), flush=True)
            if not flags.dry_run:
                run_harness(launcher, settings, output)


def harness_settings(flags: Flags, model: str, chosen: ChosenTasks) -> dict[str, Any]:
    """lm_eval's flags for one benchmark of one model."""
    return {
        "model": flags.model,
        "model_args": ",".join(filter(None, [f"pretrained={getattr(flags, model)}", flags.model_args])),
        "tasks": ",".join(chosen.tasks.values()),
        "num_fewshot": shots_of(flags, chosen),
        "batch_size": flags.batch_size,
        "device": flags.device,
        "limit": flags.limit,
        "include_path": str(flags.include_path) if flags.include_path else None,
    }


def shots_of(flags: Flags, chosen: ChosenTasks) -> int:
    """Examples in the prompt."""
    return chosen.benchmark.shots if flags.num_fewshot is None else flags.num_fewshot


def make_record(flags: Flags, chosen: list[ChosenTasks]) -> dict[str, Any]:
    """All that was found, as a JSON object. Raises UserError."""
    benchmarks = []
    for one in chosen:
        places = {model: flags.output / model / one.name for model in MODELS}
        scores = {model: read_scores(place, one) if one.tasks else {} for model, place in places.items()}
        benchmarks.append(benchmark_record(one, flags.original_languages, shots_of(flags, one), scores))
    return {
        "lm_eval": harness_version(),
        "models": {model: str(getattr(flags, model)) for model in MODELS},
        "original_languages": flags.original_languages,
        "expanded_languages": flags.expanded_languages,
        "limit": flags.limit,
        "benchmarks": benchmarks,
    }
