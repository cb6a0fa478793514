"""Stage others: what else one would do with the same text, and the list of all models."""

from examples.real.base import BASE
from examples.real.flow import Flow
from examples.real.mixture import EXTENDED, OLD_TOKENS, extend
from examples.real.text import prefix, steps_of_one_pass
from examples.real.tokenizer import OLD
from megatron_moe_lpr.files.json_files import write_json

FULL, LORA = "full fine-tuning", "LoRA"
SCRIPT = "examples/demo/lora.py"


def others(flow: Flow) -> None:
    """Train on the same documents: all weights of the dense model, LoRA adapters, a mixture without new tokens."""
    full_fine_tuning(flow)
    lora(flow)
    extend(flow, OLD_TOKENS)
    write_models(flow)


def full_fine_tuning(flow: Flow) -> None:
    """Fine-tune all weights of the dense model on the new languages alone, without replay, as most do."""
    settings = flow.settings
    data = [prefix(flow, OLD, language) for language in settings.expanded]
    iters = steps_of_one_pass(flow, OLD, settings.expanded)
    full = flow.train("full", f"{FULL} of the dense model", "full", flow.runs / BASE, data, iters, settings.full)
    flow.export(full, "full", FULL)


def lora(flow: Flow) -> None:
    """Train LoRA adapters on the same windows, and add them to the weights."""
    settings, save = flow.settings, flow.settings.hf("lora")
    training = flow.common_flags()
    words: list[object] = ["--hf", settings.hf(BASE), "--save", save, "--state", flow.runs / "lora.pt"]
    words += ["--data-path", *(prefix(flow, OLD, language) for language in settings.expanded)]
    words += ["--train-iters", steps_of_one_pass(flow, OLD, settings.expanded), f"--{settings.precision}"]
    for name in ("global_batch_size", "seq_length", "log_interval", "save_interval", "seed"):
        words += [f"--{name.replace('_', '-')}", training[name]]
    for name, value in settings.lora.items():
        words += [f"--{name.replace('_', '-')}", value]
    flow.step(save / "config.json", f"{LORA} of the dense model", lambda: flow.python(SCRIPT, *words, **flow.threads))


def write_models(flow: Flow) -> None:
    """Write RUNS/models.json: name, Hugging Face directory, checkpoint and kind of all models, in a table's order."""
    rows = [
        ("base", BASE, BASE, "dense"),
        (FULL, "full", "full", "dense"),
        (LORA, "lora", None, "dense"),
        *((one.title, one.name, f"{one.name}/stage2", "mixture") for one in (OLD_TOKENS, EXTENDED)),
    ]
    models = [
        {
            "name": name,
            "hf": str(flow.settings.hf(hf)),
            "megatron": str(flow.runs / megatron) if megatron else None,
            "kind": kind,
        }
        for name, hf, megatron, kind in rows
    ]
    write_json(models, flow.runs / "models.json")
