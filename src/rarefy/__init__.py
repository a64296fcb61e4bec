"""Rarefy makes trained PyTorch models smaller and faster, and proves it."""

__version__ = "0.1.0"
