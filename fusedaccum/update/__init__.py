"""From full accumulators to weights."""
