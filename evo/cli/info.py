"""`evo info`: what there is to train, and what to train it on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch

from evo._version import __version__
from evo.core import PRESETS, Evo
from evo.text import ByteTokenizer
from evo.training.precision import multiplies_bf16, pick_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes and parameter counts of the presets, versions, and what this machine offers."""

    vocab_size: int = 65536
    """Vocabulary of the second count; the first is of byte-level models."""


def run(options: Options) -> None:
    """Print three short tables."""
    print("versions")
    for name, version in _versions().items():
        print(f"  {name:<14}{version}")
    print("\nmachine")
    for name, value in _machine().items():
        print(f"  {name:<14}{value}")
    columns = f"{'width':>7}{'depth':>7}{'heads':>7}{'latent':>8}{'context':>9}"
    print(f"\n{'preset':<8}{columns}{'bytes':>11}{f'V = {options.vocab_size}':>13}   parameters")
    for name in PRESETS:
        print(f"{name:<8}{_size(name, options.vocab_size)}")


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


def _size(name: str, vocab_size: int) -> str:
    # On the meta device a model has shapes and no numbers: 13 B parameters cost no memory.
    with torch.device("meta"):
        small, large = (Evo.from_preset(name, vocab_size=v) for v in (ByteTokenizer.vocab_size, vocab_size))
    backbone, heads = small.backbone, PRESETS[name]["heads"]
    counts = [_readable(sum(p.numel() for p in model.parameters())) for model in (small, large)]
    columns = f"{backbone.width:>7}{PRESETS[name]['depth']:>7}{heads:>7}{small.latent_space.dim:>8}{small.context:>9}"
    return f"{columns}{counts[0]:>11}{counts[1]:>13}"


def _readable(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
