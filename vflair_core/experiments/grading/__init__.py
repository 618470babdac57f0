"""Holds the truth, and says what guesses are worth. Knows no party."""
