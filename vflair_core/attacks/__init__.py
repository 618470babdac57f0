"""The contract of an attack, and the process that runs one on what it was granted. Never the truth."""
