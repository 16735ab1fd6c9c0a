"""docs/guide/, from docstrings, results and code: `python -m bench.guide`. What a person wrote is in chapters/."""
