"""The command line: one file per verb, with its options, their checks and what it prints. Imports all but demo."""
