"""What a token costs: floating-point operations, counted on paper.

A multiply-add is two operations; products of matrices are all that is counted, attention over every key that a kernel is given,
seen or not: the conventions of `torch.utils.flop_counter`, which the tests compare with, operation for operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from evo.core import EvoConfig, Objective, Part
from evo.core.sizes import one_block
from evo.heads import LinearReadout, TiedReadout


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one token on its way forward, part by part.

    Attributes:
        embed: latent to hidden state.
        level: embedding of the level.
        estimate: second input of a self-conditioned model; 0 for others.
        blocks: matrices of all blocks.
        per_key: attention in all blocks, for each key that the token is compared with.
        readout: hidden state to context logits.
        head: hidden state to level, of which `head_last` in its last layer.
        posterior: evidence of the token's own latent, added to its logits.
        expectation: denoised latent.
        attention_backward: attention going back, in units of going forward: 2.5 where kernels compute scores once more, 2 elsewhere.
        bos: positions before the first token.
    """

    embed: int
    level: int
    estimate: int
    blocks: int
    per_key: int
    readout: int
    head: int
    head_last: int
    posterior: int
    expectation: int
    attention_backward: float
    bos: int

    @classmethod
    def of(cls, config: EvoConfig, *, attention_backward: float = 2.5) -> Flops:
        """Those of a model of this config."""
        model = one_block(config)
        backbone, readout = model.backbone, model.readout
        head_dim = config.width // config.heads if config.head_dim is None else config.head_dim
        table = model.latent_space.vocab_size * model.latent_space.dim
        if isinstance(readout, LinearReadout):
            shared = 0
        elif isinstance(readout, TiedReadout):
            shared = model.latent_space.vocab_size * readout.width
        else:
            shared = table
        return cls(
            embed=_products(backbone.embed),
            level=_products(backbone.level_embedding),
            estimate=0 if backbone.estimate_embed is None else _products(backbone.estimate_embed),
            blocks=config.depth * _products(backbone.blocks[0]),
            per_key=config.depth * 4 * config.heads * head_dim,
            readout=_products(readout) + 2 * shared,
            head=_products(model.timestep_head),
            head_last=2 * model.timestep_head.get_parameter("outer.weight").numel(),
            posterior=2 * (table + model.latent_space.vocab_size),
            expectation=2 * table,
            attention_backward=attention_backward,
            bos=backbone.positions - config.context,
        )

    def forward(self, keys: float) -> float:
        """Of one position through the backbone, seeing so many keys."""
        return self.embed + self.level + self.blocks + self.per_key * keys

    def sketch(self, keys: float) -> float:
        """Of sketching one token behind so many keys: its hidden state, its context logits, its level."""
        return self.forward(keys) + self.readout + self.head

    def refine(self, keys: float) -> float:
        """Of one evaluation of the flow at one token that sees so many keys; of a self-conditioned model, given its estimate."""
        return self.forward(keys) + self.estimate + self._denoised

    @property
    def _denoised(self) -> int:
        """From a hidden state to the denoised latent."""
        return self.readout + self.posterior + self.expectation

    def training(self, objective: Objective, *, sequences: int, length: int, checkpointing: bool = False) -> float:
        """Of one training step at explored levels on `sequences` of `length` tokens: both halves with their gradients, the first pass.

        Args:
            objective: how many sequences explore, whether the first pass has a gradient, how many see an estimate, whether trials are made.
            sequences: in one pass of the network.
            length: tokens of each.
            checkpointing: blocks are computed once more on the way back.
        """
        tokens = sequences * length
        batch = Part(rows=range(sequences), total=sequences, scored=sequences * length)
        kinds = batch.kinds(objective.exploration.share)
        learners = kinds.learners.whole
        # A level that comes from the head has a gradient, a random one has none, and the product for it is spared.
        level_back = 2 if learners else 1
        sketch, refine = length - 1 + self.bos, length + self.bos
        redone = 1 if checkpointing else 0

        def trained(positions: int, level_back: int) -> float:
            """Of one sequence through the backbone, forward and back."""
            once = self.blocks + self.per_key * positions
            back = 2 * self.blocks + self.attention_backward * self.per_key * positions
            return positions * (3 * self.embed + (1 + level_back) * self.level + (1 + redone) * once + back)

        total = sequences * (trained(sketch, level_back) + trained(refine, level_back))
        # Sketch: readout, posterior. Flow: readout, posterior, expectation. Reconstruction: posterior.
        total += 3 * tokens * (2 * self.readout + 3 * self.posterior + self.expectation)
        if objective.causal_weight:
            total += sequences * (trained(sketch, 1) + 3 * length * self.readout)
        elif learners:
            total += learners * (sketch * self.forward(sketch) + length * self.readout)
        if learners:
            # The head's input has no gradient, which spares the first of its two layers a product.
            total += learners * length * (2 * self.head + self.head_last)
        once = refine * self.forward(refine) + length * self._denoised
        guesses, estimated = batch.some(objective.self_conditioning, kinds).whole, 2 * sequences
        if learners and objective.trials:
            # Sketch, flow and reconstruction of the learners once more, without a gradient.
            total += learners * (sketch * self.forward(sketch) + length * (self.readout + 2 * self.posterior) + once)
            guesses, estimated = guesses + kinds.some_learners(objective.self_conditioning).whole, estimated + learners
        if self.estimate:
            total += guesses * once + estimated * refine * self.estimate
        return total


def _products(module: nn.Module) -> int:
    """Operations of one token in the matrices of a module, each of which it meets once."""
    return sum(2 * parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
