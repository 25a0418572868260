"""Several processes: how they start, what they add up, and how a lost one ends the job."""
