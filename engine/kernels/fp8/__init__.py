"""Products y = x @ w.T with e4m3 weights of [N, K], and inputs of the same format or of the model's dtype."""
