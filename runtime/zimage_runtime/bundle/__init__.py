"""A bundle on the disk: its manifest, tensors and files, and bundles and checkpoints on the Hub."""
