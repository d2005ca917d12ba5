"""The autoencoder piece by piece, for images that do not fit as a whole."""
