"""Where a model is cut, and what each party owns of it."""
