"""What crosses between the parties, how it travels, and the short lists of what a message may name. Nothing here knows a party."""
