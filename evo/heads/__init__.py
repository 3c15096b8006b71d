"""What reads a hidden state: progression time, token prior, decoding.

Nothing here knows of the rest of the library: a head takes tensors and returns tensors.
"""

from evo.heads.decoder import Decoder, LinearDecoder, NearestNeighborDecoder
from evo.heads.prior import NucleusPrior, Prior
from evo.heads.readout import LinearReadout, Readout, TiedReadout
from evo.heads.timestep import EntropyTimestep, FixedTimestep, TimestepHead

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
