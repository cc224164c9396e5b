"""From disk and hub to tokens and models. Imports files and errors only."""
