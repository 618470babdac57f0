"""Many experiments as one study: a grid of cells, the store that keeps what they found, and what runs them."""
