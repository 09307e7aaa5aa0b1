"""What was reused, why not more, and what would help."""
