"""How models come from hubs and package indexes."""
