"""Writing checkpoints: quantized, with an adapter merged into them, or in another layout.

Only the modules that the command line needs first import no torch; `run` is what does the work.
"""
