"""Rarefy inside other libraries. Each module imports its library; this one imports none."""
