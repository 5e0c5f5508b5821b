"""Pure losses, weights and metrics: arrays in, arrays out. They know `core`, never models or samplers."""
