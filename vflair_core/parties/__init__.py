"""The verbs: split, load, divide, merge, verify. Below them the two parties, which share only `communication` and `partition`."""
