"""Data: archives are converted to Parquet once, then streamed in an exact, resumable order."""
