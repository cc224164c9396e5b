"""TRACE: routing-aware machine unlearning for Mixture-of-Experts language models."""
