"""The neighbours: checkpoints in the Hugging Face layout, read and written.

Nothing here needs the transformers package; a model named by its hub id needs huggingface_hub.
"""

from evo.interop.export import export_causal_lm
from evo.interop.pretrained import freeze_backbone, from_pretrained

__all__ = ["export_causal_lm", "freeze_backbone", "from_pretrained"]
