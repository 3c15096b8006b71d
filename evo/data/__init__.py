"""Data: texts to shards of token ids, documents packed into rows, and the batch of each step.

Knows nothing of the model, and imports nothing of `evo.core`. Whoever trains asks a `Corpus` for rows of a step, and gets the same ones
however many ranks ask.
"""

from evo.data.corpus import Corpus, open_corpus
from evo.data.encoding import BYTES, Encoding
from evo.data.huggingface import huggingface_encoding, huggingface_texts
from evo.data.loader import Prefetch, load
from evo.data.packing import BestFit, Contiguous, Packed, Packing, Rows
from evo.data.protocol import Data
from evo.data.shards import TokenShards
from evo.data.sources import CorpusConfig
from evo.data.stream import StreamState, stream_batches
from evo.data.writing import FilePart, write_shards

__all__ = [
    "BYTES",
    "BestFit",
    "Contiguous",
    "Corpus",
    "CorpusConfig",
    "Data",
    "Encoding",
    "FilePart",
    "Packed",
    "Packing",
    "Prefetch",
    "Rows",
    "StreamState",
    "TokenShards",
    "huggingface_encoding",
    "huggingface_texts",
    "load",
    "open_corpus",
    "stream_batches",
    "write_shards",
]
