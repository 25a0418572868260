"""FLOPs, memory and time of a network."""
