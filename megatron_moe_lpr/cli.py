"""The installed command `moe-lpr`: every step from a dense model to an exported MoE, one subcommand each."""

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence

from megatron_moe_lpr import __version__
from megatron_moe_lpr.errors import fail, run_command
from megatron_moe_lpr.program import NAME

# A subcommand's module is imported only when it runs, so that --help and wrong flags do not wait for torch.


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand of `moe-lpr`."""

    name: str
    module: str
    """Module below megatron_moe_lpr whose `main` runs it."""
    summary: str


COMMANDS = (
    Command("download", "commands.download", "fetch the paper's corpora from the Hugging Face hub"),
    Command("plan", "commands.plan", "find parallel layouts that fit into GPU memory, and what they send"),
    Command("rehearse", "commands.rehearse", "go through a run as single ranks of a cluster, without the cluster"),
    Command("allocate", "commands.allocate", "measure how many experts each layer should get"),
    Command("extend-tokenizer", "commands.extend_tokenizer", "add tokens for new languages to a model's tokenizer"),
    Command("import", "commands.convert", "upcycle a dense Hugging Face model to a MoE checkpoint"),
    Command("verify", "commands.convert", "compare a checkpoint's logits with the Hugging Face model's"),
    Command("inspect", "commands.convert", "summarise a checkpoint or a Hugging Face directory"),
    Command("preprocess", "commands.preprocess", "turn text into indexed datasets, one language each"),
    Command("merge-datasets", "commands.merge_datasets", "join datasets, for example of a SLURM array"),
    Command("inspect-data", "commands.inspect_data", "show what is in datasets, and verify them"),
    Command("build-index", "commands.build_index", "build a run's index maps beforehand, without GPUs"),
    Command("train", "pretrain", "run a stage of training as one rank (torchrun or launch start several)"),
    Command("launch", "launch", "start ranks: moe-lpr launch --nproc-per-node 8 train --stage 1 ..."),
    Command("evaluate", "commands.evaluate", "loss, bits per byte and routing by language of a checkpoint"),
    Command("generate", "commands.generate", "continue a prompt, or converse, with a checkpoint or an export"),
    Command("expand", "commands.convert", "add experts for a second group of languages"),
    Command("graft", "commands.convert", "put an instruct model in the base model's place, without training"),
    Command("export", "commands.convert", "write a stock Hugging Face model from a checkpoint"),
    Command("benchmarks", "commands.benchmarks", "run multilingual benchmarks by lm_eval on exported models"),
    Command("report", "commands.report", "compare evaluations in one HTML file"),
)
"""Subcommands in the order in which a user needs them."""
OWN_WRAPPER = ("pretrain", "launch")
"""Modules whose `main` itself turns errors into exit codes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand that the first argument names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        run_command(lambda: print(help_page()))
        return
    if words[0] == "--version":
        print(f"{NAME} {__version__}")
        return
    found = {command.name: command for command in COMMANDS}.get(words[0])
    if found is None:
        fail(_unknown(words[0]), code=2)
    _run(found, words[1:])


def help_page() -> str:
    """Return the text of --help, one screen with every subcommand."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            f"usage: {NAME} COMMAND ...",
            "Teach a language model new languages without losing the ones it knows (MoE-LPR, arXiv 2408.11396).",
            "",
            *lines,
            f"{NAME} COMMAND --help lists the flags of a command, {NAME} --version the version.",
        ]
    )


def _run(command: Command, arguments: list[str]) -> None:
    module = importlib.import_module(f"megatron_moe_lpr.{command.module}")
    # tyro reads the program's name for its usage line from sys.argv[0].
    if command.module == "commands.convert":
        sys.argv = [NAME, command.name, *arguments]
    else:
        sys.argv = [f"{NAME} {command.name}", *arguments]
    if command.module in OWN_WRAPPER:
        module.main()
    else:
        run_command(module.main)


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, [command.name for command in COMMANDS], n=1)
    advice = f"did you mean {near[0]}? " if near else ""
    return f"{NAME}: there is no command {word!r}; {advice}{NAME} --help lists them"


if __name__ == "__main__":
    main()
