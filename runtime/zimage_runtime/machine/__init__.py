"""The machine: its memory, processor and GPUs."""
