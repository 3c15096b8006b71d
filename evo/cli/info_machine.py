"""What `evo info` says of presets, versions and this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from evo._version import __version__
from evo.core import PRESETS
from evo.core.config import preset
from evo.core.sizes import one_block
from evo.text import ByteTokenizer
from evo.training.memory import Parameters
from evo.training.precision import multiplies_bf16, pick_device


def facts(vocab_size: int) -> dict[str, Any]:
    """Versions, the machine, and the presets with two counts of parameters: of bytes and of this vocabulary."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "vocab_size": vocab_size,
        "presets": {name: _size(name, vocab_size) for name in PRESETS},
    }


def table(found: dict[str, Any]) -> str:
    """Three short tables."""
    lines = ["versions", *(f"  {name:<14}{version}" for name, version in found["versions"].items())]
    lines += ["", "machine", *(f"  {name:<14}{value}" for name, value in found["machine"].items())]
    columns = ("width", "depth", "heads", "latent", "context")
    head = "".join(f"{column:>9}" for column in columns)
    large = f"V = {found['vocab_size']}"
    lines += ["", f"{'preset':<8}{head}{'bytes':>11}{large:>13}   parameters"]
    for name, size in found["presets"].items():
        row = "".join(f"{size[column]:>9}" for column in columns)
        lines.append(f"{name:<8}{row}{readable(size['parameters_bytes']):>11}{readable(size['parameters']):>13}")
    return "\n".join(lines)


def readable(count: float) -> str:
    """A count in billions or millions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _versions() -> dict[str, str]:
    packages = ("torch", "torchdiffeq", "safetensors")
    return {"evo": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _machine() -> dict[str, str]:
    device = pick_device("auto")
    accelerator = "none" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        accelerator = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}",
        "accelerator": accelerator,
        "precision": "bf16 autocast" if multiplies_bf16(device) else "fp32 (bf16 products would not be faster)",
        "xformers": "installed" if importlib.util.find_spec("xformers") else "not installed",
    }


def _size(name: str, vocab_size: int) -> dict[str, int]:
    config = preset(name, vocab_size=vocab_size)
    return {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "latent": one_block(config).latent_space.dim,
        "context": config.context,
        "parameters_bytes": Parameters.of(preset(name, vocab_size=ByteTokenizer.vocab_size)).total,
        "parameters": Parameters.of(config).total,
    }
