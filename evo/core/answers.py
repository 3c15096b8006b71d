"""What the parts that read hidden states answer, held to what was asked of them.

Shapes and dtypes are looked at in every call, values only where no device has to be waited for.

V vocabulary, D latent dimension, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evo.heads import Decoder, Prior


def logits_of(readout: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, embeddings: Tensor) -> Tensor:
    """Context logits (..., V) of hidden states (..., W), read off with embeddings (V, D).

    Raises:
        ValueError: for a readout that gives another shape.
    """
    logits = readout(hidden, embeddings)
    if logits.shape != (*hidden.shape[:-1], len(embeddings)):
        raise ValueError(
            f"the readout gave shape {tuple(logits.shape)} for hidden states {tuple(hidden.shape)}; "
            f"it needs one logit for each of the {len(embeddings)} entries of the vocabulary"
        )
    return logits


def levels_of(head: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, logits: Tensor) -> Tensor:
    """Levels (...) from hidden states (..., W) and context logits (..., V), in the dtype of the head. Their values are as they come.

    Raises:
        ValueError: for a head that gives another shape, or no floating-point tensor.
    """
    levels = head(hidden, logits)
    if not isinstance(levels, Tensor) or not levels.is_floating_point() or levels.shape != logits.shape[:-1]:
        raise ValueError(
            f"the timestep head gave {described(levels)} for hidden states {tuple(hidden.shape)}; "
            f"it needs floating-point levels of shape {tuple(logits.shape[:-1])}, one for each token"
        )
    return levels


def outside(levels: Tensor) -> Tensor:
    """Where levels (...) are no levels, bool (...): below 0, above 1, or NaN."""
    return ~((levels >= 0) & (levels <= 1))


def wrong_level(level: float) -> ValueError:
    """What to raise for such a level of a timestep head."""
    return ValueError(
        f"the timestep head gave level {level:.6g}; a level lies in [0, 1]: let the head end in a sigmoid or a clamp, "
        "and look for NaN in its weights"
    )


def tokens_of(prior: Prior, logits: Tensor, uniform: Tensor) -> Tensor:
    """Ids (...) that a prior draws from logits (..., V) by numbers in [0, 1), (...).

    Raises:
        ValueError: for ids of another shape or dtype, or (on a CPU) outside the vocabulary.
    """
    return _ids("prior", prior(logits, uniform), logits)


def decoded_by(decoder: Decoder, log_probs: Tensor, latents: Tensor, embeddings: Tensor, uniform: Tensor) -> Tensor:
    """Ids (...) that a decoder reads off log p(v|z) (..., V) and denoised latents (..., D), by numbers in [0, 1), (...).

    Raises:
        ValueError: as `tokens_of`.
    """
    return _ids("decoder", decoder(log_probs, latents, embeddings, uniform), log_probs)


def described(value: object) -> str:
    """A value in an error: tensors by dtype and shape, classes by their name."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def _ids(who: str, tokens: Tensor, logits: Tensor) -> Tensor:
    needed, vocab_size = logits.shape[:-1], logits.shape[-1]
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.shape != needed:
        raise ValueError(
            f"the {who} gave {described(tokens)} for logits {tuple(logits.shape)}; it needs int64 ids of shape {tuple(needed)}"
        )
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(each) for each in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"the {who} gave id {low if low < 0 else high}; ids of this model lie in [0, {vocab_size})"
            )
    return tokens
