"""Pages, plots and model cards from finished results."""
