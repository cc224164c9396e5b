"""From disk and hub to tokens and models. Imports the files beside the rooms only."""
