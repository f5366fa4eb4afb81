"""Each kernel against the bandwidth or arithmetic that bounds it."""
