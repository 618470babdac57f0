"""Everything that decides, makes and compares numbers: from an `Experiment` to a `Result`."""
