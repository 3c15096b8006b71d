"""Small models of the transformers package with random weights, one of every family and kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from evo import Evo

VOCAB, CONTEXT = 61, 48
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 3.0, "original_max_position_embeddings": 16}


def _llama(**options: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZE, **options}))


def _gpt2(**options: object) -> GPT2LMHeadModel:
    size = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
    silent = {"bos_token_id": None, "eos_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**size, **silent, **options}))


KINDS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama tied": lambda: _llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama biased, wide heads": lambda: _llama(attention_bias=True, mlp_bias=True, head_dim=12, rms_norm_eps=1e-3),
    "llama linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}),
    "llama dynamic": lambda: _llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}),
    "llama 3": lambda: _llama(rope_parameters=_LLAMA3),
    "llama yarn": lambda: _llama(rope_parameters=_YARN),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE, tie_word_embeddings=True)),
    "qwen2 sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_SIZE, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZE, head_dim=10)),
    "qwen3 biased": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZE, head_dim=8, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZE, sliding_window=20)),
    "mistral without window": lambda: MistralForCausalLM(MistralConfig(**_SIZE, sliding_window=None)),
    "gpt2": _gpt2,
    "gpt2 untied": lambda: _gpt2(tie_word_embeddings=False, n_inner=24),
}


def reference(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of this kind whose every weight, gains and biases among them, is random."""
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def saved(model: PreTrainedModel, path: Path, **options: object) -> Path:
    """Where it has been saved."""
    model.save_pretrained(path, **options)
    return path


def in_double(model: PreTrainedModel, like: Evo) -> PreTrainedModel:
    """A copy that computes in float64 where transformers computes in float32 whatever the weights are: norms and rotary angles.

    The frequencies are those of `like`, in which case they are rounded to float32 in both; `test_rotary` compares them.
    """
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                setattr(parent, name, norm)
    if like.backbone.rotary is not None:
        model.model.rotary_emb = _DoubleRotary(like.backbone.rotary.frequencies, model.model.rotary_emb)
    return model


class _DoubleRotary(nn.Module):
    def __init__(self, frequencies: torch.Tensor, theirs: nn.Module) -> None:
        super().__init__()
        self.frequencies, self.amplitude = frequencies.double(), theirs.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids.unsqueeze(-1) * self.frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude
