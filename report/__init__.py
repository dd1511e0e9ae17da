"""Presentation of results: averages with intervals, tables, plots and a page."""
