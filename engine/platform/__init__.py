"""What depends on the kind of device, and what puts a model together on one."""
