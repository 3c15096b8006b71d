"""The families of causal language models that can be read and written: their configs, and where their weights lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.core import EvoConfig
from evo.core.layers import GELU, LayerNorm, RMSNorm, SwiGLU, default_hidden
from evo.interop.entries import Entries
from evo.interop.rope import read_rotary, write_rotary


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of theirs, and the tensors of ours that it is made of, one behind the other along their first dimension.

    Args:
        theirs: its name in their checkpoint.
        ours: names in our state dict.
        transposed: whether they store (in, out) where we store (out, in).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool

    def split(self, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors, by name, of theirs; each in memory of its own."""
        tensor = tensor.T if self.transposed else tensor
        parts = tensor.split([shapes[name][0] for name in self.ours])
        for name, part in zip(self.ours, parts, strict=True):
            yield name, part.contiguous() if len(self.ours) == 1 else part.clone(memory_format=torch.contiguous_format)

    def join(self, state: Mapping[str, Tensor]) -> Tensor:
        """Their tensor of ours."""
        tensor = state[self.ours[0]] if len(self.ours) == 1 else torch.cat([state[name] for name in self.ours])
        return (tensor.T if self.transposed else tensor).contiguous()

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of their tensor."""
        rows = sum(shapes[name][0] for name in self.ours)
        shape = (rows, *shapes[self.ours[0]][1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a family keeps its weights.

    Args:
        prefix: of everything but the head.
        table: of the embeddings.
        block: of the blocks, in front of their number.
        modules: theirs, in a block, by ours; several of ours may lie in one of theirs.
        others: theirs outside the blocks, by ours.
        transposed: modules of theirs that store (in, out).
        ignored: ends of the names of tensors that are no weights.
    """

    prefix: str
    table: str
    block: str
    modules: Mapping[str, str]
    others: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    head: str = "lm_head.weight"

    def pieces(self, ours: Iterable[str]) -> list[Piece]:
        """How their tensors are made of ours. Names that are not theirs to keep (what Evo adds) are passed over."""
        found: dict[tuple[str, bool], list[str]] = {}
        for name in ours:
            theirs = self._theirs(name)
            if theirs is not None:
                found.setdefault(theirs, []).append(name)
        return [Piece(theirs=name, ours=tuple(ours), transposed=turn) for (name, turn), ours in found.items()]

    def _theirs(self, name: str) -> tuple[str, bool] | None:
        module, _, kind = name.removeprefix("backbone.").rpartition(".")
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            theirs = self.modules[module]
            return f"{self.prefix}{self.block}.{index}.{theirs}.{kind}", kind == "weight" and theirs in self.transposed
        return (f"{self.prefix}{self.others[module]}.{kind}", False) if module in self.others else None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of causal language model.

    Args:
        architecture, model_type: its names in `config.json`.
        read: our config of theirs, but for the vocabulary; and the entries that follow from the family alone.
        layout: of the weights.
        fits: whether a config of ours is of this family; None for one that is written as another.
        write: their config of ours, but for what all families share.
        tied: whether head and embeddings are one where the config does not say.
    """

    architecture: str
    model_type: str
    read: Callable[[Entries], dict[str, Any]]
    layout: Layout
    fits: Callable[[EvoConfig], bool] | None = None
    write: Callable[[EvoConfig], dict[str, Any]] | None = None
    tied: bool = False


def _read_llama_like(config: Entries, *, slides: bool | None = False, **own: Any) -> dict[str, Any]:
    """What all the descendants of Llama have in common; `own` is what each has of its own.

    `slides` is whether a `sliding_window` counts where nothing else is said of it; None is never.
    """
    config.only("hidden_act", "silu", "swish", default="silu")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return {
        "width": width,
        "depth": config.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": own.pop("kv_heads", None) or config.integer("num_key_value_heads"),
        "head_dim": config.integer("head_dim", width // heads),
        "hidden": config.integer("intermediate_size"),
        "context": _context(config, slides),
        "norm": RMSNorm(eps=config.number("rms_norm_eps", 1e-6)),
        "rotary": read_rotary(config),
        **own,
    }


def _context(config: Entries, slides: bool | None) -> int:
    """The longest context in which every layer sees everything: attention that slides is full attention up to there."""
    positions = config.integer("max_position_embeddings")
    kinds = config.data.get("layer_types") or []
    if not (isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)):
        raise config.error("layer_types", "a list of full_attention and sliding_attention")
    if slides is None or not config.flag("use_sliding_window", slides) or config.says_none("sliding_window"):
        return positions
    # A config that says nothing of its window has the one that these families were first published with.
    return min(positions, config.integer("sliding_window", 4096))


def _read_llama(config: Entries) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    feed_forward = SwiGLU(bias=config.flag("mlp_bias", False))
    # The first Llamas have no entry for their key/value heads, of which there are as many as of the others.
    kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    return _read_llama_like(
        config, slides=None, kv_heads=kv_heads, qkv_bias=bias, out_bias=bias, feed_forward=feed_forward
    )


def _read_qwen3(config: Entries) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    head_dim = config.integer("head_dim", 128)
    return _read_llama_like(config, qkv_bias=bias, out_bias=bias, qk_norm=True, head_dim=head_dim)


def _read_gpt2(config: Entries) -> dict[str, Any]:
    config.only("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    config.only("scale_attn_weights", True, default=True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        config.only(name, False, default=False)
    width = config.integer("n_embd")
    return {
        "width": width,
        "depth": config.integer("n_layer"),
        "heads": config.integer("n_head"),
        "hidden": config.integer("n_inner", 4 * width),
        "context": config.integer("n_positions"),
        "norm": LayerNorm(eps=config.number("layer_norm_epsilon", 1e-5)),
        "feed_forward": GELU(),
        "rotary": None,
        "qkv_bias": True,
        "out_bias": True,
    }


def _fits_llama_like(config: EvoConfig) -> bool:
    kinds = isinstance(config.norm, RMSNorm), isinstance(config.feed_forward, SwiGLU)
    return all(kinds) and config.rotary is not None and config.width % config.heads == 0


def _without_mlp_bias(config: EvoConfig) -> bool:
    return _fits_llama_like(config) and config.feed_forward == SwiGLU()


def _write_llama_like(config: EvoConfig) -> dict[str, Any]:
    assert config.rotary is not None
    return {
        "hidden_size": config.width,
        "intermediate_size": config.hidden or default_hidden(config.width),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim or config.width // config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "rope_parameters": write_rotary(config.rotary),
        "attention_bias": config.out_bias,
    }


def _write_llama(config: EvoConfig) -> dict[str, Any]:
    return _write_llama_like(config) | {"mlp_bias": config.feed_forward == SwiGLU(bias=True)}


def _write_gpt2(config: EvoConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_inner": config.hidden or default_hidden(config.width),
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": config.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm.eps,
    }


_LLAMA = Layout(
    prefix="model.",
    table="embed_tokens.weight",
    block="layers",
    modules={
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
    others={"norm": "norm"},
    ignored=(".rotary_emb.inv_freq",),
)
_GPT2 = Layout(
    prefix="transformer.",
    table="wte.weight",
    block="h",
    modules={
        "attention_norm": "ln_1",
        "attention.q": "attn.c_attn",
        "attention.k": "attn.c_attn",
        "attention.v": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    },
    others={"norm": "ln_f", "position_embedding": "wpe"},
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ignored=(".attn.bias", ".attn.masked_bias"),
)

FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        read=_read_llama,
        fits=lambda config: _fits_llama_like(config) and not config.qk_norm and config.qkv_bias == config.out_bias,
        write=_write_llama,
        layout=_LLAMA,
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        read=lambda config: _read_llama_like(config, qkv_bias=True),
        fits=lambda config: (
            _without_mlp_bias(config) and not config.qk_norm and config.qkv_bias and not config.out_bias
        ),
        write=_write_llama_like,
        layout=_LLAMA,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        read=_read_qwen3,
        fits=lambda config: _without_mlp_bias(config) and config.qk_norm and config.qkv_bias == config.out_bias,
        write=_write_llama_like,
        layout=_LLAMA,
    ),
    # Within its window it is a Llama, and is written as one.
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        read=lambda config: _read_llama_like(config, slides=True),
        layout=_LLAMA,
    ),
    Family(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        read=_read_gpt2,
        fits=lambda config: (
            isinstance(config.norm, LayerNorm)
            and config.feed_forward == GELU()
            and config.rotary is None
            and config.qkv_bias
            and config.out_bias
            and not config.qk_norm
            and config.kv_heads in (None, config.heads)
            and config.width == config.heads * (config.head_dim or config.width // config.heads)
        ),
        write=_write_gpt2,
        layout=_GPT2,
        tied=True,
    ),
)


def family_of(config: Entries) -> Family:
    """The family that a `config.json` names.

    Raises:
        ValueError: for any other, with the known ones.
    """
    named = config.data.get("architectures")
    for family in FAMILIES:
        if named == [family.architecture]:
            return family
    raise config.error("architectures", " or ".join(f"[{family.architecture!r}]" for family in FAMILIES))
