"""The commands of analysis.py: the paper's figures and tables, and exports."""
