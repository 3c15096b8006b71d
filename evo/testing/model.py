"""What a composed model owes its name: at level 0 it is autoregression, at level 1 diffusion, and its cache changes nothing.

B batch, N tokens, D latent dimension.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from evo.core import Evo, VectorField
from evo.core.documents import Documents
from evo.heads import FixedTimestep
from evo.schedules import Schedule, full
from evo.testing.backbone import check_backbone
from evo.testing.errors import require, require_all, require_close, require_equal
from evo.testing.latent_space import check_latent_space


def check_model_limits(model: Evo, *, batch: int = 3, length: int = 7, prompt: int = 3) -> None:
    """Hold a model to its two limits and to its cache; works on a float64 copy on the CPU, in evaluation mode.

    At level 0 the bound is the causal cross-entropy of the same weights, and greedy generation is the plain loop. At any levels the
    sketch does not see the token it speaks of nor what follows, and a document of a sequence is that document alone. The head gives
    levels. At level 1 the bound is the diffusion bound, written here anew from its definition under the noise that the model drew. A field
    behind a cached prompt says what the whole sequence says, and a prompt does not see its window. The parts are held to
    `check_latent_space` and `check_backbone`. The tokens are `batch` sequences of `length` random ids.

    Raises PropertyError, naming the property and the error; ValueError for lengths that do not fit.
    """
    if not 0 < prompt < length <= model.context:
        raise ValueError(
            f"needs 0 < prompt < length <= context, got prompt {prompt}, length {length}, context {model.context}"
        )
    model = copy.deepcopy(model).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.latent_space.vocab_size, (batch, length), generator=generator)
    with torch.no_grad():
        latents, level = _noisy(model, tokens, generator)
        _check_autoregressive_bound(model, tokens)
        _check_causality(model, tokens)
        _check_sketch(model, latents, level)
        _check_levels(model, latents, level)
        _check_documents(model, latents, level, prompt)
        _check_greedy_generation(model, tokens[:, :prompt], length - prompt)
        _check_diffusion_bound(model, tokens)
        _check_cache(model, tokens, latents, level, prompt, generator)
    check_latent_space(model.latent_space)
    check_backbone(model.backbone)


def _noisy(model: Evo, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents (B, N, D) of tokens (B, N), and their levels (B, N): drawn at random from [.15, .95)."""
    level = torch.rand(tokens.shape, dtype=torch.float64, generator=generator) * 0.8 + 0.15
    noise = torch.randn(*tokens.shape, model.latent_space.dim, dtype=torch.float64, generator=generator)
    return _noised(model.schedule, model.latent_space.weight[tokens], noise, level), level


def _check_autoregressive_bound(model: Evo, tokens: Tensor) -> None:
    out = model(tokens, levels=0.0, generator=torch.Generator().manual_seed(0))
    causal = -model.context_logits(tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    require_close("at level 0 the bound is the causal cross-entropy", out.bound, causal, 1e-10)
    require_equal("at level 0 there are no flow bits", out.flow_bits, torch.zeros_like(causal))
    require_equal("at level 0 there is nothing to reconstruct", out.reconstruction, torch.zeros_like(causal))


def _check_causality(model: Evo, tokens: Tensor) -> None:
    logits = model.context_logits(tokens)
    for i in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, i:] = (changed[:, i:] + 1) % model.latent_space.vocab_size
        claim = f"context logits of token {i} do not depend on it or on what follows"
        require_equal(claim, model.context_logits(changed)[:, : i + 1], logits[:, : i + 1])


def _check_sketch(model: Evo, latents: Tensor, level: Tensor) -> None:
    hidden = model.sketch(latents, level)
    for i in range(level.shape[1]):
        later = torch.arange(level.shape[1]) >= i
        other = model.sketch(torch.where(later[:, None], -latents, latents), torch.where(later, 1.1 - level, level))
        claim = f"at any levels the sketch of token {i} depends neither on it nor on what follows"
        require_close(claim, other[:, : i + 1], hidden[:, : i + 1], 1e-10)
    require_close(
        "a sequence alone is that sequence in a batch", model.sketch(latents[:1], level[:1]), hidden[:1], 1e-10
    )


def _check_levels(model: Evo, latents: Tensor, level: Tensor) -> None:
    """One look at the head as this model calls it; `check_head` has more."""
    hidden = model.sketch(latents, level)
    chosen = model.timestep_head(hidden, model.readout(hidden, model.latent_space.weight))
    found = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
    needed = tuple(level.shape)
    require("the timestep head gives one level per token", found == needed, f"needed {needed}, got {found}")
    require_all("a level of the timestep head lies in [0, 1]", (chosen >= 0) & (chosen <= 1), level=chosen)


def _check_documents(model: Evo, latents: Tensor, level: Tensor, cut: int) -> None:
    """A sequence cut into two documents, sketched and refined together and each alone."""
    ids = (torch.arange(level.shape[1]) >= cut).long().expand_as(level)
    documents = Documents.of(ids, model.bos_slots)
    for half in (model.sketch, model.refine):
        together = half(latents, level, documents=documents)
        alone = [half(latents[:, here], level[:, here]) for here in (slice(0, cut), slice(cut, None))]
        claim = f"{half.__name__}: a document in a sequence with others says what it says alone"
        require_close(claim, together, torch.cat(alone, 1), 1e-10)


