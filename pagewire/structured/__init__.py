"""Structured output: constraints compiled, checked against hostile ones, and turned into token masks.

`checker.ConstraintChecker` says whether a constraint can be served; frontends ask it before they submit.
`grammars.Grammars` compiles constraints over a model's vocabulary and gives each request a matcher; the
scheduler uses it. Both are blocking: they are called from threads. llguidance does the work.
"""
