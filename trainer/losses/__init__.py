"""Losses that return sums; each module registers its own."""