def _check_greedy_generation(model: Evo, prompt: Tensor, new: int) -> None:
    written = model.generate(prompt, new, timestep_head=FixedTimestep(0.0), temperature=0.0)
    plain = prompt
    for _ in range(new):
        padded = F.pad(plain, (0, 1))  # its last row speaks of the token to come, whatever stands there
        plain = torch.cat([plain, model.context_logits(padded)[:, -1:].argmax(-1)], dim=1)
    require_equal(
        "greedy generation at level 0 is the token-by-token loop", written.tokens, plain[:, prompt.shape[1] :]
    )
    require("generation at level 0 needs no refinement", written.nfe == 0, f"{written.nfe} evaluations")


def _check_diffusion_bound(model: Evo, tokens: Tensor) -> None:
    """½∫ −SNR'(t)·E‖e − x̂‖² dt + CE(p(·|z at t_min), x), each term under the noise that the model drew for it.

    On the path `full` the level is t_min + (1 − c)(1 − t_min): above t_min at every clock value, and falling at 1 − t_min.
    """
    schedule = model.schedule
    noises: list[tuple[Tensor, Tensor]] = []
    bridge = schedule.bridge

    def recording_bridge(noise: Tensor, level: Tensor, new_level: Tensor, fresh: Tensor) -> Tensor:
        noises.append((new_level, bridge(noise, level, new_level, fresh)))
        return noises[-1][1]

    schedule.bridge = recording_bridge  # the model is a copy
    out = model(tokens, levels=1.0, path=full, generator=torch.Generator().manual_seed(0))
    schedule.bridge = bridge
    found = f"`schedule.bridge` was called for levels {[round(level.max().item(), 3) for level, _ in noises]}"
    claim = "the flow and the reconstruction each continue the noise of the sketch by `schedule.bridge`"
    require(claim, len(noises) == 2 and bool((noises[0][0] > schedule.t_min).all()), found)

    if schedule.signal(torch.ones((), dtype=torch.float64)) == 0:
        require_close("at level 1 there are no sketch bits", out.sketch_bits, torch.zeros_like(out.bound), 1e-10)
    embeddings, field = model.latent_space.weight, model.vector_field()
    (level, noise), (lowest, last_noise) = noises
    latents = _noised(schedule, embeddings[tokens], noise, level)
    denoised = _log_posterior(field, embeddings, latents, level).exp() @ embeddings
    flow = -0.5 * _snr_slope(schedule, level) * (1 - schedule.t_min) * (embeddings[tokens] - denoised).square().sum(-1)
    require_close("at level 1 flow bits are the weighted denoising error", out.flow_bits, flow, 1e-9, level=level)
    last = _noised(schedule, embeddings[tokens], last_noise, lowest)
    reconstruction = -_log_posterior(field, embeddings, last, lowest).gather(-1, tokens[..., None])[..., 0]
    claim = "at level 1 reconstruction is the cross-entropy at t_min"
    require_close(claim, out.reconstruction, reconstruction, 1e-9)

    signal, spread = schedule.signal(level)[..., None], schedule.noise(level)[..., None]
    d_signal, d_noise = schedule.d_signal(level)[..., None], schedule.d_noise(level)[..., None]
    velocity = d_signal * denoised + d_noise * (latents - signal * denoised) / spread
    require_close("the vector field is s'·x̂ + n'·ε̂", field(latents, level), velocity, 1e-9, level=level[..., None])


def _noised(schedule: Schedule, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    return schedule.signal(level)[..., None] * clean + schedule.noise(level)[..., None] * noise


def _log_posterior(field: VectorField, embeddings: Tensor, latents: Tensor, level: Tensor) -> Tensor:
    """Log p(v | z): what the network says of each token's context, and the Gaussian density of its own latent.

    A self-conditioned network is asked twice, and the second time given what it took the clean latents for the first time.
    """
    schedule = field.denoiser.schedule
    distance = (latents[..., None, :] - schedule.signal(level)[..., None, None] * embeddings).square().sum(-1)
    evidence = distance / (2 * schedule.noise(level)[..., None] ** 2)
    found = (field.network(latents, level) - evidence).log_softmax(-1)
    if field.self_conditioned:
        found = (field.network(latents, level, found.exp() @ embeddings) - evidence).log_softmax(-1)
    return found


def _snr_slope(schedule: Schedule, level: Tensor) -> Tensor:
    """The derivative of s²/n², by autograd."""
    with torch.enable_grad():
        leaf = level.detach().requires_grad_()
        snr = (schedule.signal(leaf) / schedule.noise(leaf)).square()
        return torch.autograd.grad(snr.sum(), leaf)[0]


def _check_cache(
    model: Evo, tokens: Tensor, latents: Tensor, level: Tensor, prompt: int, generator: torch.Generator
) -> None:
    window = torch.arange(level.shape[1]) >= prompt
    level = torch.where(window, level, 0.0)
    latents = torch.where(window[:, None], latents, model.latent_space.weight[tokens])
    lengths = torch.full((len(tokens),), prompt)
    hidden = model.refine(latents, level, prompt=lengths)
    whole = model.readout(hidden, model.latent_space.weight)[:, prompt:]
    cached = model.vector_field(tokens[:, :prompt]).network(latents[:, prompt:], level[:, prompt:])
    require_close("a field behind a cached prompt says what the whole sequence says", cached, whole, 1e-10)
    other = latents.clone()
    other[:, prompt:] = torch.randn(other[:, prompt:].shape, dtype=torch.float64, generator=generator)
    changed = model.refine(other, level, prompt=lengths)
    require_equal("hidden states of the prompt do not depend on the window", changed[:, :prompt], hidden[:, :prompt])
