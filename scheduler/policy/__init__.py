"""Who is served first, who makes room, who is to blame, and how long a step takes."""
