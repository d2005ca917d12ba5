"""The `tensorrt` executor: small engines without weights, one per block shape, on an NVIDIA GPU."""
