"""How far a bundle is from its checkpoint, and what the checkpoint's activations look like."""
