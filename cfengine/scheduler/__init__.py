"""Passes of a chunk, the sampler between them, and pacing."""
