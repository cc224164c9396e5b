"""One folder per op. Imports runtime, shared and testing; never another op."""
