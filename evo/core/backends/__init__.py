"""Ways to compute attention, all behind one call: `backend(q, k, v, pattern, dropout)`."""

from evo.core.backends.auto import Auto, Explanation, auto, explain
from evo.core.backends.base import Attend, Backend, Call
from evo.core.backends.flex import Flex
from evo.core.backends.sdpa import Sdpa
from evo.core.backends.xformers import Xformers

__all__ = ["Attend", "Auto", "Backend", "Call", "Explanation", "Flex", "Sdpa", "Xformers", "auto", "explain"]
