"""Where weights come from: checkpoints in diffusers layout and single files."""
