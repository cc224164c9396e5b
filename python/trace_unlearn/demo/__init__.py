"""The built-in demo: TRACE on tiny Qwen3-MoE models that it pre-trains on generated facts. Imports every room."""
