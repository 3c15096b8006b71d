"""Starting from a pretrained causal language model (paper §2.3)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from evo.core import Evo, EvoConfig
from evo.core.pretrained import PretrainedEmbed, PretrainedVocabulary
from evo.core.shards import Shards
from evo.core.sizes import blueprint
from evo.files import read_json
from evo.heads import TimestepHead
from evo.interop.entries import Entries
from evo.interop.families import Family, Layout, family_of
from evo.schedules import Cosine, Schedule

_CONFIG_LIMIT = 1 << 20
_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_TABLE, _HEAD, _POSITIONS = "latent_space.table", "readout.linear.weight", "backbone.position_embedding.weight"


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    schedule: Schedule | None = None,
    dropout: float = 0.0,
    self_conditioning: bool = False,
    slack: int = 128,
    freeze: str | None = None,
    revision: str | None = None,
) -> Evo:
    """An Evo whose context logits at level 0 are the logits of a pretrained causal language model, in evaluation mode.

    Row i of `context_logits` is what that model says behind tokens 0..i-1; of token 0, of which it says nothing, row 0 is even.
    Llama, Qwen2, Qwen2.5, Qwen3, Mistral and GPT-2 are read, from safetensors, tensor by tensor: the other model is never built,
    and memory holds the weights once. What Evo adds (conditioning on the level, the role of a position, the head of progression
    times, further dimensions of the latents) says nothing until it is trained; `freeze="backbone"` trains it alone.

    Args:
        source: a directory in the Hugging Face layout, or the id of a model on its hub, which needs huggingface_hub.
        dtype: of the weights; None is that of the embeddings in the checkpoint.
        context: the longest sequence, in tokens; None is the longest that is exact: all positions, but no more than a sliding window.
        schedule: the noise schedule, which becomes the model's own, as it has been trained; None is `Cosine()`.
        dropout: on both residual branches.
        self_conditioning: add an input for an earlier estimate of the clean latents.
        slack: dimensions of a latent beyond the pretrained embedding, see `evo.core.pretrained`.
        freeze: "backbone" leaves trainable only what Evo adds, as `freeze_backbone` does; None trains everything.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        FileNotFoundError: where there is no config or no weights.
        ImportError: for a hub id without huggingface_hub.
        ValueError: for a model of another family, an option of a family that is not computed here, a longer context than is exact,
            files that are damaged or do not hold what the config says, an unknown `freeze`, or a dtype that weights cannot have.
    """
    if freeze not in (None, "backbone"):
        raise ValueError(f"freeze is {freeze!r}; known are 'backbone', and None to train everything")
    if dtype is not None and not _is_weight(dtype):
        raise ValueError(f"dtype is {dtype}; weights are floating-point numbers of 16 bits or more")
    directory, within = _local(source, revision)
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no model in {directory}: it has no config.json")
    data = read_json(file, _CONFIG_LIMIT)
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds {type(data).__name__}; a model config is a JSON object")
    if "config_sha256" in data:
        raise ValueError(f"{file} is the config of an Evo: load that with Evo.from_pretrained")
    entries = Entries(data, str(file))
    family = family_of(entries)
    schedule = Cosine() if schedule is None else schedule
    # Its scale is known when the embeddings are.
    vocabulary = PretrainedVocabulary(scale=1.0, slack=slack, tied=entries.flag("tie_word_embeddings", family.tied))
    config = EvoConfig(
        vocab_size=entries.integer("vocab_size"),
        **family.read(entries),
        bos="detached",
        pretrained=vocabulary,
        dropout=dropout,
        self_conditioning=self_conditioning,
        schedule=schedule.config(),
    )
    context = config.context if context is None else context
    if not 0 < context <= config.context:
        raise ValueError(f"context is {context}; this model is exact for 1 to {config.context} tokens")
    shards = Shards.open(directory, within=within)
    try:
        model = _assemble(config, context, vocabulary, schedule, family, shards, dtype)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return model if freeze is None else freeze_backbone(model)


def freeze_backbone(model: Evo) -> Evo:
    """Leave trainable only what Evo adds to a pretrained model; returns the model.

    That is the conditioning on the level and on an earlier estimate, the role of a position, what is read of the further dimensions
    of a latent, the hidden state that speaks of the first token, the head of progression times, and a schedule that learns.

    Raises:
        ValueError: for a model that does not start from a pretrained one.
    """
    embed = model.backbone.embed
    if not isinstance(embed, PretrainedEmbed):
        raise ValueError(
            "this model does not start from a pretrained one, so all of it must be trained; see interop.from_pretrained"
        )
    model.requires_grad_(False)
    backbone = model.backbone
    for added in (embed, backbone.level_embedding, backbone.estimate_embed, model.timestep_head, model.schedule):
        if isinstance(added, nn.Module):
            added.requires_grad_()
    for parameter in (backbone.own_role, model.bos):
        parameter.requires_grad_()
    return model


def _assemble(
    config: EvoConfig,
    context: int,
    vocabulary: PretrainedVocabulary,
    schedule: Schedule,
    family: Family,
    shards: Shards,
    dtype: torch.dtype | None,
) -> Evo:
    layout = _placed(family.layout, shards)
    table_name = layout.prefix + layout.table
    if config.depth > len(shards.shapes):
        raise ValueError(
            f"the checkpoint holds {len(shards.shapes)} tensors, its config.json asks for {config.depth} blocks: "
            "the weights of another model"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in blueprint(config).items()}
    pieces = layout.pieces(shapes)
    needed = {piece.theirs: piece.shape(shapes) for piece in pieces}
    needed[table_name] = (config.vocab_size, config.width)
    if not vocabulary.tied:
        needed[layout.head] = (config.vocab_size, config.width)
    _check(needed, shards, layout)

    dtype = shards.dtypes[table_name] if dtype is None else dtype
    table = shards.read(table_name).to(dtype)
    if vocabulary.tied and layout.head in shards.shapes and not torch.equal(shards.read(layout.head).to(dtype), table):
        raise ValueError(
            "config.json says that head and embeddings are one, and the checkpoint holds another head: "
            "set tie_word_embeddings to false"
        )
    vocabulary = PretrainedVocabulary.of(table, tied=vocabulary.tied, slack=vocabulary.slack)
    # Without memory for weights that would be thrown away: every one of them is assigned below.
    with torch.device("meta"):
        model = replace(config, context=context, pretrained=vocabulary).build()
    model.schedule = schedule
    model.timestep_head = TimestepHead(config.width).to(dtype)
    state = {_TABLE: vocabulary.lift(table)}
    del table
    if not vocabulary.tied:
        state[_HEAD] = shards.read(layout.head).to(dtype)
    for piece in pieces:
        state.update(piece.split(shards.read(piece.theirs).to(dtype), shapes))
    if context < config.context and _POSITIONS in state:
        state[_POSITIONS] = state[_POSITIONS][:context].clone()
    for name, added in model.state_dict().items():
        if name not in state:
            # What Evo adds is silent until it is trained.
            state[name] = torch.zeros(added.shape, dtype=dtype) if added.is_meta else added
    model.load_state_dict(state, assign=True)
    return model.eval()


def _placed(layout: Layout, shards: Shards) -> Layout:
    """The layout without its prefix, if that is how the checkpoint was saved: of the bare model, as the first GPT-2 was."""
    return replace(layout, prefix="") if layout.table in shards.shapes else layout


def _check(needed: Mapping[str, tuple[int, ...]], shards: Shards, layout: Layout) -> None:
    """That a checkpoint holds what a model needs, in 16 bits or more, and nothing else that would be lost."""
    found = shards.shapes
    surplus = sorted(name for name in found.keys() - needed.keys() - {layout.head} if not name.endswith(layout.ignored))
    missing = sorted(needed.keys() - found.keys())
    other = [
        f"{name} {found[name]} {shards.dtypes[name]} instead of {shape}"
        for name, shape in needed.items()
        if name in found and (found[name] != shape or not _is_weight(shards.dtypes[name]))
    ]
    if missing or surplus or other:
        raise ValueError(
            "the checkpoint does not hold what its config.json says: "
            f"missing {missing[:4]}, surplus {surplus[:4]}, of other shapes or no floating-point weights {other[:4]}"
        )


def _is_weight(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _local(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path]:
    """The directory of a model, and the one that its files must lie in; a model of the hub is fetched."""
    directory = Path(source)
    if directory.is_dir():
        return directory, directory
    if not isinstance(source, str) or source.count("/") > 1 or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{source} is no directory, and not the id of a model on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no directory; to fetch a model of this id: pip install 'evo-lm[hf]'"
        ) from error
    directory = Path(snapshot_download(source, revision=revision, allow_patterns=list(_FILES)))
    # The files of a snapshot are links into the folder of its repository: <repository>/snapshots/<commit>.
    return directory, directory.parent.parent
