"""An engine without a model, to measure and to test everything else. It imports no torch and starts at once.

Tokens come at a set rate and are words of the tokenizer's vocabulary, drawn by the request's seed and the
position. What a request says of sampling changes nothing, but for what limits the choice: allowed token ids
and structured output. An end of sequence comes only where structured output has come to its end.
"""
