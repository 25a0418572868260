"""Speed, measured against a plain loop in the same run, and printed as ratios."""
