"""Data: archives become Parquet once; an exact, resumable order streams it."""
