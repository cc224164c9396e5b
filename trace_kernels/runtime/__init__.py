"""How any op finds its code: backends, the compiled module, checks of arguments. Imports torch only."""
