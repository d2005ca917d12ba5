"""From noise to an image: guidance, and the solvers that follow the velocity that it gives."""
