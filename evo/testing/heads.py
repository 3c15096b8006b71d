"""What heads owe the library: progression-time heads, priors and decoders."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from evo.heads import Decoder, Prior
from evo.testing.errors import require, require_all, require_equal


class Timestep(Protocol):
    """A head that chooses levels."""

    def __call__(self, hidden: Tensor, context_logits: Tensor) -> Tensor: ...


def check_head(
    *,
    timestep_head: Timestep | None = None,
    prior: Prior | None = None,
    decoder: Decoder | None = None,
    width: int = 16,
    vocab_size: int = 11,
) -> None:
    """Hold heads to what `generate` relies on; each is named as `generate` names it. `width` is that of the hidden states.

    Raises PropertyError, naming the property and what was found.
    """
    if timestep_head is None and prior is None and decoder is None:
        raise ValueError("check_head needs a timestep_head, a prior or a decoder")
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        if timestep_head is not None:
            hidden = torch.randn(3, 5, width, generator=generator)
            _check_timestep_head(timestep_head, hidden, _logits(vocab_size, generator))
        if prior is not None:
            _check_prior(prior, _logits(vocab_size, generator))
        if decoder is not None:
            _check_decoder(decoder, vocab_size, generator)
    still = torch.equal(before, torch.get_rng_state())
    require("a head draws by the numbers it is given, and from no generator", still, "torch's own moved")


def _logits(vocab_size: int, generator: torch.Generator) -> Tensor:
    """Logits (3, 5, V), among them an even row, a nearly certain one and one with forbidden tokens."""
    logits = torch.randn(3, 5, vocab_size, generator=generator)
    logits[0, 0] = 0
    logits[0, 1, 0] = 60
    logits[0, 2, 1:] = -torch.inf
    logits[0, 3, ::2] = -torch.inf
    return logits


def _check_timestep_head(head: Timestep, hidden: Tensor, logits: Tensor) -> None:
    levels = head(hidden, logits)
    shapes = f"hidden states {tuple(hidden.shape)} gave {tuple(levels.shape)}"
    require("a timestep head gives one level per token", levels.shape == hidden.shape[:2], shapes)
    wide = levels.dtype in (torch.float32, torch.float64)
    require("a timestep head gives levels in float32 or wider", wide, f"got {levels.dtype}")
    require_all("a level lies in [0, 1]", (levels >= 0) & (levels <= 1), level=levels)
    alone = torch.cat([head(hidden[:, i : i + 1], logits[:, i : i + 1]) for i in range(hidden.shape[1])], dim=1)
    near = (alone - levels).abs() <= 1e-5
    require_all("a level is chosen from its own position alone", near, together=levels, alone=alone)
    alone = torch.cat([head(hidden[b : b + 1], logits[b : b + 1]) for b in range(len(hidden))])
    near = (alone - levels).abs() <= 1e-5
    require_all("a level does not depend on the other sequences of its batch", near, together=levels, alone=alone)


def _check_prior(prior: Prior, logits: Tensor) -> None:
    given = logits.clone()
    chance = torch.Generator().manual_seed(1)
    uniform = torch.rand(logits.shape[:-1], generator=chance)
    tokens = prior(logits, uniform)
    require_equal("a prior leaves its logits as they were", logits, given)
    _require_tokens("a prior", tokens, logits.shape[:-1], logits.shape[-1])
    one_each = torch.stack([prior(logits[:, i], uniform[:, i]) for i in range(logits.shape[1])], 1)
    _require_tokens("a prior", one_each[:, 0], logits.shape[:1], logits.shape[-1])
    claim = "a token depends on its own logits and its own number alone"
    require_equal(claim, one_each, tokens)
    require_equal(claim, torch.cat([prior(logits[b : b + 1], uniform[b : b + 1]) for b in range(len(logits))]), tokens)
    most = 1 - torch.finfo(uniform.dtype).eps / 2  # the largest number below 1
    chances = torch.cat([torch.zeros(1), torch.full((1,), most), torch.rand(20, generator=chance)])
    for number in chances:
        drawn = prior(logits, number.expand_as(uniform))
        allowed = logits.gather(-1, drawn[..., None])[..., 0] > -torch.inf
        require_all("a prior never draws a token whose logit is −∞", allowed, token=drawn)
    certain = logits[0, 1].argmax()
    told = f"drew {int(tokens[0, 1])}, certain was {int(certain)}"
    require("a prior draws a certain token", bool(tokens[0, 1] == certain), told)
    require_equal("the same numbers draw the same tokens", prior(logits, uniform), tokens)


def _check_decoder(decoder: Decoder, vocab_size: int, generator: torch.Generator) -> None:
    embeddings = nn.functional.normalize(torch.randn(vocab_size, vocab_size, generator=generator), dim=-1)
    tokens = torch.randint(vocab_size, (3, 5), generator=generator)
    logits = 60.0 * nn.functional.one_hot(tokens, vocab_size)
    denoised = embeddings[tokens]
    decoded = decoder(logits, denoised, embeddings, torch.rand(tokens.shape, generator=generator))
    _require_tokens("a decoder", decoded, tokens.shape, vocab_size)
    require_equal("a decoder reads a token that logits and latent agree on", decoded, tokens)
    logits, denoised = _logits(vocab_size, generator), torch.randn(3, 5, vocab_size, generator=generator)
    uniform = torch.rand(tokens.shape, generator=generator)
    together = decoder(logits, denoised, embeddings, uniform)
    alone = torch.stack([decoder(logits[b], denoised[b], embeddings, uniform[b]) for b in range(len(logits))])
    require_equal("a decoder reads a token as if it were alone", alone, together)


def _require_tokens(who: str, tokens: Tensor, shape: torch.Size, vocab_size: int) -> None:
    shapes = f"needed {tuple(shape)}, got {tuple(tokens.shape)}"
    require(f"{who} gives one token id per position", tokens.shape == shape, shapes)
    require(f"{who} gives int64 token ids", tokens.dtype == torch.int64, f"got {tokens.dtype}")
    require_all(f"{who} gives ids of the vocabulary", (tokens >= 0) & (tokens < vocab_size), token=tokens)
