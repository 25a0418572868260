"""Everything that happens in an optimizer step."""
