"""What a latent space owes the model: one finite point for each entry, near enough and far enough from the others."""

from __future__ import annotations

import copy

import torch

from evo.core.latent_space import Embeddings
from evo.testing.errors import require, require_all, require_close


def check_latent_space(latent_space: Embeddings) -> None:
    """Hold a latent space to what the model relies on; works on a float64 copy on the CPU.

    `weight` is (V, D), finite, and moves with the module (a fixed table is a buffer); `embed` gives its rows; no two of the first 1 024
    entries are one; and half their mean squared distance is `radius` squared, within a factor of 4, from which the network is told what
    to expect.

    Raises PropertyError, naming the property and what was found.
    """
    latent_space = copy.deepcopy(latent_space).to("cpu", torch.float64)
    with torch.no_grad():
        weight, shape = latent_space.weight, (latent_space.vocab_size, latent_space.dim)
        require("weight is (V, D)", weight.shape == shape, f"needed {shape}, got {tuple(weight.shape)}")
        found = f"moved to float64 it gives {weight.dtype}; keep a fixed table by `register_buffer`"
        require("weight moves with the module", weight.dtype == torch.float64, found)
        require_all("weight is finite", weight.isfinite(), weight=weight)
        tokens = torch.arange(6).view(2, 3) % latent_space.vocab_size
        require_close("embed gives rows of weight", latent_space.embed(tokens), weight[tokens], 1e-9)
        some = weight[:1024]
        apart = torch.cdist(some, some)[~torch.eye(len(some), dtype=torch.bool)]
        require("no two entries are one", apart.min().item() > 0, "the distance between two of them is 0")
        share = apart.square().mean().item() / 2 / latent_space.radius**2
        found = f"it is {share:.3g} of it: set `radius` to {latent_space.radius * share**0.5:.3g}"
        require("half the mean squared distance of entries is radius squared", 0.25 <= share <= 4, found)
