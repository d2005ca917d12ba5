"""The exporter: a published checkpoint in, a bundle out. The only package that may import torch.

``source`` opens checkpoints lazily, ``storage`` decides how tensors are stored, ``graphs`` states the model as ONNX
programs without weights, ``weights`` streams the tensors into the bundle, ``engines`` builds for TensorRT, ``build``
puts the bundle together, and ``measure`` compares it with its checkpoint. ``synthetic`` makes checkpoints of random
weights for tests and benchmarks.
"""

import os

# diffusers would warn on the commands' stderr that two packages share the `optimum` namespace
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
