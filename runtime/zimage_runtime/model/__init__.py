"""What Z-Image is, in numbers: configuration, geometry, schedule, noise, tokens, programs and blocks."""
