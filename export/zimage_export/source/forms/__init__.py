"""Forms in which files store quantized weights: what recognizes them, and what turns them into floating point."""
