"""The way back: a causal language model that the transformers package loads, of what an Evo says at level 0.

V vocabulary, W width.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import torch
from torch import Tensor

from evo.core import Evo
from evo.core.shards import write_tensors
from evo.files import sync, write_json
from evo.heads import LinearReadout, Readout, TiedReadout
from evo.interop.families import FAMILIES


def export_causal_lm(model: Evo, path: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` to a new directory, whole or not at all.

    The logits of the exported model behind tokens 0..i-1 are row i of `model.context_logits`. What Evo adds to a causal language model
    (levels, roles, refinement) has no place there and stays behind.

    With an attended BOS the vocabulary has one entry more, the last one, `bos_token_id`: the logits of the others behind it are
    those of `context_logits`. It is never to be generated itself, and `generation_config.json` says so.

    Raises:
        FileExistsError: if there is something at `path` already.
        ValueError: for a model composed by hand, of a kind that no family has, or whose context logits have a bias.
    """
    config, target = model.config, Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: name a directory that is not, or is empty")
    if config is None:
        raise ValueError(
            "this model was composed by hand; what it is made of is known of a model built from an EvoConfig"
        )
    family = next((family for family in FAMILIES if family.fits is not None and family.fits(config)), None)
    if family is None or family.write is None:
        known = ", ".join(family.architecture for family in FAMILIES if family.write is not None)
        raise ValueError(f"no family computes what a model of this config does: {config}; known are {known}")
    layout, ours = family.layout, model.state_dict()
    table, head = _tables(model)
    tied, size = torch.equal(table, head), len(table)
    state = {piece.theirs: piece.join(ours) for piece in layout.pieces(ours)}
    state[layout.prefix + layout.table] = table
    if not tied:
        state[layout.head] = head
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": size,
        **family.write(config),
        "tie_word_embeddings": tied,
        "dtype": str(table.dtype).removeprefix("torch."),
        "bos_token_id": size - 1 if model.bos_slots else None,
        "eos_token_id": None,
    }
    generation: dict[str, object] = {}
    if model.bos_slots:
        described["max_position_embeddings"] = model.backbone.positions
        generation = {"bos_token_id": size - 1, "suppress_tokens": [size - 1]}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        scratch.mkdir()
        write_json(scratch / "config.json", described)
        write_json(scratch / "generation_config.json", generation)
        write_tensors(scratch / "model.safetensors", state, {"format": "pt"})
        sync(scratch)
        os.replace(scratch, target)
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def _tables(model: Evo) -> tuple[Tensor, Tensor]:
    """What stands for every entry in the input and in the head, (V, W) each; an attended BOS is the last entry."""
    embeddings, embed, readout = model.latent_space.weight, model.backbone.embed, model.readout
    dtype = model.backbone.norm.weight.dtype
    if isinstance(readout, TiedReadout):
        head = embeddings[:, : readout.width] / readout.scale
    elif isinstance(readout, LinearReadout):
        head = readout.linear.weight
    elif isinstance(readout, Readout):
        if readout.bias is not None and bool(readout.bias.any()):
            raise ValueError(
                "context logits have a bias for every entry, which no family has: "
                "build the model with readout_bias=False to train one that can be exported"
            )
        head = embeddings.to(readout.linear.weight.dtype) @ readout.linear.weight
    else:
        raise ValueError(f"a readout of kind {type(readout).__name__} is not the head of any family")
    table = embed(embeddings.to(dtype))
    if model.bos_slots:
        table = torch.cat([table, embed(model.bos.to(dtype)).unsqueeze(0)])
        head = torch.cat([head, head.new_zeros(1, head.shape[1])])
    return table.to(dtype).contiguous(), head.to(dtype).contiguous()
