"""JSON and CSV files of a run -> pages and figures."""
