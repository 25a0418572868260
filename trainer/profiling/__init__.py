"""Arithmetic, memory and time of a network."""
