"""`evo generate`: continue a text."""

from __future__ import annotations

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from evo.core import Evo
from evo.solvers import Euler, Exponential, ExponentialMultistep, Heun, Midpoint, Solver, TorchDiffEq
from evo.text import ByteTokenizer
from evo.training.curriculum import PATHS
from evo.training.precision import pick_device

_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a text with a trained byte-level Evo.

    The text goes to standard output as it becomes final, figures about its making to standard error. The same seed gives the same text.
    """

    prompt: Positional[str] = ""
    """Text to continue; - reads it from standard input, nothing starts from nothing."""
    model: Path
    """Folder of the model, as `evo train` leaves it in OUT/model."""
    max_new_tokens: int | None = None
    """Tokens (bytes) to write at most; by default 256, or what the model's context has room for."""
    solver: Literal["euler", "midpoint", "heun", "exponential", "multistep", "dopri5"] | None = None
    """How latents move along the flow, by default euler. multistep, exponential of second order, needs the fewest evaluations; dopri5
    goes to a relative and absolute tolerance of 1e-3."""
    plan: Literal["early_stop", "late_start", "full"] = "early_stop"
    """How the refinement steps of a token are placed: finish early, finish together, or all steps for every token."""
    max_steps: int = 20
    """Refinement steps of a token that starts as pure noise."""
    level: float | None = None
    """Start every token at this level instead of the learned one: 0 writes autoregressively, 1 by diffusion."""
    temperature: float = 0.7
    """Of the draw of each token; 0 takes the likeliest."""
    top_p: float = 0.9
    """Draw among the likeliest tokens that hold this share of the probability."""
    window: int | None = None
    """Tokens sketched and refined together; by default the whole answer."""
    seed: int = 0
    """Of everything that is drawn."""
    stop: bool = True
    """End where the model ends a document."""
    device: str = "auto"
    """cpu, cuda, …; auto takes an accelerator where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}; needed: 0 or more, below 2^63")


def run(options: Options) -> None:
    """Load the model, write, print."""
    device, tokenizer = pick_device(options.device), ByteTokenizer()
    model = Evo.from_pretrained(options.model).to(device).eval()
    vocabulary = model.latent_space.vocab_size
    if vocabulary != tokenizer.vocab_size:
        raise ValueError(
            f"{options.model} has a vocabulary of {vocabulary} tokens; evo generate writes bytes, "
            f"a vocabulary of {tokenizer.vocab_size}"
        )
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    prompt, solver = tokenizer.encode(text)[None].to(device), options.solver or "euler"
    most = options.max_new_tokens
    if most is None:
        most = min(_TOKENS, max(1, model.context - prompt.shape[1]))
    started = time.perf_counter()
    chunks = model.stream(
        prompt,
        most,
        solver=_solver(solver, model),
        plan=PATHS[options.plan],
        levels=options.level,
        max_steps=options.max_steps,
        top_p=options.top_p,
        temperature=options.temperature,
        window=options.window,
        stop=[tokenizer.eos_id] if options.stop else None,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    print(text, end="", flush=True)
    # The bytes of one character may come in several chunks.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    levels, nfe = [], 0
    for chunk in chunks:
        print(decoder.decode(tokenizer.decode_bytes(chunk.tokens)), end="", flush=True)
        levels += chunk.levels
        nfe = chunk.nfe
    print(decoder.decode(b"", final=True))
    seconds = time.perf_counter() - started
    print(
        f"{len(levels)} tokens in {seconds:.2f} s ({len(levels) / seconds:.1f} tokens/s), {solver}: "
        f"{nfe} network evaluations of refinement, mean level {sum(levels) / len(levels):.3f}",
        file=sys.stderr,
    )
    if options.solver is not None and nfe == 0:
        print("no token was refined; --solver had no effect, try --level 1", file=sys.stderr)


def _solver(name: str, model: Evo) -> Solver:
    match name:
        case "euler":
            return Euler()
        case "heun":
            return Heun()
        case "midpoint":
            return Midpoint()
        case "exponential":
            return Exponential(schedule=model.schedule)
        case "multistep":
            return ExponentialMultistep(schedule=model.schedule)
        case _:
            return TorchDiffEq(name, rtol=1e-3, atol=1e-3)
