"""A service on a Ray cluster: Ray places its processes, watches them and finds them; it carries no step."""
