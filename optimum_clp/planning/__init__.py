"""What pruning would do to a model, predicted from its config alone."""
