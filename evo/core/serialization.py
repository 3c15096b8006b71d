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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evo._version import __version__
from evo.core.composition import composition, differences, shared_tensors
from evo.core.config import EvoConfig
from evo.core.shards import Shards, write_tensors
from evo.core.sizes import blueprint
from evo.core.transformer import Transformer
from evo.files import read_json, sha256, write_json
from evo.schedules import from_config

if TYPE_CHECKING:
    from evo.core.model import Evo

FORMAT = 1
_CONFIG_LIMIT = 1 << 20
_WEIGHTS = r"model-[0-9a-f]{12}\.safetensors"


def save_pretrained(model: Evo, path: str | os.PathLike[str]) -> None:
    """Write weights and config to a directory, which is made if it is not there.

    The config is that of the model as it is now. Where no config builds such a model, what it is made of is written instead, and it is
    loaded into one composed alike. A tensor that has several names is written once.

    Raises:
        ValueError: for a model of which this process has but some blocks.
    """
    if isinstance(model.backbone, Transformer) and model.backbone.relay is not None:
        raise ValueError(
            "this process has only some of the model's blocks, the others are in other pipeline stages: save a checkpoint, "
            "which all stages write together, and export that"
        )
    write_pretrained(path, _each_alone(model), current_config(model), composition(model))


def write_pretrained(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    config: EvoConfig | None,
    composed: Mapping[str, str],
) -> None:
    """Write a model that is not built here: its tensors, each under its first name alone; its config; and its composition."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / f".{secrets.token_hex(8)}.tmp"
    try:
        write_tensors(scratch, weights)
        digest = sha256(scratch)
        name = f"model-{digest[:12]}.safetensors"
        os.replace(scratch, directory / name)
        described = dict(composed) if config is None else config.to_json()
        manifest = {
            "format": FORMAT,
            "evo": __version__,
            "weights": name,
            "sha256": digest,
            "config": None if config is None else described,
            "composition": described if config is None else None,
            "config_sha256": _json_sha256(described),
        }
        write_json(directory / "config.json", manifest)
    finally:
        scratch.unlink(missing_ok=True)
    for old in directory.iterdir():
        if old.name != name and re.fullmatch(_WEIGHTS, old.name):
            old.unlink()


def current_config(model: Evo) -> EvoConfig | None:
    """The config that builds a model such as this one is now; None where there is none, since parts were composed or replaced by hand."""
    if model.config is None:
        return None
    config, schedule = replace(model.config, context=model.context), model.schedule.config()
    if from_config(config.schedule).config() != schedule:
        config = replace(config, schedule=schedule)
    try:
        with torch.device("meta"):
            built = config.build()
    except ValueError:  # a schedule of one's own
        return None
    alike = composition(built) == composition(model) and _shapes(built) == _shapes(model)
    return config if alike else None


def load_pretrained(path: str | os.PathLike[str], into: Evo | None = None) -> Evo:
    """The model of a directory, or its weights put into a model composed alike: of the same parts with the same options, see `composition`.

    What the config asks for is compared with what the header of the weights announces, and that with the size of the file, before
    anything is built or read: a config cannot ask for memory that the file does not fill.

    Raises:
        FileNotFoundError: if there is no model there, or its weights are missing.
        ValueError: for a config or weights that are damaged, altered, or of another model.
    """
    directory = Path(path)
    manifest = _read_manifest(directory)
    config = None if manifest["config"] is None else EvoConfig.from_json(manifest["config"])
    if into is None and config is None:
        raise ValueError(
            f"the model in {directory} was composed by hand, or parts of it were replaced: "
            f"compose it again and call its load_weights({str(directory)!r})"
        )
    weights = directory / manifest["weights"]
    shards = Shards.open(directory, weights.name)
    if config is not None:
        if config.depth > len(shards.shapes):
            raise ValueError(
                f"{weights} holds {len(shards.shapes)} tensors, config.json asks for {config.depth} blocks: the weights of another model"
            )
        _check_same(blueprint(config), shards, weights)
    if into is None:
        assert config is not None
        _check_digest(weights, manifest["sha256"])
        return assemble(config, {name: shards.read(name) for name in shards})
    again = shared_tensors(into)
    _check_same({name: tensor for name, tensor in into.state_dict().items() if name not in again}, shards, weights)
    if wrong := differences(manifest["composition"] if config is None else _composed(config), composition(into)):
        raise ValueError(f"{directory} holds a model that was composed otherwise: {wrong}. Compose this one alike")
    _check_digest(weights, manifest["sha256"])
    found = {name: shards.read(name) for name in shards}
    into.load_state_dict(found | {name: found[first] for name, first in again.items()})
    return into.eval()


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
    # The folder of a run has a config.json of its own, and its model in a folder within.
    within = directory / "model"
    hint = f"; there is a model in {within}" if (within / "config.json").is_file() else ""
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {directory}: it has no config.json; save one there with model.save_pretrained{hint}"
        )
    manifest = read_json(file, _CONFIG_LIMIT)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        if isinstance(manifest, dict) and "architectures" in manifest:
            hint = "; a model of transformers is read by evo.interop.from_pretrained"
        raise ValueError(f"{file} is not a model config of format {FORMAT}, the one this version of evo reads{hint}")
    needed = {"weights": str, "sha256": str, "config": (dict, type(None)), "config_sha256": str}
    if manifest.get("config") is None:
        needed["composition"] = dict
    for name, kind in needed.items():
        if not isinstance(manifest.get(name, ...), kind):
            raise ValueError(f"{file} has {name}={manifest.get(name)!r}; the file was altered or is not a model config")
    described = manifest["composition"] if manifest["config"] is None else manifest["config"]
    if _json_sha256(described) != manifest["config_sha256"]:
        raise ValueError(
            f"{file} is damaged or was altered: its config does not have the digest beside it. Copy it again; "
            "to change a model, load it, build the one that you want, and give that the weights by load_state_dict"
        )
    if not re.fullmatch(_WEIGHTS, manifest["weights"]):
        raise ValueError(
            f"{file} names the weights {manifest['weights']!r}; a file beside it called model-<digest>.safetensors is needed"
        )
    return manifest


def _each_alone(model: Evo) -> dict[str, Tensor]:
    """The tensors of a model, each once and in memory that it shares with no other."""
    again, memory = shared_tensors(model), set()
    found = {}
    for name, value in model.state_dict().items():
        if name in again:
            continue
        whole = value.detach().contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in memory else whole
        memory.add(place)
    return found


def _composed(config: EvoConfig) -> dict[str, str]:
    with torch.device("meta"):
        return composition(config.build())


def _shapes(model: Evo) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


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
