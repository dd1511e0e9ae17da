"""How results are told: averages with intervals, tables, plots, a page."""
