"""Images in and out: source images and masks, img2img, metadata, output files."""
