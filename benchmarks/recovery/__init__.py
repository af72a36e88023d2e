"""Ways to heal a cut: what they bring back, and what they cost."""
