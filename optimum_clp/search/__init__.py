"""Which layers to cut: one objective, and the strategies that look for its best."""
