"""Other people's models without logits, and with our router. Imports routing."""
