"""Scripts that wire the rooms together. The only place that knows all of them."""
