"""`evo prepare`: text to shards of token ids, once, for all runs that read them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from evo.data import BYTES, Corpus, CorpusConfig, huggingface_encoding, open_corpus
from evo.data.corpus import prepared


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tokenize SOURCE into the folder OUT, which `evo train --data OUT` then reads in place of texts.

    Shards are written by several processes; the files are the same for any number of them. What is in OUT already is made anew only
    where the texts or the options have changed.
    """

    source: Positional[Path]
    """File or folder of text."""
    out: Positional[Path]
    """Folder for the shards: train/ and held_out/ in it."""
    workers: int = 1
    """Processes that tokenize."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer of transformers; by default text is read byte by byte."""
    shard_megabytes: int = 64
    """Text in one shard."""
    verify: bool = False
    """Read everything that was written once more, and compare checksums."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)

    def __post_init__(self) -> None:
        for name in ("workers", "shard_megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: 1 or more")


def run(options: Options) -> None:
    """Prepare, and say what there is now."""
    if options.source.is_dir() and prepared(options.source):
        raise ValueError(f"{options.source} holds prepared tokens already: give the texts that they were made of")
    corpus = open_corpus(
        options.source,
        options.out,
        options.corpus,
        encoding=BYTES if options.tokenizer is None else huggingface_encoding(options.tokenizer),
        workers=options.workers,
        shard_bytes=options.shard_megabytes << 20,
        progress=True,
    )
    if options.verify:
        for side in (corpus.train, corpus.held_out):
            side.verify()
    print(_summary(corpus))
    print(f"now try: evo train --data {options.out}", file=sys.stderr)


def _summary(corpus: Corpus) -> str:
    lines = []
    for name, side in (("to train on", corpus.train), ("held out", corpus.held_out)):
        lines.append(
            f"{name:<12}{side.tokens:>16,} tokens{side.documents:>12,} documents{len(side.shards):>8,} shards"
            f"{side.bytes_per_token:>8.2f} bytes a token"
        )
    return "\n".join(lines)
