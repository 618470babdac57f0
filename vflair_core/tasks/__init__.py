"""What a task is, and how its examples become batches. No party, no defense."""
