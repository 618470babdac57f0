"""Fine-tuning across the cut, and how well the model does."""
