"""Running a model, or a part of it, frozen: layers gated, skipped or resumed, and what the dense model says, kept."""
