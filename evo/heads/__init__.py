"""What reads a hidden state: progression time, token prior, decoding.

Nothing here knows of the rest of the library: a head takes tensors and returns tensors.
"""

from .decoder import Decoder, LinearDecoder, NearestNeighborDecoder
from .prior import NucleusPrior, Prior
from .readout import LinearReadout, Readout, TiedReadout
from .timestep import EntropyTimestep, FixedTimestep, TimestepHead

__all__ = [
    "Decoder",
    "EntropyTimestep",
    "FixedTimestep",
    "LinearDecoder",
    "LinearReadout",
    "NearestNeighborDecoder",
    "NucleusPrior",
    "Prior",
    "Readout",
    "TiedReadout",
    "TimestepHead",
]
