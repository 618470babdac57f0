"""Holds modules and answers messages. Knows no text, no task, no defense."""
