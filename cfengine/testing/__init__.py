"""Replay of golden traces through the engine's own parts."""
