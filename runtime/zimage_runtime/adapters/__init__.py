"""LoRA and its relatives: files of every naming scheme, read as changes of the model's tensors."""
