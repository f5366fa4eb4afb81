"""What the HTTP endpoints take, a module for each group of them."""
