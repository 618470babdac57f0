"""The contract of a defense, and the defenses of one party in their order."""
