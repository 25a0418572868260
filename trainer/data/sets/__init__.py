"""The data sets; each module registers one and says how its archives become rows."""
