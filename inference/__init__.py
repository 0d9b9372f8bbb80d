"""Checkpoint to answers."""
