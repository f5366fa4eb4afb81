"""How models write the calls that they make, one module a format; `registry` finds the one of a model."""
