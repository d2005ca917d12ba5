"""The autoencoder in tiles, for images that do not fit in memory as a whole."""
