"""What was measured, as JSON, as tables, as pictures, as a model card, and on the Hub."""
