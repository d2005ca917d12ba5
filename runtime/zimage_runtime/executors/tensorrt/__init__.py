"""The `tensorrt` executor: small engines without weights, one a block shape, on an NVIDIA GPU."""
