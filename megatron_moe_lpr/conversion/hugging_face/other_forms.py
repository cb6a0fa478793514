"""Messages for directories that belong to a Hugging Face model but are not one that can be imported."""

import os
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE, LATEST_FILE
from megatron_moe_lpr.conversion.hugging_face.adapter import CONFIG_FILE as ADAPTER_CONFIG
from megatron_moe_lpr.conversion.hugging_face.base_model import CACHE_PREFIX, SNAPSHOTS, hub_name
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import abbreviated, read_json
from megatron_moe_lpr.files.work_directory import killed_run_hint

MOST_NAMED = 3
MERGE = (
    "merge it into its base with peft, PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(NEW), "
    "and give NEW"
)


def refuse_other_directories(path: Path) -> None:
    """Refuse a path that is not the directory of a whole model.

    Raises:
        UserError: the message says what the path is, and which path to give or what to do instead.
    """
    if path.is_file():
        raise UserError(f"{path}: is a file; give the directory that holds config.json and the safetensors weights")
    if not path.is_dir():
        hint = killed_run_hint(path)
        raise UserError(f"{path}: no such directory; a Hugging Face model directory is expected{hint}")
    _refuse_adapter(path)
    if (path / CONFIG_FILE).is_file():
        return
    _refuse_hub_cache(path)
    if (path / LATEST_FILE).is_file():
        raise UserError(f"{path}: is a Megatron checkpoint already; training, expand and export take it by --load")
    raise UserError(f"{path / CONFIG_FILE}: no such file{_without_config(path)}")


def other_weights(path: Path) -> str:
    """Return the end of a message about a directory without readable weights: what it holds, and what to do."""

    def has(*patterns: str) -> bool:
        return any(file for pattern in patterns for file in path.glob(pattern))

    if has("*.bin") or (has("*.pt", "*.pth") and not has("consolidated*")):
        return (
            ": only pickled weights (.bin) here; they can run code and are not read; rewrite them as safetensors with "
            "transformers: model.save_pretrained(DIR)"
        )
    if has("*.gguf"):
        return (
            ": only GGUF here, llama.cpp's form; give the model that it was made of, or the GGUF file itself, whose "
            "quantised weights stay rounded"
        )
    if has("consolidated*"):
        return (
            ": only consolidated weights here, the maker's own form; download the Hugging Face form "
            "(model*.safetensors of the same repository), or convert them with convert_mistral_weights_to_hf.py "
            "or convert_llama_weights_to_hf.py of transformers' source repository"
        )
    if has("model-*-of-*.safetensors"):
        return ": the shards are here and their index, model.safetensors.index.json, is not; copy it too"
    if has("*.h5", "*.msgpack", "*.npz"):
        return ": only weights for TensorFlow, JAX or MLX here; save them as safetensors with transformers"
    if download := _complete_download(path):
        return f": no weights here yet, {download}"
    others = sorted(file.name for file in path.glob("*.safetensors"))
    named = f"; {', '.join(others[:MOST_NAMED])} is not read: rename it if it is the whole model" if others else ""
    return f": neither model.safetensors.index.json nor model.safetensors is here{named}"


def _without_config(path: Path) -> str:
    if any(path.glob("adapter_model*")):
        return f", and adapter_model is an adapter's: {MERGE}; a whole model's directory is expected"
    if any(path.glob("*.safetensors")) and not any(path.glob("consolidated*")):
        return f", but weights are there; {_complete_download(path) or 'copy it from where they come from'}"
    inside = sorted(child for child in path.iterdir() if (child / CONFIG_FILE).is_file())
    if inside:
        return f" there; give the directory that has one: {_named(inside)}"
    return other_weights(path)


def _complete_download(path: Path) -> str:
    """Return how to complete a snapshot in the hub's cache; empty for another directory."""
    absolute = Path(os.path.abspath(path))
    name = hub_name(absolute.parent.parent.name) if absolute.parent.name == SNAPSHOTS else None
    if name is None:
        return ""
    return f"the download was not complete: `hf download {name} --revision {absolute.name}` goes on with it"


def _refuse_adapter(path: Path) -> None:
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        return
    config = read_json(file)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    of = f" over {abbreviated(base, 100)}" if isinstance(base, str) and base else ""
    if kind == "MOE":
        raise UserError(
            f"{path}: is an adapter of the authors' implementation{of}: give it by --adapter, its base by --hf"
        )
    if (path / CONFIG_FILE).is_file() and any(path.glob("model*.safetensors")):
        raise UserError(
            f"{path}: holds a whole model and an adapter ({file.name}, {abbreviated(kind)}{of}), and transformers "
            f"reads the adapter and its base: move {file.name} away to import the model, or {MERGE}"
        )
    raise UserError(f"{path}: is an adapter ({abbreviated(kind)}{of}), not a model: {MERGE}")


def _refuse_hub_cache(path: Path) -> None:
    """Refuse the hub's cache (`~/.cache/huggingface` or its `hub`), and folders of a model in it."""
    for root in (path, path.parent):
        if (root / SNAPSHOTS).is_dir() and (root == path or hub_name(root.name)):
            raise UserError(
                f"{path}: is a folder of the hub's cache, not the model itself: " + _give(_snapshots(root), root.name)
            )
    for cache in (path, path / "hub"):
        models = sorted(cache.glob(f"{CACHE_PREFIX}*")) if cache.is_dir() else []
        if models:
            found = [snapshot for model in models for snapshot in _snapshots(model)[:1]]
            raise UserError(f"{path}: is the hub's cache of {len(models)} models: {_give(found, models[0].name)}")


def _snapshots(root: Path) -> list[Path]:
    """Return the snapshots in a model's folder of the hub's cache, the one of the branch main first."""
    found = sorted(file.parent for file in (root / SNAPSHOTS).glob(f"*/{CONFIG_FILE}"))
    main = root / "refs" / "main"
    commit = main.read_text(errors="replace").strip() if main.is_file() and main.stat().st_size < 100 else ""
    return sorted(found, key=lambda snapshot: snapshot.name != commit)


def _give(snapshots: list[Path], folder: str) -> str:
    if snapshots:
        return f"give a snapshot in it: {_named(snapshots)}"
    return f"no snapshot in it has a {CONFIG_FILE}; download the model, `hf download {hub_name(folder) or 'NAME'}`"


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(map(str, paths[:MOST_NAMED])) + more
