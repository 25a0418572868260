"""What happens in an optimizer step."""
