"""What the cells of a study say together: one page that needs no network, figures and tables."""
