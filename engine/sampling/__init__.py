"""From logits to tokens: penalties, filters, seeded draws and log probabilities."""
