"""Train a stage on this node by a recipe: what train.sh runs, which lists the variables that override the recipe.

python examples/train.py RECIPE [FLAG...]
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_lpr.data.manifest import read_manifest
from megatron_moe_lpr.data.reading.blend import parse_blend
from megatron_moe_lpr.errors import UserError, run_command
from megatron_moe_lpr.training.configuration.config import TrainingConfig
from megatron_moe_lpr.training.configuration.config_file import parse_training_flags, read_config_file
from megatron_moe_lpr.training.configuration.rank_counts import describe_fitting, fitting_nodes, why_not_on

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
FLAGS = {
    "LOAD": "--load",
    "SAVE": "--save",
    "SEQ_LENGTH": "--seq-length",
    "GLOBAL_BATCH": "--global-batch-size",
    "MICRO_BATCH": "--micro-batch-size",
    "LR": "--lr",
    "SAVE_INTERVAL": "--save-interval",
    "LOG_INTERVAL": "--log-interval",
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "EP": "--expert-model-parallel-size",
}
"""Variable to flag. An empty variable leaves the recipe's value."""
RECOMPUTE = {
    "moe": ["--recompute-granularity", "selective", "--recompute-modules", "moe"],
    "full": ["--recompute-granularity", "full"],
}
DATASET = re.compile(r"(?P<directory>.*/)?(?P<part>[a-z]+)-(?P<language>[^/]+)")
"""A prefix as preprocess.sh writes it, such as datasets/llama3-8b/train-el."""
PARTS = ("train", "review", "valid")
"""What preprocess.sh writes of each language."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Nodes of the run and their devices."""

    platform: str
    ranks_per_node: int
    nodes: int
    gpu_memory: str
    """GiB of one GPU, for the estimate."""


def main() -> None:
    """Check, show and start a training; under DRY_RUN=1 only check and show it."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError(f"give a recipe: a file, or one of {', '.join(_names())}")
    recipe, flags = find_recipe(sys.argv[1]), sys.argv[2:]
    machine = find_machine(os.environ)
    words = run_flags(recipe, os.environ, flags)
    config = parse_training_flags(words)
    check_inputs(config)
    dry_run = os.environ.get("DRY_RUN") == "1"
    least = _number(os.environ, "MIN_NODES", 0)
    if least:
        machine = use_nodes(config, machine, least)
    # Inside a step of a SLURM job the batch script has shown and checked this already, once for all nodes.
    if dry_run or not os.environ.get("SLURM_STEP_ID"):
        estimate(config, machine)
        if 0 < least < machine.nodes:
            check_memory(config, machine, least)
    save = config.checkpoint.save
    logs = Path(os.environ.get("LOG_DIR") or save / "logs") / f"node{os.environ.get('SLURM_NODEID', '0')}"
    command = launch_command(machine, logs, words)
    print(shlex.join(command), flush=True)
    if file := os.environ.get("SAVE_FILE"):
        # A batch script that needs these cannot read them back from the command that is shown.
        Path(file).write_bytes(os.fsencode(save) + b"\0%d\0" % machine.nodes)
    if not dry_run:
        logs.mkdir(parents=True, exist_ok=True)
        # exec keeps the process number: `kill -USR1` it, and the run saves and stops.
        (logs / "launcher.pid").write_text(f"{os.getpid()}\n")
        os.execvp(command[0], command)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, which is a path or a name in recipes/."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(f"{name}: neither a file nor a recipe; there are {', '.join(_names())}")


def find_machine(environment: Mapping[str, str]) -> Machine:
    """Return what the variables say of the machine, and nvidia-smi of the rest."""
    platform = environment.get("PLATFORM") or "cuda"
    if platform not in ("cuda", "cpu"):
        raise UserError(f"PLATFORM={platform}: cuda or cpu")
    nodes = _number(environment, "NUM_NODES", int(environment.get("SLURM_NNODES") or 1))
    if platform == "cpu":
        return Machine("cpu", _number(environment, "GPUS_PER_NODE", 1), nodes, environment.get("GPU_MEMORY") or "80")
    memory = _gpu_memory()
    ranks = _number(environment, "GPUS_PER_NODE", len(memory))
    if ranks > len(memory):
        raise UserError(f"GPUS_PER_NODE={ranks}, but {os.uname().nodename} has {len(memory)}")
    return Machine("cuda", ranks, nodes, environment.get("GPU_MEMORY") or f"{memory[0] / 1024:.1f}")


def run_flags(recipe: Path, environment: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """Return the flags of `moe-lpr train`: the recipe, then what the variables override, then the flags given."""
    values = read_config_file(recipe)
    changed = [word for name, flag in FLAGS.items() if environment.get(name) for word in (flag, environment[name])]
    changed += [
        *data_flags(values, environment),
        *_precision_flags(environment),
        *_recompute_flags(values, environment),
    ]
    start = ["--config", str(recipe), *changed]
    iterations = environment.get("TRAIN_ITERS")
    if iterations == "epoch":
        counted = parse_training_flags([*start, "--train-iters", "1", *flags])
        check_inputs(counted)
        iterations = str(one_epoch(counted))
    return [*start, *(("--train-iters", iterations) if iterations else ()), *flags]


def data_flags(values: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Return the flags of the datasets where DATA, EXPANDED or ORIGINAL override the recipe's.

    Args:
        values: the recipe's flags; its datasets are named DIRECTORY/PART-LANGUAGE.
    """
    if not any(environment.get(name) for name in ("DATA", "EXPANDED", "ORIGINAL")):
        return []
    training = [_dataset(entry) for entry in values.get("data_path", []) if not _is_weight(entry)]
    weights = [str(entry) for entry in values.get("data_path", []) if _is_weight(entry)]
    validation = [_dataset(entry) for entry in values.get("valid_data_path", [])]
    known = [str(language) for language in values.get("original_languages", [])]
    original = environment["ORIGINAL"].split() if environment.get("ORIGINAL") else known
    learned = list(dict.fromkeys(one["language"] for one in training if one["language"] not in known))
    expanded = environment["EXPANDED"].split() if environment.get("EXPANDED") else learned
    if not expanded or not original:
        raise UserError(
            f"EXPANDED={' '.join(expanded)!r} ORIGINAL={' '.join(original)!r}: name languages, as in 'el hu'"
        )
    if len(set(weights)) > 1:
        raise UserError("DATA, EXPANDED and ORIGINAL: the recipe's datasets have different weights; give --data-path")
    is_replayed = any(one["language"] in known for one in training)
    trained = _prefixes(training, [*original, *expanded] if is_replayed else expanded, environment)
    flags = ["--data-path", *(word for prefix in trained for word in (*weights[:1], prefix))]
    if validation:
        flags += ["--valid-data-path", *_prefixes(validation, [*expanded, *original], environment)]
    return [*flags, "--original-languages", *original]


