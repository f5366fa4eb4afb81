"""Models: configurations, families of architectures, and the code that computes them."""
