"""Images on their way in and out: sources, img2img, metadata, output files."""
