"""A recipe: read, validated, typed."""
