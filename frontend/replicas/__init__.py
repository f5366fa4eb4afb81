"""Several schedulers behind one frontend: finding them, choosing one for each request, moving requests."""
