"""Pages, plots and model cards from finished results. Imports evaluation and the rooms before it."""
