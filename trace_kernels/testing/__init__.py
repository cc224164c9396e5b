"""How any op is held to account: its cases and the conformance of its backends. Imports runtime and shared."""
