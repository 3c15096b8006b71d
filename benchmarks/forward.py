"""Our Transformer against the Llama of the transformers package, with the same weights: a prompt read, and a token decoded behind it.

    python benchmarks/forward.py                      # eager
    python benchmarks/forward.py --compile

Both read and write a cache of keys and values and give the logits of the next token; both attend by `scaled_dot_product_attention`.
A ratio below 1 says that ours is faster.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _harness import compare, describe_machine, keep_memory, parser, table, write_json
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from evo import Evo
from evo.core.prompted import Prompted
from evo.interop import from_pretrained


class Theirs:
    """A Llama that has read a prompt."""

    def __init__(self, model: LlamaForCausalLM, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def prefill(self) -> Tensor:
        cache = DynamicCache(config=self.model.config)
        return self.model(self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        logits = self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.cache.crop(-1)
        return logits


class Ours:
    """An Evo that has read a prompt."""

    def __init__(self, model: Evo, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.state = Prompted(model, prompt, None, room=64)
        self.level = torch.zeros(len(prompt), 1, device=prompt.device)

    def prefill(self) -> Tensor:
        return Prompted(self.model, self.prompt, None, room=64).speak()

    def decode(self, token: Tensor) -> Tensor:
        self.state.read(self.state.denoiser.embeddings[token], self.level)
        logits = self.state.speak()
        self.state.forget(1)
        return logits


@torch.no_grad()
def main() -> None:
    options = parser(__doc__ or "", "forward")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--depth", type=int, default=8)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--length", type=int, default=256, help="of the prompt, in tokens")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options.add_argument("--compile", action="store_true")
    options.add_argument("--rounds", type=int, default=40)
    given = options.parse_args()
    keep_memory()
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.width,
        intermediate_size=8 * given.width // 3 // 64 * 64,
        num_hidden_layers=given.depth,
        num_attention_heads=given.heads,
        num_key_value_heads=max(1, given.heads // 4),
        max_position_embeddings=2 * given.length,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(sizes).to(getattr(torch, given.dtype)).eval()
    with tempfile.TemporaryDirectory() as folder:
        llama.save_pretrained(folder)
        model = from_pretrained(Path(folder)).to(given.device)
    llama = llama.to(given.device)
    prompt = torch.randint(given.vocab, (given.batch, given.length), device=given.device)
    token = prompt[:, -1:]
    if given.compile:
        llama.forward = torch.compile(llama.forward)
        model.backbone.forward = torch.compile(model.backbone.forward)
    ours, theirs = Ours(model, prompt), Theirs(llama, prompt)
    torch.testing.assert_close(ours.decode(token), theirs.decode(token).float(), rtol=0.05, atol=0.05)
    machine = describe_machine(given.device)
    found = {
        "prefill": compare(ours.prefill, theirs.prefill, device=given.device, rounds=given.rounds),
        "decode": compare(
            lambda: ours.decode(token), lambda: theirs.decode(token), device=given.device, rounds=given.rounds
        ),
    }
    rows = [(name, f"{c.first_ms:.2f} ms", f"{c.second_ms:.2f} ms", str(c)) for name, c in found.items()]
    print(machine)
    print(table(("", "Evo", "transformers", "ratio (10th to 90th percentile)"), rows))
    shape = {name: getattr(given, name) for name in ("width", "depth", "heads", "vocab", "batch", "length", "dtype")}
    results = {name: vars(comparison) for name, comparison in found.items()}
    write_json(given.out, {"machine": machine, "compiled": given.compile, **shape, "passes": results})


if __name__ == "__main__":
    main()
