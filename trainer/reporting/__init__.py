"""What a run tells: the terminal, pictures, trackers and reports."""
