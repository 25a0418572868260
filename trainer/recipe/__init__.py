"""Reads and validates recipes; holds them as typed objects."""
