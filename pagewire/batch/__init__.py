"""Files of requests: read line by line, answered many at once, and answered further after a crash."""