def one_epoch(config: TrainingConfig) -> int:
    """Return the steps that draw every token of the training data once."""
    tokens = sum(read_manifest(prefix).tokens for _, prefix in parse_blend(config.data.data_path))
    return max(1, tokens // (config.batch.global_batch_size * config.batch.seq_length))


def check_inputs(config: TrainingConfig) -> None:
    """Check that the checkpoint and the datasets are there, and name the script that writes them."""
    load = config.checkpoint.load
    if not load.exists():
        writer = {"1": "a convert_*.sh writes it", "sft": "it is SAVE of stage2_*.sh"}.get(
            config.stage.stage, "it is SAVE of stage1_*.sh"
        )
        raise UserError(f"LOAD: {load} does not exist; {writer}")
    for _, prefix in parse_blend(config.data.valid_data_path) + parse_blend(config.data.data_path):
        if not Path(f"{prefix}.idx").exists():
            writer = "preprocess.sh" if Path(prefix).name.partition("-")[0] in PARTS else "moe-lpr preprocess"
            raise UserError(f"DATA: {prefix}.idx does not exist; {writer} writes it")


def use_nodes(config: TrainingConfig, machine: Machine, least: int) -> Machine:
    """Return the machine with the most of its nodes on which the layout and the global batch come out even.

    Args:
        least: MIN_NODES, on which the run must be able to go on when nodes are lost.

    Raises:
        UserError: there are fewer nodes than `least`, or the run cannot train on so many.
    """
    ranks, nodes = machine.ranks_per_node, machine.nodes
    if nodes < least:
        raise UserError(f"MIN_NODES={least}: more than the number of nodes, {nodes}; submit with --nodes={least}-MOST")
    if reason := why_not_on(config, least * ranks):
        raise UserError(f"MIN_NODES={least}: {reason}; {describe_fitting(config, ranks, max(nodes, 2 * least))}")
    used = fitting_nodes(config, ranks, range(least, nodes + 1))[-1]
    if used < nodes:
        reason = why_not_on(config, nodes * ranks)
        print(f"note: {used} of {nodes} nodes train, the others stay idle; all {nodes} cannot: {reason}", flush=True)
    return dataclasses.replace(machine, nodes=used)


def check_memory(config: TrainingConfig, machine: Machine, least: int) -> None:
    """Check that the run fits into memory on `least` nodes too, where each GPU holds more of the optimizer's state.

    Raises:
        UserError: it does not.
    """
    command = plan_command(config, dataclasses.replace(machine, nodes=least))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["tools/plan.py failed"])[-1].removeprefix("error: ")
        raise UserError(f"MIN_NODES={least}: {said}; give a larger MIN_NODES")


def estimate(config: TrainingConfig, machine: Machine) -> None:
    """Print layout and memory of the run by tools/plan.py; where they do not fit, this process ends with its code."""
    code = subprocess.run(plan_command(config, machine)).returncode
    if code:
        sys.exit(code)


