"""What a `model_type` is made of: where its decoder layers live, which of them may go, and the config of what is left."""
