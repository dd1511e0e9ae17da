"""The paper's figures and tables, one module each; analysis.py calls them."""
