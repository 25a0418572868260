"""The catalogue of data sets: each module registers some and defines how to read their rows."""
