"""Values that travel, and what turns messages into them and back."""
