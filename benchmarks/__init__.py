"""Speed relative to a plain loop in the same run, as ratios."""
