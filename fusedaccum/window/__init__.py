"""What the open window holds: from the hook on a parameter to its accumulator."""
