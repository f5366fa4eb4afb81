"""Root-mean-square layer normalisation, alone or after adding to the residual stream."""
