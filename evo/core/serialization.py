"""A model on disk: `config.json` and a safetensors file that it names and vouches for.

The weights are written under a name of their own and the config is replaced last, in one step: whatever moment a process is
killed at, the directory holds the old model or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evo._version import __version__
from evo.core.config import EvoConfig
from evo.core.files import read_json, sha256, sync, write_json
from evo.core.shards import Shards
from evo.core.sizes import blueprint
from evo.core.transformer import Transformer
from evo.schedules import from_config

if TYPE_CHECKING:
    from evo.core.model import Evo

FORMAT = 1
_CONFIG_LIMIT = 1 << 20
_WEIGHTS = r"model-[0-9a-f]{12}\.safetensors"


def save_pretrained(model: Evo, path: str | os.PathLike[str]) -> None:
    """Write weights and config to a directory, which is made if it is not there.

    Raises:
        ValueError: for a model of which this process has but some blocks.
    """
    if isinstance(model.backbone, Transformer) and model.backbone.relay is not None:
        raise ValueError(
            "this process has only some of the model's blocks, the others are in other pipeline stages: save a checkpoint, "
            "which all stages write together, and export that"
        )
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / f".{secrets.token_hex(8)}.tmp"
    try:
        # safetensors makes files that nobody else may read; a model gets the permissions of any other new file.
        scratch.touch()
        mode = scratch.stat().st_mode
        save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, scratch)
        scratch.chmod(mode)
        digest = sha256(scratch)
        weights = f"model-{digest[:12]}.safetensors"
        sync(scratch)
        os.replace(scratch, directory / weights)
        config = None if model.config is None else model.config.to_json()
        manifest = {
            "format": FORMAT,
            "evo": __version__,
            "weights": weights,
            "sha256": digest,
            "config": config,
            "config_sha256": _json_sha256(config),
        }
        write_json(directory / "config.json", manifest)
    finally:
        scratch.unlink(missing_ok=True)
    for old in directory.iterdir():
        if old.name != weights and re.fullmatch(_WEIGHTS, old.name):
            old.unlink()


def load_pretrained(path: str | os.PathLike[str], into: Evo | None = None) -> Evo:
    """The model of a directory, or its weights put into a model composed alike.

    What the config asks for is compared with what the header of the weights announces, and that with the size of the file, before
    anything is built or read: a config cannot ask for memory that the file does not fill.

    Raises:
        FileNotFoundError: if there is no model there, or its weights are missing.
        ValueError: for a config or weights that are damaged, altered, or of another model.
    """
    directory = Path(path)
    manifest = _read_manifest(directory)
    if into is None and manifest["config"] is None:
        raise ValueError(
            f"the model in {directory} was composed by hand: compose it again and call its load_weights({str(directory)!r})"
        )
    weights = directory / manifest["weights"]
    shards = Shards.open(directory, weights.name)
    if into is not None:
        _check_same(into.state_dict(), shards, weights)
        _check_digest(weights, manifest["sha256"])
        into.load_state_dict({name: shards.read(name) for name in shards})
        return into.eval()
    config = EvoConfig.from_json(manifest["config"])
    if config.depth > len(shards.shapes):
        raise ValueError(
            f"{weights} holds {len(shards.shapes)} tensors, config.json asks for {config.depth} blocks: the weights of another model"
        )
    _check_same(blueprint(config), shards, weights)
    _check_digest(weights, manifest["sha256"])
    return assemble(config, {name: shards.read(name) for name in shards})


def assemble(config: EvoConfig, weights: Mapping[str, Tensor]) -> Evo:
    """The model of a config around these weights, in their dtypes and the memory they are in, in evaluation mode.

    Raises:
        RuntimeError: where they are not the weights of such a model.
    """
    # Without memory or random numbers for weights that would be thrown away.
    with torch.device("meta"):
        model = config.build()
    model.schedule = from_config(config.schedule)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval()


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {directory}: it has no config.json; save one there with model.save_pretrained"
        )
    manifest = read_json(file, _CONFIG_LIMIT)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not a model config of format {FORMAT}, the one this version of evo reads")
    needed = {"weights": str, "sha256": str, "config": (dict, type(None)), "config_sha256": str}
    for name, kind in needed.items():
        if not isinstance(manifest.get(name, ...), kind):
            raise ValueError(f"{file} has {name}={manifest.get(name)!r}; the file was altered or is not a model config")
    if _json_sha256(manifest["config"]) != manifest["config_sha256"]:
        raise ValueError(
            f"{file} is damaged or was altered: its config does not have the digest beside it. Copy it again; "
            "to change a model, build one from an EvoConfig and give it the weights by load_weights"
        )
    if not re.fullmatch(_WEIGHTS, manifest["weights"]):
        raise ValueError(
            f"{file} names the weights {manifest['weights']!r}; a file beside it called model-<digest>.safetensors is needed"
        )
    return manifest


def _check_digest(file: Path, expected: str) -> None:
    digest = sha256(file)
    if digest != expected:
        raise ValueError(
            f"{file} has sha256 {digest}, config.json says {expected}: the file is damaged or was altered; copy it again"
        )


def _check_same(expected: Mapping[str, Tensor], found: Shards, file: Path) -> None:
    """That a file holds what a model needs; weights may be of any precision from 16 bits."""
    missing, surplus = sorted(expected.keys() - found.shapes.keys()), sorted(found.shapes.keys() - expected.keys())
    other = [
        f"{name} {found.shapes[name]} {found.dtypes[name]} instead of {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in expected.items()
        if name in found.shapes
        and not (found.shapes[name] == tensor.shape and _serves(found.dtypes[name], tensor.dtype))
    ]
    if missing or surplus or other:
        raise ValueError(
            f"{file} holds the weights of another model: missing {missing[:4]}, surplus {surplus[:4]}, of other shapes {other[:4]}"
        )


def _serves(found: torch.dtype, needed: torch.dtype) -> bool:
    if needed.is_floating_point:
        return found.is_floating_point and found.itemsize >= 2
    return found == needed


def _json_sha256(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
