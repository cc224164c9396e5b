"""From routing statistics to expert sets and token weights. Imports routing and sources."""
