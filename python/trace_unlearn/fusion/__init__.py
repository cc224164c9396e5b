"""Other people's models without logits, and with our router. Imports nothing of the method but errors."""
