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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from evo._version import __version__
from evo.core.config import EvoConfig
from evo.core.files import sha256, sync, write_json
from evo.schedules import from_config

if TYPE_CHECKING:
    from evo.core.model import Evo

FORMAT = 1
_CONFIG_LIMIT = 1 << 20
_WEIGHTS = r"model-[0-9a-f]{12}\.safetensors"


def save_pretrained(model: Evo, path: str | os.PathLike[str]) -> None:
    """Write weights and config to a directory, which is made if it is not there."""
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

    Raises:
        FileNotFoundError: if there is no model there.
        ValueError: for a config or weights that are damaged, altered, or of another model.
    """
    directory = Path(path)
    manifest = _read_manifest(directory)
    if into is None and manifest["config"] is None:
        raise ValueError(
            f"the model in {directory} was composed by hand: compose it again and call its load_weights({str(directory)!r})"
        )
    weights = directory / manifest["weights"]
    if not weights.is_file():
        raise ValueError(
            f"{directory / 'config.json'} names {weights.name}, which is not there: copy the directory whole"
        )
    digest = sha256(weights)
    if digest != manifest["sha256"]:
        raise ValueError(
            f"{weights} has sha256 {digest}, config.json says {manifest['sha256']}: the file is damaged or was altered; copy it again"
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}") from error
    if into is not None:
        _check_same(into, state, weights)
        into.load_state_dict(state)
        return into.eval()
    config = EvoConfig.from_json(manifest["config"])
    # Without memory or random numbers for weights that would be thrown away; every tensor then comes from the file, in its own dtype.
    with torch.device("meta"):
        model = config.build()
    model.schedule = from_config(config.schedule)
    _check_same(model, state, weights)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {directory}: it has no config.json; save one there with model.save_pretrained"
        )
    if file.stat().st_size > _CONFIG_LIMIT:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; a model config has at most {_CONFIG_LIMIT}")
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): the file was cut short or altered; copy it again") from error
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


def _check_same(model: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected == found:
        return
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    raise ValueError(
        f"{file} holds the weights of another model: missing {missing[:4]}, surplus {surplus[:4]}, of other shapes {other[:4]}"
    )


def _json_sha256(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
