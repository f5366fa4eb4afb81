"""From a request in either protocol's form to the events of its answer."""
