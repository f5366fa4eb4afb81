"""What every runner shares: its protocol, the rows on the host, and what a step does for prompts."""
