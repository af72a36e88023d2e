"""Cutoff endpoint tuning: a closed-form start, then a training loop over the layers next to the cut."""
