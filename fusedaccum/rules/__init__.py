"""What an optimizer does to one element, and which optimizer does that."""
