"""The lean runtime: a bundle goes in, an image comes out. Never imports torch.

``model`` is Z-Image in numbers, ``bundle`` what is on the disk, ``images`` what comes in and goes out, ``tiles`` the
autoencoder piece by piece, ``machine`` what this computer has, and ``executors`` run a bundle's stages on a device.
``pipeline`` reads from top to bottom: request → events.
"""

import os

# From 1.29 on, ONNX Runtime sends usage data by default and writes a device id into the user's cache. It reads this
# once, when it is imported; child processes inherit it. Source: microsoft/onnxruntime#27379.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
