"""The exporter: a published checkpoint goes in, a bundle comes out. The only package that may import torch.

``checkpoint`` opens the weights lazily, ``graphs`` states the model as ONNX programs that hold no weights,
``weights`` streams the tensors into the bundle, ``build`` puts it together, and ``verify`` measures how far it is
from the checkpoint. ``synthetic`` makes checkpoints of random weights to try all this on.
"""

import os

# The commands' stderr is their own: diffusers would warn there that two packages share the `optimum` namespace.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
