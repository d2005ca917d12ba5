"""A reduced model whose linears are as wide as the published ones: a block in each stage, and the small autoencoder.

cuBLAS does not multiply int8 at a width of 64, which the tests' small model has ("CUBLAS failure 15" on an H100). At
the published widths it did, with 1 to 4224 rows.
"""

from dataclasses import replace
from typing import Any


def wide_scale() -> Any:
    """Its dimensions, a `Scale`: 1.6 GB in bf16."""
    from zimage_export.synthetic.checkpoint import FULL, SMALL

    small, full = SMALL.config, FULL.config
    text = replace(full.text_encoder, num_hidden_layers=2, vocab_size=small.text_encoder.vocab_size)
    transformer = replace(full.transformer, n_layers=1, n_refiner_layers=1)
    return replace(SMALL, config=replace(small, text_encoder=text, transformer=transformer), shards=1)