def plan_command(config: TrainingConfig, machine: Machine) -> list[str]:
    """Return the command that plans the run on the machine."""
    layout, batch, precision = config.layout, config.batch, config.compute
    number_format = "bf16" if machine.platform == "cuda" or precision.bf16 else "fp32"
    # Of several recomputed modules the plan takes one: its estimate is then too large, not too small.
    recompute = {None: "none", "full": "full"}.get(
        precision.recompute_granularity, (precision.recompute_modules or ("core_attn",))[0]
    )
    flags = {
        "--load": config.checkpoint.load,
        "--stage": config.stage.stage,
        "--gpus": machine.ranks_per_node * machine.nodes,
        "--gpus-per-node": machine.ranks_per_node,
        "--gpu-memory": machine.gpu_memory,
        "--tensor-model-parallel-size": layout.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": layout.pipeline_model_parallel_size,
        "--expert-model-parallel-size": layout.expert_model_parallel_size,
        "--context-parallel-size": layout.context_parallel_size,
        "--seq-length": batch.seq_length,
        "--micro-batch-size": batch.micro_batch_size,
        "--global-batch-size": batch.global_batch_size,
        "--precision": "fp8" if precision.fp8.enabled else "fp32" if precision.fp32 else number_format,
        "--recompute": recompute,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    if not config.optimizer.use_distributed_optimizer:
        words.append("--no-use-distributed-optimizer")
    return [_python(), str(ROOT / "tools" / "plan.py"), *words]


def launch_command(machine: Machine, logs: Path, flags: Sequence[str]) -> list[str]:
    """Return the command that starts the ranks of this node."""
    launcher = {
        "--nproc-per-node": machine.ranks_per_node,
        "--nnodes": machine.nodes,
        "--node-rank": os.environ.get("SLURM_NODEID") or 0,
        "--master-addr": os.environ.get("MASTER_ADDR") or "127.0.0.1",
        "--master-port": os.environ.get("MASTER_PORT") or 29500,
        "--log-dir": logs,
        "--tee": 3,
        "--local-ranks-filter": 0,
    }
    words = [str(word) for pair in launcher.items() for word in pair]
    return [_python(), "-m", "megatron_moe_lpr.launch", *words, "-m", "megatron_moe_lpr.pretrain", *flags]


def _precision_flags(environment: Mapping[str, str]) -> list[str]:
    """Flags of the platform and its number formats. A CPU computes in the checkpoint's dtype, or in fp32."""
    flags = ["--platform", environment.get("PLATFORM") or "cuda"]
    if flags[-1] == "cpu":
        flags.append("--no-bf16")
    if environment.get("FP8", "0") not in ("", "0"):
        scaling = environment.get("FP8_RECIPE") or "delayed"
        # With a scale for each block E4M3 has the range for gradients too.
        number_format = "e4m3" if scaling == "blockwise" else "hybrid"
        flags += ["--fp8-format", number_format, "--fp8-recipe", scaling]
    return flags


def _recompute_flags(values: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    chosen = environment.get("RECOMPUTE")
    if not chosen:
        return []
    if chosen == "none":
        given = [key for key in values if key.startswith("recompute_")]
        return [word for key in given for word in (f"--{key.replace('_', '-')}", "None")]
    if chosen not in RECOMPUTE:
        raise UserError(f"RECOMPUTE={chosen}: none, moe or full")
    return RECOMPUTE[chosen]


def _dataset(prefix: str) -> re.Match[str]:
    match = DATASET.fullmatch(str(prefix))
    if match is None:
        raise UserError(f"DATA, EXPANDED and ORIGINAL: {prefix} is not DIRECTORY/PART-LANGUAGE; give --data-path")
    return match


def _prefixes(datasets: Sequence[re.Match[str]], languages: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Prefixes of these languages, otherwise named as the recipe's first dataset."""
    directory = environment.get("DATA") or (datasets[0]["directory"] or ".")
    return [str(Path(directory) / f"{datasets[0]['part']}-{language}") for language in languages]


def _is_weight(entry: Any) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if not text:
        return default
    if not re.fullmatch("[1-9][0-9]{0,9}", text):
        raise UserError(f"{name}={text}: a whole number of 1 or more is expected")
    return int(text)


def _gpu_memory() -> list[float]:
    """Memory of each GPU of this node, in MiB."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [float(line) for line in found.splitlines()]
    except (OSError, subprocess.CalledProcessError, ValueError):
        raise UserError(
            f"no GPU: nvidia-smi does not answer on {os.uname().nodename}; PLATFORM=cpu runs without one"
        ) from None


def _names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _python() -> str:
    return os.environ.get("PYTHON") or sys.executable


if __name__ == "__main__":
    run_command(main)
