"""What every method runs on: the models of one merge, and the loop over their layers."""
