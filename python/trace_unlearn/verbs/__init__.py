"""The command line: one file a verb, with its options, their checks and what it prints."""
